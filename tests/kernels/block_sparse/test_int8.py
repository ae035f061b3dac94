"""Scores in 8 bits: the definition, its error bounds, the emulation and the kernels."""

from __future__ import annotations

from itertools import pairwise
from unittest import mock

import pytest
import torch

import diffpatch
from diffpatch.kernels.block_sparse import reference as block_sparse_reference
from diffpatch.kernels.block_sparse.api import block_sparse_attention
from diffpatch.kernels.block_sparse.int8 import levels as quantize
from diffpatch.kernels.block_sparse.int8.reference import attend_torch_int8
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.errors import BackendUnavailable
from tests.kernels.random_blocks import random_blocks, random_qkv
from tests.tiny import wan

SIZES = [64, 150, 40, 64, 17]
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(dtype: torch.dtype = torch.bfloat16, size: int = 64) -> Tensors:
    """q, k, v of two query heads that share one key head, with a channel of keys far from 0."""
    q, k, v = random_qkv(2, sum(SIZES), 2, size, torch.float32, key_heads=1)
    k[..., 5] += 40
    return q.to(dtype), k.to(dtype), v.to(dtype)


def padding() -> torch.Tensor:
    """A key mask (2, S): the second sequence sees no key at all."""
    seen = torch.rand(2, sum(SIZES), generator=torch.Generator().manual_seed(0)) < 0.7
    seen[1] = False
    return seen


def exact(
    tensors: Tensors, blocks: BlockIndex, key_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of attention, in fp64."""
    q, k, v = (x.double() for x in tensors)
    out, lse = block_sparse_reference.attend_reference(q, k, v, blocks, 0.125, key_mask, True)
    assert lse is not None
    return out, lse


def score_bound(q: torch.Tensor, k: torch.Tensor, blocks: BlockIndex) -> torch.Tensor:
    """How far a score with scale 0.125 can be off, for each query (B, S, H): half a level a number.

    ``q k - (q + a)(k + b)`` with ``|a| <= s/2`` and ``|b| <= t/2`` in every channel.
    """
    mean = quantize.mean_key(k)
    _, of_query = quantize.quantize_queries(q)
    _, of_key = quantize.quantize_keys(k, mean, blocks)
    k = k.to(mean.dtype) - mean[:, None]
    keys = k.abs().sum(-1).max()
    queries = q.to(mean.dtype).abs().sum(-1)
    a, b = of_query / 2, of_key.max() / 2
    return 0.125 * (a * keys + b * queries + q.shape[-1] * a * b)


def test_keys_are_rounded_run_by_run_of_each_tile() -> None:
    blocks = random_blocks(SIZES, seed=1)
    _, k, _ = inputs(torch.float32)
    mean = quantize.mean_key(k)
    torch.testing.assert_close(mean, k.double().mean(1).float())
    values, scales = quantize.quantize_keys(k, mean, blocks)
    assert values.dtype == torch.int8
    rest = (k - mean[:, None])[:, blocks.order]
    starts = blocks.starts.tolist()
    for first, end in pairwise(starts):
        for begin in range(first, end, quantize.STRIP):
            run = slice(begin, min(begin + quantize.STRIP, end))
            step = rest[:, run].abs().amax((1, 3)) / 127  # (B, K)
            torch.testing.assert_close(
                scales[:, :, run], step[..., None].expand_as(scales[..., run])
            )
            off = rest[:, run] - values[:, run] * step[:, None, :, None]
            assert (off.abs() <= 0.501 * step[:, None, :, None]).all()
            assert (values[:, run].int().abs().amax((1, 3)) == 127).all()


@pytest.mark.parametrize("last", [1, quantize.STRIP, quantize.STRIP + 1])
def test_a_last_key_alone_has_a_scale_of_its_own(last: int) -> None:
    blocks = random_blocks([7, last], edge=max(7, last))
    k = torch.ones(1, 7 + last, 1, 4, dtype=torch.float64)
    k[:, blocks.order[-1]] = 3.0
    values, scales = quantize.quantize_keys(k, torch.zeros(1, 1, 4, dtype=torch.float64), blocks)
    back = values.transpose(1, 2) * scales[..., None]
    assert torch.allclose(back.transpose(1, 2), k[:, blocks.order], atol=0.02)
    alone = last % quantize.STRIP == 1
    assert (scales[0, 0, -1] > 2 * scales[0, 0, 0]) and (scales[0, 0, -2] < scales[0, 0, -1]) == (
        alone
    )


def test_queries_are_rounded_one_by_one() -> None:
    q, _, _ = inputs()
    q[0, 0] = 0
    values, scales = quantize.quantize_queries(q)
    assert not values[0, 0].any()
    off = q.float() - values * scales[..., None]
    assert (off.abs() <= 0.501 * scales[..., None]).all()
    torch.testing.assert_close(scales[0, 1:], q.float().abs().amax(-1)[0, 1:] / 127)


def test_smoothing_changes_nothing_but_the_log_sum_exp_which_is_put_right() -> None:
    blocks = random_blocks(SIZES, kept=0.5, seed=2)
    q, k, v = inputs(torch.float64)
    mean = quantize.mean_key(k)
    out, lse = exact((q, k, v), blocks, None)
    smooth, smooth_lse = exact((q, k - mean[:, None], v), blocks, None)
    torch.testing.assert_close(smooth, out)
    torch.testing.assert_close(smooth_lse + quantize.mean_score(q, mean, 0.125), lse)


def test_smoothing_is_what_saves_the_scores_from_a_channel_far_from_zero() -> None:
    blocks = random_blocks(SIZES, kept=0.5, seed=2)
    q, k, _ = inputs(torch.float32)
    expected = q.double()[:, :, :1] @ k.double().mT
    errors = {}
    for name, mean in (("smooth", quantize.mean_key(k)), ("plain", torch.zeros(2, 1, 64))):
        values, scales = quantize.quantize_keys(k, mean, blocks)
        rounded = torch.empty_like(k)
        rounded[:, blocks.order] = values * scales.mT[..., None]
        scores = q.double()[:, :, :1] @ (rounded + mean[:, None]).double().mT
        errors[name] = float((scores - expected).norm() / (q[:, :, :1] @ (k - 40).mT).norm())
    assert 8 * errors["smooth"] < errors["plain"]


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_emulation_errs_by_the_rounding_of_scores(dtype: torch.dtype, hidden: bool) -> None:
    blocks = random_blocks(SIZES, kept=0.5, heads=[0, 1], seed=3)
    q, k, v = inputs(dtype)
    key_mask = padding() if hidden else None
    expected, expected_lse = exact((q, k, v), blocks, key_mask)
    if key_mask is not None:
        k = k.masked_fill(~key_mask[:, :, None, None], 1e4)  # what hides may hold anything
    out, lse = block_sparse_attention(
        q, k, v, blocks, scale=0.125, key_mask=key_mask, return_lse=True, backend="torch-int8"
    )
    assert out.dtype == dtype
    blind = expected_lse.isinf()
    assert blind.any() and torch.equal(lse.isinf(), blind) and not out[blind].any()
    assert (out.double() - expected).norm() <= 1.5e-2 * expected.norm()
    off = (lse.double() - expected_lse)[~blind].abs()
    assert off.max() <= score_bound(*inputs(dtype)[:2], blocks)[~blind].max()
    assert off.mean() <= 3e-3


def test_grouped_queries_get_the_mean_of_their_own_key_head() -> None:
    blocks = random_blocks(SIZES, kept=0.5, seed=3)
    q, k, v = random_qkv(2, blocks.num_tokens, 4, 64, key_heads=2)
    k = k + torch.tensor([3.0, -2.0])[:, None]  # means far apart, or the wrong one would do
    mean = quantize.mean_key(k)
    expected_mean = torch.stack(
        [(q[:, :, h] * mean[:, None, h // 2]).sum(-1) * 0.125 for h in range(4)], -1
    )
    torch.testing.assert_close(quantize.mean_score(q, mean, 0.125), expected_mean)
    expected, expected_lse = exact((q, k, v), blocks, None)
    out, lse = block_sparse_attention(
        q, k, v, blocks, scale=0.125, return_lse=True, backend="torch-int8"
    )
    blind = expected_lse.isinf()
    assert (out.double() - expected).norm() <= 2e-2 * expected.norm()
    assert (lse.double() - expected_lse)[~blind].abs().max() < 0.1


def test_what_cannot_be_computed_in_8_bits_is_refused() -> None:
    blocks = random_blocks([8, 8])
    q, k, v = random_qkv(1, 16, 1, 32)
    with pytest.raises(RuntimeError, match=r"triton-int8.*GPU"):
        block_sparse_attention(q, k, v, blocks, backend="triton-int8")
    with pytest.raises(RuntimeError, match="no gradients"):
        block_sparse_attention(q.requires_grad_(), k, v, blocks, backend="torch-int8")


def test_a_patched_pipeline_says_that_scores_were_in_8_bits() -> None:
    model = wan()
    options = {"window": (-1, 1, 2), "dense_steps": 0}
    with diffpatch.patched(model.pipe, "window", **options, backend="torch"):
        full = model.run()
    with diffpatch.patched(model.pipe, "window", **options, backend="torch-int8"):
        rounded = model.run()
        assert set(diffpatch.report(model.pipe).backends) == {"torch-int8"}
    assert 0 < (rounded - full).abs().mean() < 0.01
    asked = diffpatch.patched(model.pipe, "window", **options, backend="triton-int8")
    with asked, pytest.raises(BackendUnavailable, match="triton needs a GPU and q is on the cpu"):
        model.run()


@pytest.mark.parametrize("size", [64, 72])
@pytest.mark.parametrize("hidden", [False, True])
def test_the_kernel_rounds_keys_as_defined(size: int, hidden: bool) -> None:
    pytest.importorskip("triton")
    from diffpatch.kernels.block_sparse.int8.triton_keys import quantize_keys
    from tests.kernels.gpu.triton_interpreter import interpreted

    blocks = random_blocks(SIZES, seed=4)
    _, k, _ = inputs(size=size)
    key_mask = padding() if hidden else None
    mean = quantize.mean_key(k, key_mask)
    expected, expected_scales = quantize.quantize_keys(k, mean, blocks, key_mask)
    if key_mask is not None:
        k = k.masked_fill(~key_mask[:, :, None, None], torch.nan)
    with interpreted():
        values, scales = quantize_keys(k.mT.contiguous().mT, mean, blocks, key_mask)
    torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)
    assert ((values.int() - expected.int()).abs() <= 1).all()  # where a number is halfway
    assert (values != expected).float().mean() < 1e-3


@pytest.mark.parametrize(
    ("loads", "size", "hidden"),
    [("tma", 64, False), ("pointer", 72, True), ("tma", 128, True), ("pointer", 64, False)],
)
def test_the_kernel_computes_what_the_emulation_does(loads: str, size: int, hidden: bool) -> None:
    pytest.importorskip("triton")
    from diffpatch.kernels.block_sparse.gpu import triton_forward as block_sparse_triton
    from tests.kernels.gpu.triton_interpreter import interpreted

    blocks = random_blocks(SIZES, kept=0.5, heads=[0, 1], seed=5)
    tensors = inputs(size=size)
    key_mask = padding() if hidden else None
    with interpreted(), mock.patch.object(block_sparse_triton, "arch", lambda device: 90):
        out, lse = block_sparse_triton.attend_triton_int8(
            *tensors, blocks, 0.125, key_mask, True, loads=loads
        )
    emulated, emulated_lse = attend_torch_int8(*tensors, blocks, 0.125, key_mask, True)
    assert emulated_lse is not None
    expected, expected_lse = exact(tensors, blocks, key_mask)
    seen = ~expected_lse.isinf()
    assert torch.equal(~lse.isinf(), seen) and not out[~seen].any()
    torch.testing.assert_close(lse[seen], emulated_lse[seen], rtol=1e-5, atol=1e-4)
    assert (out.double() - emulated.double()).norm() <= 4e-3 * expected.norm()
    assert (out.double() - expected).norm() <= 1.5e-2 * expected.norm()
