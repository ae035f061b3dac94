"""The Triton kernel: interpreted against the definition, and compiled for absent GPUs."""

from __future__ import annotations

import mmap
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from diffpatch.kernels.block_sparse import reference as block_sparse_reference
from diffpatch.kernels.block_sparse.gpu import triton_backward as block_sparse_triton_backward
from diffpatch.kernels.block_sparse.gpu import triton_forward as block_sparse_triton
from diffpatch.kernels.block_sparse.gpu.lists import SubBlocks, sub_blocks
from diffpatch.kernels.block_sparse.reference import dense_mask
from diffpatch.kernels.blocks import BlockIndex
from tests.exactness import Tensors, assert_exact, exact, poisoned
from tests.kernels.gpu.pretend_gpu import pretend_gpu
from tests.kernels.gpu.triton_interpreter import interpreted
from tests.kernels.random_blocks import HARD_INPUTS, random_blocks, random_qkv

SIZES = [64, 64, 40, 64, 17]


def attend(
    inputs: Tensors,
    blocks: BlockIndex,
    key_mask: torch.Tensor | None = None,
    arch: int = 0,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel, interpreted, with outputs that are NaN unless it writes them."""
    scale = inputs[0].shape[-1] ** -0.5
    with (
        interpreted(),
        poisoned(),
        mock.patch.object(block_sparse_triton, "arch", lambda device: arch),
    ):
        return block_sparse_triton.attend_triton(*inputs, blocks, scale, key_mask, True, **options)


def assert_exact_enough(
    inputs: Tensors,
    blocks: BlockIndex,
    key_mask: torch.Tensor | None = None,
    arch: int = 0,
    **options: Any,
) -> None:
    assert_exact(attend(inputs, blocks, key_mask, arch, **options), inputs, blocks, key_mask)


@pytest.mark.parametrize("size", [32, 64, 72, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_head_size_and_dtype(size: int, dtype: torch.dtype) -> None:
    blocks = random_blocks(SIZES, kept=0.5, partial=0.5, seed=1)
    assert_exact_enough(random_qkv(1, sum(SIZES), 1, size, dtype), blocks)


@pytest.mark.parametrize("arch", [80, 90])  # pointers, descriptors
def test_the_largest_head_size(arch: int) -> None:
    blocks = random_blocks([64, 30], kept=1.0, partial=0.5, seed=1)
    assert_exact_enough(random_qkv(1, 94, 1, 256, torch.bfloat16), blocks, None, arch)


@pytest.mark.parametrize(
    ("sizes", "edge"),
    [
        ([128, 128, 72, 30], 128),  # short tiles, a short sub-block
        ([100, 100, 60], 100),  # no tile fills its sub-blocks
        ([150, 200], 200),  # more than a program holds
        ([1, 3, 2], 3),
        ([77], 128),
    ],
)
def test_tiles_of_any_size(sizes: list[int], edge: int) -> None:
    blocks = random_blocks(sizes, kept=0.8, partial=0.5, edge=edge, seed=2)
    assert_exact_enough(random_qkv(1, sum(sizes), 1, 32, torch.bfloat16), blocks)


@pytest.mark.parametrize("kept", [0.0, 0.15, 1.0])
@pytest.mark.parametrize("partial", [0.0, 1.0])
def test_empty_rows_and_full_ones(kept: float, partial: float) -> None:
    blocks = random_blocks(SIZES, kept=kept, partial=partial, seed=3)
    assert_exact_enough(random_qkv(1, sum(SIZES), 1, 32, torch.bfloat16), blocks)


def test_batches_patterns_of_heads_and_grouped_queries() -> None:
    blocks = random_blocks(SIZES, kept=0.4, heads=[1, 0, 0, 2], seed=4)
    assert_exact_enough(random_qkv(2, sum(SIZES), 4, 32, torch.bfloat16, key_heads=2), blocks)


@pytest.mark.parametrize("partial", [0.0, 0.5])
def test_key_masks(partial: float) -> None:
    blocks = random_blocks(SIZES, kept=0.6, partial=partial, seed=5)
    key_mask = torch.rand(2, sum(SIZES), generator=torch.Generator().manual_seed(0)) < 0.3
    key_mask[1] = False
    assert_exact_enough(random_qkv(2, sum(SIZES), 1, 32, torch.bfloat16), blocks, key_mask)


def test_strides_do_not_matter() -> None:
    blocks = random_blocks(SIZES, kept=0.6, seed=6)
    blocks = BlockIndex(**{**vars_of(blocks), "order": torch.arange(sum(SIZES))})
    q, k, v = random_qkv(1, sum(SIZES), 2, 32, torch.bfloat16)
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    by_channel = [x.mT.contiguous().mT for x in (q, k, v)]
    expected, _ = attend((q, k, v), blocks)
    for query, key, value in (by_head, by_channel, torch.cat([q, k, v], -1).split(32, -1)):
        assert torch.equal(attend((query, key, value), blocks)[0], expected)


# What may be asked of the kernel instead of what it does by itself: (compute capability, options).
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "pointer": (90, {"loads": "pointer"}),
    "tma": (90, {"loads": "tma"}),
    "gather": (80, {"loads": "gather"}),
    "specialized": (100, {"specialize": True}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("hidden", [False, True])
def test_every_way_to_read_keys_gives_the_same(way: str, hidden: bool) -> None:
    arch, options = WAYS[way]
    blocks = random_blocks([128, 70, 30], kept=0.6, heads=[1, 0, 1, 0], seed=4)
    key_mask = torch.rand(2, 228, generator=torch.Generator().manual_seed(0)) < 0.5
    inputs = random_qkv(2, 228, 4, 128, torch.bfloat16, key_heads=2)
    assert_exact_enough(inputs, blocks, key_mask if hidden else None, arch, **options)


def test_boxes_of_memory_lie_in_the_tensors_of_the_caller() -> None:
    """Descriptors copy nothing where tile order is sequence order, unless they have to."""
    blocks = random_blocks(SIZES, kept=0.6, seed=6)
    blocks = BlockIndex(**{**vars_of(blocks), "order": torch.arange(sum(SIZES))})
    fused = torch.cat(random_qkv(2, sum(SIZES), 2, 64, torch.bfloat16), 2)
    q, k, v = fused.split(2, 2)
    boxes = [block_sparse_triton.side_by_side(x) for x in (k, v)]
    assert [box.data_ptr() for box in boxes] == [k.data_ptr(), v.data_ptr()]
    assert [box.stride() for box in boxes] == [(384, 1), (384, 1)]
    assert_exact_enough((q, k, v), blocks, None, 90)
    for awkward in (k.mT.contiguous().mT, k[:, :, :1].expand_as(k), fused.flatten()[1:]):
        if awkward.ndim == 1:  # rows that begin 2 bytes after a multiple of 16
            awkward = awkward[: k.numel()].view_as(k)
        box = block_sparse_triton.side_by_side(awkward)
        assert box.data_ptr() != awkward.data_ptr()
        assert torch.equal(box.view_as(awkward), awkward)


@pytest.mark.parametrize("loads", ["pointer", "tma", "gather", "int8"])
def test_tensors_of_more_than_two_billion_numbers(loads: str) -> None:
    """Tokens so far apart that offsets do not fit in 32 bits; memory is reserved, hardly used."""
    tokens, apart = 160, 2**24 - 64
    blocks = random_blocks([64, 66, 30], kept=1.0, partial=0.3, seed=2)
    if loads != "gather":
        blocks = BlockIndex(**{**vars_of(blocks), "order": torch.arange(tokens)})
    reserve = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000}  # MAP_NORESERVE
    memory = mmap.mmap(-1, 2 * tokens * apart, **reserve)
    space = torch.frombuffer(memory, dtype=torch.bfloat16)
    near = random_qkv(1, tokens, 1, 64, torch.bfloat16)
    far = [space.as_strided(x.shape, (1, apart, 64, 1), 64 * i) for i, x in enumerate(near)]
    for x, y in zip(far, near, strict=True):
        x.copy_(y)
    q, k, v = far
    if loads == "int8":
        with interpreted():
            out, _ = block_sparse_triton.attend_triton_int8(q, k, v, blocks, 0.125, None, True)
            expected, _ = block_sparse_triton.attend_triton_int8(*near, blocks, 0.125, None, True)
    else:
        out, _ = attend((q, k, v), blocks, None, 90, loads=loads)
        expected, _ = attend(near, blocks, None, 90, loads=loads)
    assert torch.equal(out, expected)


def test_loads_are_chosen_by_what_the_gpu_has() -> None:
    def chosen(dtype: torch.dtype, size: int, arch: int, **options: Any) -> str:
        return block_sparse_triton.configuration(dtype, size, 128, arch, **options).loads

    assert [chosen(torch.bfloat16, 128, arch) for arch in (0, 80, 89)] == ["pointer"] * 3
    assert [chosen(torch.float16, 64, arch) for arch in (90, 100, 103, 120)] == ["tma"] * 4
    assert chosen(torch.bfloat16, 96, 90) == chosen(torch.float32, 128, 90) == "pointer"
    assert chosen(torch.bfloat16, 128, 90, loads="pointer") == "pointer"
    for arch, options, message in (
        (80, {"loads": "tma"}, "compute capability 9.0"),
        (90, {"loads": "best"}, "loads is 'best'"),
        (90, {"specialize": True}, "10.0 or 10.3"),
        (100, {"specialize": True, "int8": True}, "8-bit"),
    ):
        with pytest.raises(ValueError, match=message):
            chosen(torch.bfloat16, 128, arch, **options)


def vars_of(blocks: BlockIndex) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(blocks).items() if not name.startswith("_")}


def test_two_runs_agree_to_the_bit() -> None:
    blocks = random_blocks(SIZES, kept=0.6, seed=7)
    inputs = random_qkv(1, sum(SIZES), 1, 64, torch.bfloat16)
    for one, other in zip(attend(inputs, blocks), attend(inputs, blocks), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hard", HARD_INPUTS)
def test_error_is_at_most_half_above_that_of_dense_attention(dtype: torch.dtype, hard: str) -> None:
    blocks = random_blocks([64, 64, 64], kept=0.8, partial=0.3, seed=8)
    q, k, v = random_qkv(1, 192, 1, 64, dtype)
    inputs = (*HARD_INPUTS[hard](q, k), v)
    expected, _ = exact(inputs, blocks)
    mask = dense_mask(blocks)[0]
    seen = mask.any(-1)
    qh, kh, vh = (x.transpose(1, 2) for x in inputs)
    dense = F.scaled_dot_product_attention(qh[:, :, seen], kh, vh, attn_mask=mask[seen])
    bound = (dense.transpose(1, 2).double() - expected[:, seen]).norm()
    assert (attend(inputs, blocks)[0].double() - expected).norm() <= 1.5 * bound


def visited(blocks: BlockIndex, lists: SubBlocks, block_m: int, block_n: int) -> torch.Tensor:
    """The pairs that the lists make the kernel attend to, (P, S, S) in tile order."""
    tiles, tokens = blocks.num_tiles, blocks.num_tokens
    starts = blocks.starts.tolist()
    pairs = torch.zeros(blocks.num_patterns, tokens, tokens, dtype=torch.int64)
    for row in range(blocks.num_patterns * tiles):
        first, size = starts[row % tiles], starts[row % tiles + 1] - starts[row % tiles]
        for entry in range(int(lists.row_ptr[row]), int(lists.row_ptr[row + 1])):
            place = int(lists.places[entry])
            seen = torch.ones(lists.parts * block_m, block_n, dtype=torch.bool)
            if entry >= lists.full_end[row]:
                words = lists.bits[int(lists.mask_ids[entry])]
                seen = (words[:, :, None] >> torch.arange(32) & 1).bool().flatten(1)
            width = min(block_n, tokens - place)
            assert not seen[:, width:].any()
            pairs[row // tiles, first : first + size, place : place + width] += seen[:size, :width]
    assert pairs.max() <= 1
    return pairs.bool()


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 100), min_size=1, max_size=5),
    kept=st.sampled_from([0.0, 0.3, 1.0]),
    partial=st.sampled_from([0.0, 0.5, 1.0]),
    block=st.sampled_from([(128, 64), (64, 64), (16, 32)]),
    seed=st.integers(0, 1000),
)
def test_the_lists_visit_every_kept_pair_once(
    sizes: list[int], kept: float, partial: float, block: tuple[int, int], seed: int
) -> None:
    blocks = random_blocks(sizes, kept=kept, partial=partial, heads=[0, 1], edge=100, seed=seed)
    expected = dense_mask(blocks)[:, blocks.order][:, :, blocks.order]
    lists = sub_blocks(blocks, *block)
    assert torch.equal(visited(blocks, lists, *block), expected)
    tiles = blocks.num_tiles
    for pattern in lists.schedule.view(2, -1):
        assert sorted(pattern.tolist()) == list(range(tiles))


def test_long_rows_are_launched_first() -> None:
    blocks = random_blocks([8] * 12, kept=0.1, partial=0.0, seed=1)
    lengths = sub_blocks(blocks, 16, 32).row_ptr.diff()
    schedule = sub_blocks(blocks, 16, 32).schedule.long()
    heavy = lengths[schedule] > 2 * lengths.float().mean()
    assert heavy.any() and heavy.int().diff().max() <= 0


@pytest.mark.parametrize(("size", "dtype"), [(32, torch.float32), (72, torch.bfloat16)])
def test_gradients(size: int, dtype: torch.dtype) -> None:
    blocks = random_blocks([33, 17], kept=0.7, heads=[0, 1], seed=3)
    generator = torch.Generator().manual_seed(0)
    key_mask = torch.rand(2, 50, generator=generator) < 0.7 if size == 32 else None
    toward = torch.randn(2, 50, 2, size, generator=generator)
    inputs = random_qkv(2, 50, 2, size, dtype, key_heads=1)
    q, k, v = (x.clone().requires_grad_() for x in inputs)
    with interpreted():
        results = block_sparse_triton_backward.attend_with_gradients(
            q, k, v, blocks, 0.2, key_mask, True
        )
        gradients = torch.autograd.grad(_loss(*results, toward), (q, k, v))
    q, k, v = (x.double().requires_grad_() for x in inputs)
    exact_results = block_sparse_reference.attend_reference(q, k, v, blocks, 0.2, key_mask, True)
    exact_gradients = torch.autograd.grad(_loss(*exact_results, toward), (q, k, v))
    tolerance = 1e-6 if dtype == torch.float32 else 5e-3
    for gradient, other in zip(gradients, exact_gradients, strict=True):
        assert gradient.dtype == dtype
        assert (gradient.double() - other).norm() <= tolerance * other.norm()


def _loss(out: torch.Tensor, lse: torch.Tensor | None, toward: torch.Tensor) -> torch.Tensor:
    assert lse is not None
    lse = lse.masked_fill(lse.isinf(), 0.0)
    return (out.double() * toward).sum() + (lse.double() * toward[..., 0]).sum()


def test_transposed_lists_hold_the_transposed_pairs() -> None:
    blocks = random_blocks(SIZES, kept=0.5, heads=[0, 1], seed=9)
    back = block_sparse_triton_backward.transposed(blocks)
    back.validate()
    assert torch.equal(dense_mask(back), dense_mask(blocks).mT)


def test_triton_refuses_what_it_cannot_do() -> None:
    blocks = random_blocks(SIZES)
    wide, narrow = torch.zeros(1, sum(SIZES), 1, 512), torch.zeros(1, sum(SIZES), 1, 64)
    assert "512" in str(block_sparse_triton.unsupported_reason(wide, blocks))
    assert "float64" in str(block_sparse_triton.unsupported_reason(narrow.double(), blocks))
    assert block_sparse_triton.unsupported_reason(narrow, blocks) is None
    assert block_sparse_triton_backward.unsupported_reason(narrow) is None
    assert "256" in str(block_sparse_triton_backward.unsupported_reason(torch.zeros(1, 1, 1, 256)))


@triton.jit
def _read(X: Any, OUT: Any, N: tl.constexpr) -> None:
    i = tl.arange(0, N)
    tl.store(OUT + i, tl.load(X + i))


def test_the_interpreter_sees_reads_out_of_bounds() -> None:
    x, out = torch.zeros(7), torch.zeros(8)
    with interpreted(), pytest.raises(InterpreterError, match="1 of 8 addresses of a load"):
        _read[(1,)](x, out, N=8)


def test_launches_as_it_would_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_sparse_triton, "arch", lambda device: 90)
    blocks = random_blocks([128, 100], edge=128, seed=1)
    q, k, v = (x.requires_grad_() for x in random_qkv(2, 228, 3, 64, torch.bfloat16))
    with pretend_gpu(90) as gpu:
        out, _ = block_sparse_triton_backward.attend_with_gradients(
            q, k, v, blocks, 0.125, None, True
        )
        torch.autograd.grad(out.sum(), (q, k, v))
    assert [(launch["name"], launch["grid"]) for launch in gpu.launches] == [
        ("attend_kernel", (2, 6, 1)),
        ("gradient_kernel", (4, 6, 1)),
        ("gradient_kernel", (4, 6, 1)),
    ]
