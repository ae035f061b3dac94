"""The reference and torch backends of block-sparse attention, and the checks at the entry."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from diffpatch.eval.bench.kernels import rivals as bench_rivals
from diffpatch.kernels.block_sparse.api import block_sparse_attention
from diffpatch.kernels.block_sparse.backends import unsupported_reason
from diffpatch.kernels.block_sparse.reference import dense_mask
from diffpatch.kernels.block_sparse.torch_plan import grouping as block_sparse_grouping
from diffpatch.kernels.block_sparse.torch_plan import views as block_sparse_views
from diffpatch.kernels.block_sparse.torch_plan.calls import plans
from diffpatch.kernels.blocks import BlockIndex
from tests.kernels.random_blocks import HARD_INPUTS, random_blocks, random_qkv

SIZES = [37, 64, 20, 64, 64, 5, 64, 33]


@pytest.fixture(params=["unions", "one unit a call", "common calls", "unions of tiles", "tiles"])
def costs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small cases would all unite in one masked call; the other forms make many calls."""
    if "tiles" in request.param:
        monkeypatch.setattr(block_sparse_views, "MAX_KINDS", 0)
    if "unions" in request.param:
        return
    for name in ("KEY_COST", "CALL_COST"):
        monkeypatch.setattr(block_sparse_grouping, name, 0.0)
    monkeypatch.setattr(block_sparse_grouping, "LEAST_ROWS", 8)
    monkeypatch.setattr(block_sparse_grouping, "MASK_COST", 10.0)
    cost = 1e9 if request.param == "one unit a call" else -1e9
    monkeypatch.setattr(block_sparse_grouping, "MERGE_COST", cost)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small calls, where two threads cost more than they bring on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def attend(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return block_sparse_attention(*args, **options, return_lse=True)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def test_reference_is_attention_under_the_mask_of_the_blocks() -> None:
    blocks = random_blocks([3, 4, 2], kept=0.7, seed=1)
    q, k, v = random_qkv(1, 9, 2, 8, torch.float64)
    starts, mask = blocks.starts.tolist(), torch.zeros(9, 9, dtype=torch.bool)
    for tile in range(3):
        for entry in range(int(blocks.row_ptr[tile]), int(blocks.row_ptr[tile + 1])):
            key, kind = int(blocks.cols[entry]), int(blocks.mask_ids[entry])
            for i in range(starts[tile + 1] - starts[tile]):
                for j in range(starts[key + 1] - starts[key]):
                    kept = kind < 0 or bool(blocks.masks[kind, i, j])
                    mask[blocks.order[starts[tile] + i], blocks.order[starts[key] + j]] = kept
    assert torch.equal(dense_mask(blocks)[0], mask)
    out = block_sparse_attention(q, k, v, blocks, backend="reference")
    seen = mask.any(-1)
    assert 0 < seen.sum() < 9
    qh, kh, vh = (x.transpose(1, 2)[:, :, :] for x in (q, k, v))
    expected = F.scaled_dot_product_attention(qh[:, :, seen], kh, vh, attn_mask=mask[seen])
    torch.testing.assert_close(out[:, seen], expected.transpose(1, 2))
    assert not out[:, ~seen].any()


@pytest.mark.usefixtures("costs")
@pytest.mark.parametrize("heads", [None, [0, 1, 2, 1, 0, 2]])
@pytest.mark.parametrize("partial", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("with_key_mask", [False, True])
def test_torch_equals_the_reference(
    heads: list[int] | None, partial: float, with_key_mask: bool
) -> None:
    blocks = random_blocks(SIZES, partial=partial, kept=0.4, edge=70, heads=heads, seed=3)
    q, k, v = random_qkv(2, sum(SIZES), 6, 40, torch.float64, key_heads=3)
    key_mask = torch.rand(2, sum(SIZES)) < 0.3 if with_key_mask else None
    expected, expected_lse = attend(q, k, v, blocks, key_mask=key_mask, backend="reference")
    out, lse = attend(q, k, v, blocks, key_mask=key_mask, backend="torch")
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    alone = block_sparse_attention(q, k, v, blocks, key_mask=key_mask, backend="torch")
    torch.testing.assert_close(alone, expected)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 24), min_size=1, max_size=8),
    kept=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    partial=st.sampled_from([0.0, 0.5, 1.0]),
    patterns=st.integers(1, 2),
    seed=st.integers(0, 1000),
)
def test_torch_equals_the_reference_on_any_blocks(
    sizes: list[int], kept: float, partial: float, patterns: int, seed: int
) -> None:
    heads = None if patterns == 1 else [1, 0]
    blocks = random_blocks(sizes, kept=kept, partial=partial, heads=heads, edge=24, seed=seed)
    q, k, v = random_qkv(1, sum(sizes), 2, 16, torch.float64, seed=seed)
    expected, expected_lse = attend(q, k, v, blocks, backend="reference")
    out, lse = attend(q, k, v, blocks, backend="torch")
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("size", [32, 64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", HARD_INPUTS)
def test_error_is_that_of_dense_attention(size: int, dtype: torch.dtype, inputs: str) -> None:
    blocks = random_blocks(SIZES, kept=0.6, partial=0.3, seed=5)
    q, k, v = random_qkv(1, sum(SIZES), 2, size, dtype)
    q, k = HARD_INPUTS[inputs](q, k)
    exact, exact_lse = attend(q.double(), k.double(), v.double(), blocks, backend="reference")
    mask = dense_mask(blocks)[0]
    seen = mask.any(-1)
    qh, kh, vh = (x.transpose(1, 2) for x in (q, k, v))
    dense = F.scaled_dot_product_attention(qh[:, :, seen], kh, vh, attn_mask=mask[seen])
    bound = 1.5 * error(dense.transpose(1, 2), exact[:, seen])
    for backend in ("torch", "reference"):
        out, lse = attend(q, k, v, blocks, backend=backend)
        assert out.dtype == dtype and lse.dtype == torch.float32
        assert error(out[:, seen], exact[:, seen]) <= bound + 1e-7
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_16_bits_go_through_scores_in_fp32(dtype: torch.dtype) -> None:
    """Where SDPA returns no log-sum-exp, attention is written out, with a softmax in fp32."""
    blocks = random_blocks([12, 8, 20], kept=0.7, seed=1)
    q, k, v = (x.requires_grad_() for x in random_qkv(1, 40, 2, 16, dtype, seed=2))
    scale = 2.0  # scores far apart and far from 0, which 16 bits hold to 1 in 100 only
    out, lse = block_sparse_attention(
        q, k, v, blocks, scale=scale, return_lse=True, backend="torch"
    )
    x, y, z = (x.detach().double().requires_grad_() for x in (q, k, v))
    expected, expected_lse = block_sparse_attention(
        x, y, z, blocks, scale=scale, return_lse=True, backend="reference"
    )
    blind = expected_lse.isinf()
    assert lse.dtype == torch.float32 and torch.equal(lse.isinf(), blind)
    # The products that scores are made of are rounded once, to half a unit in the last place.
    step = torch.finfo(dtype).eps * (expected_lse[~blind].abs() + scale)
    assert ((lse.double() - expected_lse)[~blind].abs() <= step).all()
    assert (out.double() - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm()
    for results in ((out, lse), (expected, expected_lse)):
        (results[0].sum() + results[1].masked_fill(blind, 0.0).sum()).backward()
    for near, exactly in zip((q, k, v), (x, y, z), strict=True):
        assert near.grad is not None and exactly.grad is not None and near.grad.isfinite().all()
        off = (near.grad.double() - exactly.grad).norm()
        assert off <= 8 * torch.finfo(dtype).eps * exactly.grad.norm()


@pytest.mark.usefixtures("costs")
@pytest.mark.parametrize("return_lse", [False, True])
def test_gradients_of_torch_equal_those_of_the_reference(return_lse: bool) -> None:
    blocks = random_blocks(SIZES, kept=0.4, heads=[0, 1], seed=7)
    gradients = []
    for backend in ("reference", "torch"):
        inputs = [x.requires_grad_() for x in random_qkv(1, sum(SIZES), 2, 16, torch.float64)]
        out, lse = attend(*inputs, blocks, backend=backend)
        loss = out.square().sum()
        if return_lse:
            loss = loss + lse.masked_fill(lse.isinf(), 0.0).square().sum()
        gradients.append(torch.autograd.grad(loss, inputs))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_strides_and_scale_do_not_matter() -> None:
    blocks = random_blocks(SIZES, kept=0.5, seed=9)
    q, k, v = random_qkv(2, sum(SIZES), 2, 32)
    expected = block_sparse_attention(q, k, v, blocks, scale=0.3, backend="reference")
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    fused = torch.cat([q, k, v], -1)
    for query, key, value in (by_head, fused.split(32, -1)):
        out = block_sparse_attention(query, key, value, blocks, scale=0.3, backend="torch")
        torch.testing.assert_close(out, expected)


def test_runs_are_equal_bit_for_bit() -> None:
    blocks = random_blocks(SIZES, kept=0.5, seed=9)
    q, k, v = random_qkv(1, sum(SIZES), 2, 32)
    first = block_sparse_attention(q, k, v, blocks, backend="torch")
    assert torch.equal(first, block_sparse_attention(q, k, v, blocks, backend="torch"))


def windows(tiles: int, edge: int, width: int, shared: int) -> BlockIndex:
    """Every `shared` neighbouring query tiles see the same `width` key tiles around them."""
    lists = []
    for tile in range(tiles):
        middle = tile // shared * shared + shared // 2
        first = min(max(middle - width // 2, 0), tiles - width)
        lists.append(torch.arange(first, first + width, dtype=torch.int32))
    cols = torch.cat(lists)
    row_ptr = torch.arange(tiles + 1, dtype=torch.int32) * width
    return BlockIndex(
        order=torch.arange(tiles * edge),
        starts=torch.arange(tiles + 1, dtype=torch.int32) * edge,
        row_ptr=row_ptr,
        full_end=row_ptr[1:],
        cols=cols,
        mask_ids=torch.full_like(cols, -1),
        masks=torch.zeros(0, edge, edge, dtype=torch.bool),
    )


def test_tiles_with_equal_keys_are_attended_without_a_mask() -> None:
    blocks = windows(tiles=32, edge=128, width=8, shared=4)
    (plan,) = plans(blocks)
    assert all(call.mask is None for call in plan.calls)
    assert sum(call.stack * call.rows * call.num_keys for call in plan.calls) == 32 * 8 * 128**2


def test_keys_that_a_group_does_not_see_are_left_out() -> None:
    mask = torch.zeros(1, 128, 128, dtype=torch.bool)
    mask[:, :, 40:70] = True
    blocks = dataclasses.replace(
        windows(tiles=8, edge=128, width=2, shared=8),
        full_end=torch.arange(8, dtype=torch.int32) * 2,
        mask_ids=torch.zeros(16, dtype=torch.int32),
        masks=mask,
    )
    blocks.validate()
    (plan,) = plans(blocks)
    assert [(call.rows, call.num_keys, call.mask) for call in plan.calls] == [(1024, 60, None)]


def test_a_sliding_window_is_attended_in_few_calls_over_few_more_keys() -> None:
    blocks = windows(tiles=64, edge=128, width=16, shared=1)
    (plan,) = plans(blocks)
    pairs = sum(call.stack * call.rows * call.num_keys for call in plan.calls)
    assert len(plan.calls) <= 20
    assert pairs <= 1.4 * 64 * 16 * 128**2


def test_keys_that_several_tiles_see_are_attended_together_and_the_rest_apart() -> None:
    blocks = windows(tiles=64, edge=128, width=16, shared=1)
    (plan,) = plans(blocks, merging=True)
    pairs = sum(call.stack * call.rows * call.num_keys for call in plan.calls)
    assert any(band.common is not None for band in plan.bands)
    assert pairs == 64 * 16 * 128**2 and all(call.mask is None for call in plan.calls)
    q, k, v = random_qkv(1, blocks.num_tokens, 1, 16)
    expected, expected_lse = attend(q, k, v, blocks, backend="reference")
    out, lse = attend(q, k, v, blocks, backend="torch")
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_no_tensor_grows_with_the_square_of_the_tokens() -> None:
    blocks = windows(tiles=256, edge=128, width=4, shared=4)
    q, k, v = random_qkv(1, blocks.num_tokens, 1, 32)
    with torch.profiler.profile(profile_memory=True) as profile:
        block_sparse_attention(q, k, v, blocks, backend="torch")
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 32 * q.nbytes < blocks.num_tokens**2


def test_the_plan_and_the_masks_are_made_once() -> None:
    blocks = random_blocks(SIZES, seed=2)
    q, k, v = random_qkv(1, sum(SIZES), 2, 32)
    block_sparse_attention(q, k, v, blocks, backend="torch")
    made = dict(blocks._memo._made)
    block_sparse_attention(q, k, v, blocks, backend="torch")
    assert all(blocks._memo._made[key] is value for key, value in made.items())
    assert len(blocks._memo._made) == len(made)


@pytest.mark.parametrize("sizes", [[128, 128, 128], SIZES, [100, 126, 30, 126, 7, 60]])
def test_flex_attention_is_given_the_same_pairs(sizes: list[int]) -> None:
    blocks = random_blocks(sizes, kept=0.8, partial=0.3, seed=4)
    q, k, v = random_qkv(1, sum(sizes), 1, 16)
    found = bench_rivals.flex_call((q, k, v), blocks, compiled=False)()
    torch.testing.assert_close(found, block_sparse_attention(q, k, v, blocks, backend="reference"))
    every = bench_rivals.flex_mask(random_blocks(sizes, kept=1.0, partial=0.0))
    count = -(-sum(sizes) // 128)
    assert int(every.full_kv_num_blocks.sum()) == count**2 and not every.kv_num_blocks.any()


def test_auto_runs_on_the_cpu_and_triton_says_why_it_cannot() -> None:
    blocks = random_blocks(SIZES)
    q, k, v = random_qkv(1, sum(SIZES), 2, 32)
    assert unsupported_reason(q, blocks, "auto") is None
    reason = unsupported_reason(q, blocks, "triton")
    assert reason is not None
    with pytest.raises(RuntimeError, match=reason):
        block_sparse_attention(q, k, v, blocks, backend="triton")
    out = block_sparse_attention(q, k, v, blocks)
    assert torch.equal(out, block_sparse_attention(q, k, v, blocks, backend="torch"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 351, 32)}, "q has shape"),
        ({"q": torch.zeros(1, 351, 2, 32).int()}, "q is torch.int32"),
        ({"k": torch.zeros(1, 351, 2, 16)}, "k has shape"),
        ({"v": torch.zeros(1, 351, 1, 32)}, "v has shape"),
        ({"v": torch.zeros(1, 351, 2, 32).half()}, "v is torch.float16"),
        ({"blocks": random_blocks([350])}, "blocks covers 350"),
        ({"blocks": random_blocks(SIZES, heads=[0, 1, 0])}, "head_pattern names 3"),
        ({"key_mask": torch.ones(1, 351)}, "key_mask is torch.float32"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
        ({"scale": 0.0}, "scale is 0.0"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    q, k, v = random_qkv(1, sum(SIZES), 2, 32)
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v, "blocks": random_blocks(SIZES)} | change
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**arguments)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("order", torch.zeros(351, dtype=torch.int64), "permutation"),
        ("order", torch.arange(351).int(), "order is torch.int32"),
        ("starts", torch.tensor([0, 100, 200, 351]).int(), "multiple of the 3 tiles"),
        ("starts", torch.arange(9).int(), "from 0 to 8"),
        ("cols", torch.tensor([9]).int(), "mask_ids"),
        ("full_end", torch.zeros(8).int(), "full_end"),
        ("masks", torch.ones(30, 64, 64).bool(), "edge tile"),
        ("masks", torch.ones(0, 64, 64).bool(), "mask_ids"),
        ("masks", torch.ones(30, 32, 32).bool(), "expected 1 to 32"),
    ],
)
def test_a_broken_index_is_refused(name: str, value: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        broken: dict[str, Any] = {name: value}
        dataclasses.replace(random_blocks(SIZES), **broken).validate()
