"""Triton kernels of the linear forms, interpreted: against their definitions in fp64."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from diffpatch import TokenGrid
from diffpatch.kernels.block_sparse import reference as block_sparse_reference
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.gpu import support
from diffpatch.kernels.linear import api as linear_attention
from diffpatch.kernels.linear import features as linear_features
from diffpatch.kernels.linear import reference as linear_attention_reference
from diffpatch.kernels.virtual_tokens import api as virtual_tokens
from diffpatch.kernels.virtual_tokens.tokens import VirtualTokens
from diffpatch.methods.linear.method import Linear
from tests.kernels.gpu.triton_interpreter import as_on_a_gpu
from tests.kernels.random_blocks import random_blocks, random_qkv, with_outliers

SIZES = [64, 30, 17, 3]  # of tiles; tokens are in random order
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def with_text() -> BlockIndex:
    """A pattern of the method itself: odd tiles, and text that sees and is seen by all."""
    return Linear(kept=0.2).pattern(TokenGrid(2, 5, 9, text_before=5)).blocks


def away_from_zero(blocks: BlockIndex, dtype: torch.dtype, size: int = 32) -> Tensors:
    """q, k, v of batch 2 and grouped heads, keys and values far from their own mean of zero."""
    q, k, v = random_qkv(2, blocks.num_tokens, 2, size, dtype, key_heads=1)
    return q, k + 1, v - 2


def a_key_mask(blocks: BlockIndex) -> torch.Tensor:
    """bool (2, S), the first tile hidden altogether in the second entry."""
    mask = torch.rand(2, blocks.num_tokens, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[1, blocks.order[: int(blocks.starts[1])]] = False
    return mask


def on_kernels(function: Any, *args: Any, **options: Any) -> Any:
    """A call on the Triton kernels, interpreted, with outputs that are NaN unless written."""
    with as_on_a_gpu():
        return function(*args, backend="triton", **options)


def close(out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, factor: float = 1) -> None:
    assert torch.isfinite(out).all()
    assert (out.double() - expected).norm() <= factor * TOLERANCE[dtype] * expected.norm()


def close_lse(lse: torch.Tensor, expected: torch.Tensor, error: float = 1e-4) -> None:
    assert torch.equal(lse.isinf(), expected.isinf())
    seen = ~expected.isinf()
    assert (lse.double() - expected)[seen].abs().max() < error


TILES = random_blocks(SIZES, kept=0.4, seed=1)
cases = pytest.mark.parametrize(
    ("dtype", "blocks", "masked"),
    [(torch.float32, with_text(), True), (torch.bfloat16, TILES, False)],
    ids=["fp32, text, key mask", "bf16, tiles"],
)


@cases
def test_pooling(dtype: torch.dtype, blocks: BlockIndex, masked: bool) -> None:
    _, k, v = away_from_zero(blocks, dtype, 24)
    mask = a_key_mask(blocks) if masked else None
    expected = virtual_tokens.pool(
        k.double(), v.double(), blocks, 20, key_mask=mask, backend="torch"
    )
    if mask is not None:
        v = v.masked_fill(~mask[:, :, None, None], torch.nan)  # hidden keys are not even read
    tokens = on_kernels(virtual_tokens.pool, k, v, blocks, 20, key_mask=mask)
    assert expected.variance is not None and tokens.variance is not None
    close(tokens.keys, expected.keys, dtype)
    close(tokens.values, expected.values, dtype)
    close(tokens.variance, expected.variance, dtype)
    close_lse(tokens.log_count, expected.log_count.double(), 1e-6)
    plain = on_kernels(virtual_tokens.pool, k, v, blocks, 20, second_order=False)
    assert plain.variance is None


@pytest.mark.parametrize(
    ("dtype", "second_order"),
    [(torch.float32, True), (torch.bfloat16, True), (torch.float16, False)],
)
def test_near_and_far_share_one_softmax(dtype: torch.dtype, second_order: bool) -> None:
    blocks = with_text()
    q, k, v = away_from_zero(blocks, dtype)
    mask, scale = a_key_mask(blocks), 0.2
    x, y, z = (t.double() for t in (q, k, v))

    def pooled(k: torch.Tensor, v: torch.Tensor) -> VirtualTokens:
        return virtual_tokens.pool(
            k, v, blocks, 9, second_order=second_order, key_mask=mask, backend="torch"
        )

    near, lse = block_sparse_reference.attend_reference(x, y, z, blocks, scale, mask, True)
    assert lse is not None
    expected = virtual_tokens.attend_virtual(x, pooled(y, z), blocks, scale, (near, lse), "torch")
    begun = near.to(dtype), lse.float()
    out, total = on_kernels(virtual_tokens.attend_virtual, q, pooled(k, v), blocks, scale, begun)
    close(out, expected[0], dtype)
    close_lse(total, expected[1], 1e-5 if dtype == torch.float32 else 3e-2)


def test_virtual_tokens_alone_with_patterns_by_head() -> None:
    blocks = random_blocks(SIZES, kept=0.5, heads=[0, 1], seed=4)
    q, k, v = away_from_zero(blocks, torch.float32, 40)
    q, k = with_outliers(q), with_outliers(k)  # the cap on the second order holds
    tokens = virtual_tokens.pool(k, v, blocks, 16, backend="torch")
    assert tokens.variance is not None
    wide = VirtualTokens(
        tokens.keys.double(), tokens.values.double(), tokens.variance.double(),
        tokens.log_count.double(), tokens.pieces,
    )  # fmt: skip
    expected, expected_lse = virtual_tokens.attend_virtual(
        q.double(), wide, blocks, 0.2, backend="torch"
    )
    out, lse = on_kernels(virtual_tokens.attend_virtual, q, tokens, blocks, 0.2)
    close(out, expected, torch.float32, 30)  # scores of thousands
    close_lse(lse, expected_lse, 1e-3)


def test_queries_that_see_everything_exactly_have_nothing_far() -> None:
    blocks = random_blocks(SIZES, kept=1.0, seed=5)
    q, k, v = away_from_zero(blocks, torch.bfloat16)
    tokens = virtual_tokens.pool(k, v, blocks, 16, backend="torch")
    out, lse = on_kernels(virtual_tokens.attend_virtual, q, tokens, blocks, 0.2)
    assert not out.any() and lse.isinf().all()
    out, lse = on_kernels(linear_attention.attend_cumulants, q, k, v, blocks, 0.2)
    assert not out.any() and lse.isinf().all()
    assert not on_kernels(linear_attention.attend_features, q, k, v, blocks, "elu").any()


@cases
def test_cumulants(dtype: torch.dtype, blocks: BlockIndex, masked: bool) -> None:
    q, k, v = away_from_zero(blocks, dtype)
    mask = a_key_mask(blocks) if masked else None
    expected = linear_attention_reference.attend_cumulants(
        q.double(), k.double(), v.double(), blocks, 0.2, mask
    )
    out, lse = on_kernels(linear_attention.attend_cumulants, q, k, v, blocks, 0.2, mask)
    close(out, expected[0], dtype)
    close_lse(lse, expected[1], 1e-4 if dtype == torch.float32 else 3e-2)


def test_cumulants_of_odd_wide_heads_and_outliers() -> None:
    blocks = random_blocks(SIZES, kept=0.4, seed=6)
    q, k, v = away_from_zero(blocks, torch.float32, 72)
    q, k = with_outliers(q, factor=20), with_outliers(k, factor=20)
    expected = linear_attention_reference.attend_cumulants(
        q.double(), k.double(), v.double(), blocks, 0.2
    )
    out, lse = on_kernels(linear_attention.attend_cumulants, q, k, v, blocks, 0.2)
    close(out, expected[0], torch.float32, 10)
    close_lse(lse, expected[1], 1e-3)


@pytest.mark.parametrize(
    ("dtype", "feature"),
    zip([torch.float32, torch.float32, torch.bfloat16, torch.bfloat16], linear_features.FEATURES,
        strict=True),
)  # fmt: skip
def test_features(dtype: torch.dtype, feature: str) -> None:
    blocks = with_text()
    q, k, v = away_from_zero(blocks, dtype)
    q[:, :, 0] = -1  # relu is blind here
    mask = a_key_mask(blocks)
    x, y, z = (t.double() for t in (q, k, v))
    expected = linear_attention_reference.attend_features(x, y, z, blocks, feature, mask)
    out = on_kernels(linear_attention.attend_features, q, k, v, blocks, feature, mask)
    close(out, expected, dtype)


def test_many_keys_are_summed_in_splits() -> None:
    blocks = random_blocks([512, 512], kept=0.5, partial=0, seed=7)
    q, k, v = random_qkv(1, 1024, 1, 16, torch.float32)
    expected = linear_attention_reference.attend_cumulants(
        q.double(), k.double(), v.double(), blocks, 0.25
    )
    out, lse = on_kernels(linear_attention.attend_cumulants, q, k, v, blocks, 0.25)
    close(out, expected[0], torch.float32, 10)
    close_lse(lse, expected[1])


def test_triton_is_refused_where_it_cannot_run() -> None:
    blocks = TILES
    q, k, v = away_from_zero(blocks, torch.float32)
    with pytest.raises(RuntimeError, match="needs a GPU"):
        linear_attention.attend_cumulants(q, k, v, blocks, 0.2, backend="triton")
    with (
        mock.patch.object(support, "unsupported_reason", lambda *_: None),
        pytest.raises(RuntimeError, match="has no gradients"),
    ):
        virtual_tokens.pool(k.requires_grad_(), v, blocks, 16, backend="triton")
