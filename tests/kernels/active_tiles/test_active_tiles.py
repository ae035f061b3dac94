"""Attention over active tiles: torch and Triton (interpreted) against the definition in fp64."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from diffpatch import Dense, Neighborhood, TokenGrid
from diffpatch.kernels.active_tiles import api as active_tiles
from diffpatch.kernels.active_tiles import reference as active_tiles_reference
from diffpatch.kernels.active_tiles import torch_impl as active_tiles_torch
from diffpatch.kernels.active_tiles import torch_rows
from diffpatch.kernels.active_tiles.api import tile_table
from diffpatch.kernels.block_sparse.api import block_sparse_attention
from diffpatch.kernels.blocks import BlockIndex
from tests.exactness import poisoned
from tests.kernels.random_blocks import random_blocks, random_qkv

SIZES = [5, 8, 3, 8, 7]
LARGER = [64, 40, 17, 64, 33]
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def some(blocks: BlockIndex, heads: int, seed: int = 1, strip: int = 0) -> torch.Tensor:
    """bool (2, heads, E): about 60 % of the pairs, some rows without any."""
    table, random = tile_table(blocks, strip), torch.Generator().manual_seed(seed)
    drawn = torch.rand(2, heads, table.length, generator=random) < 0.6
    row_drawn = torch.rand(2, heads, blocks.num_tiles, generator=random) < 0.9
    rows = table.query[table.pattern.expand(heads)].expand_as(drawn)
    return drawn & row_drawn.gather(2, rows) & table.valid()


def half_of(tokens: int) -> torch.Tensor:
    """bool (2, tokens): keys that may be attended to."""
    return torch.rand(2, tokens, generator=torch.Generator().manual_seed(2)) < 0.6


def uneven(inputs: Tensors, blocks: BlockIndex) -> Tensors:
    """The same with small keys in every second tile, which then are below most that came before."""
    q, k, v = inputs
    sizes = blocks.starts.diff().long()
    small = (torch.arange(len(sizes)) % 2 == 1).repeat_interleave(sizes)
    factor = torch.ones(k.shape[1]).index_fill(0, blocks.order[small], 0.02)
    return q, k * factor.to(k.dtype)[:, None, None], v


@pytest.mark.parametrize("heads", [None, [0, 1, 0, 2]])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_torch_path_is_the_definition(
    heads: list[int] | None, masked: bool, reverse: bool
) -> None:
    blocks = random_blocks(SIZES, kept=0.7, heads=heads, seed=3)
    q, k, v = uneven(random_qkv(2, sum(SIZES), 4, 8, torch.float64, key_heads=2), blocks)
    active = some(blocks, 4)
    key_mask = half_of(sum(SIZES)) if masked else None
    arguments = (blocks, active, 1.5, key_mask, -0.5, reverse)
    with poisoned():
        out, lse, hits = active_tiles_torch.attend(q, k, v, *arguments)
    expected, expected_lse, found = active_tiles_reference.attend(q, k, v, *arguments)
    assert hits is not None and found is not None
    assert torch.allclose(out, expected, atol=1e-12)
    assert torch.allclose(lse, expected_lse, atol=1e-12)
    assert torch.equal(hits, found) and 0 < found.sum() < active.sum()


@pytest.mark.parametrize("heads", [None, [0, 1, 0, 2]])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("strip", [0, 3])
def test_rows_of_any_head_are_the_definition(
    heads: list[int] | None, masked: bool, strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = random_blocks(SIZES, kept=0.7, heads=heads, seed=3)
    q, k, v = random_qkv(2, sum(SIZES), 4, 8, torch.float64, key_heads=2)
    key_mask = half_of(sum(SIZES)) if masked else None
    arguments = (blocks, some(blocks, 4, strip=strip), 1.5, key_mask, None, False, strip)
    expected, expected_lse, _ = active_tiles_reference.attend(q, k, v, *arguments)
    for gathered in (torch_rows.GATHERED, 1):
        monkeypatch.setattr(torch_rows, "GATHERED", gathered)
        with poisoned():
            out, lse, hits = active_tiles_torch.attend(q, k, v, *arguments)
        assert hits is None
        assert torch.allclose(out, expected, atol=1e-12)
        assert torch.allclose(lse, expected_lse, atol=1e-12)
        assert torch.equal(lse.isinf(), expected_lse.isinf()) and lse.isinf().any()


def test_strips_are_hit_one_by_one() -> None:
    blocks = random_blocks(SIZES, kept=0.7, heads=[0, 1], seed=3)
    q, k, v = uneven(random_qkv(2, sum(SIZES), 2, 8, torch.float64), blocks)
    active = some(blocks, 2, strip=3)
    arguments = (blocks, active, 1.5, None, -0.5, True, 3)
    out, lse, hits = active_tiles_torch.attend(q, k, v, *arguments)
    expected, expected_lse, found = active_tiles_reference.attend(q, k, v, *arguments)
    assert hits is not None and found is not None and 0 < found.sum() < active.sum()
    assert torch.equal(hits, found)
    assert torch.allclose(out, expected, atol=1e-12)
    assert torch.allclose(lse, expected_lse, atol=1e-12)


def test_all_strips_of_all_tiles_are_block_sparse_attention() -> None:
    blocks = random_blocks(SIZES, kept=0.7, heads=[0, 1], seed=3)
    inputs = random_qkv(2, sum(SIZES), 2, 8)
    expected, expected_lse = block_sparse_attention(
        *inputs, blocks, return_lse=True, backend="reference"
    )
    out, lse, _ = active_tiles.attend(*inputs, blocks, strip=2, backend="torch")
    assert torch.allclose(out, expected, atol=1e-5)
    assert torch.allclose(lse, expected_lse, atol=1e-5)
    everything = tile_table(blocks, 2).valid().expand(2, 2, -1)
    table = tile_table(blocks)
    pairs = table.area[table.pattern].sum() / (2 * sum(SIZES) ** 2)
    assert float(active_tiles.kept(blocks, everything, 2)) == pytest.approx(float(pairs))


def test_maps_and_flags_are_each_other() -> None:
    for heads in (None, [0, 1, 1]):
        table = tile_table(random_blocks(SIZES, kept=0.5, heads=heads, seed=1), 3)
        flags = (torch.rand(2, 3, table.length) < 0.5) & table.valid()
        assert torch.equal(table.flags(table.map(flags)) & table.valid(), flags)
        assert not table.complete
    whole = tile_table(Dense(tile=16).pattern(TokenGrid(3, 5, 7, text_before=2)).blocks, 8)
    flags = torch.rand(2, 3, whole.length) < 0.5
    assert whole.complete and torch.equal(whole.flags(whole.map(flags)), flags)


def test_a_table_of_all_pairs_is_counted_out_without_sorting_them() -> None:
    blocks = Dense(tile=16).pattern(TokenGrid(3, 5, 7, text_before=2)).blocks
    table = tile_table(blocks, 6)
    tile_of, first = table.strips.tile.tolist(), table.strips.first.tolist()
    expected = [
        (i, j, -1, int(blocks.sizes[i]) * (first[j + 1] - first[j]))
        for i in range(blocks.num_tiles)
        for j in range(len(tile_of))
    ]
    assert table.plain and table.length == len(expected) and bool(table.valid().all())
    found = zip(*(x[0].tolist() for x in table.pairs), strict=True)
    assert list(found) == expected
    assert table.row_ptr.tolist() == [[n * len(tile_of) for n in range(blocks.num_tiles + 1)]]
    assert table.sizes.tolist() == blocks.sizes.tolist()
    partial = random_blocks(SIZES, kept=1.0, seed=1)
    assert not tile_table(partial).plain or not len(partial.masks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_active_is_block_sparse_attention(dtype: torch.dtype) -> None:
    blocks = random_blocks(SIZES, kept=0.7, heads=[0, 1], seed=3)
    q, k, v = random_qkv(2, sum(SIZES), 2, 8, dtype)
    out, _, hits = active_tiles.attend(q, k, v, blocks, backend="torch")
    expected = block_sparse_attention(
        q.double(), k.double(), v.double(), blocks, backend="reference"
    )
    assert hits is None and out.dtype == dtype
    assert (out - expected).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2)


def test_heads_with_few_scores_at_a_time_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = random_blocks(SIZES, kept=0.7, seed=5)
    inputs = random_qkv(2, sum(SIZES), 4, 8)
    options: dict[str, Any] = {"threshold": -1.0, "backend": "torch"}
    expected = active_tiles.attend(*inputs, blocks, **options).out
    monkeypatch.setattr(active_tiles_torch, "MAX_SCORES", 1)
    assert torch.allclose(active_tiles.attend(*inputs, blocks, **options).out, expected)


def test_gradients_go_through_the_torch_path() -> None:
    blocks = random_blocks(SIZES, kept=0.7, seed=6)
    q, k, v = (x.requires_grad_() for x in random_qkv(1, sum(SIZES), 2, 4, torch.float64))

    def gradients(backend: str) -> tuple[torch.Tensor, ...]:
        out = active_tiles.attend(q, k, v, blocks, backend=backend).out
        return torch.autograd.grad(out.square().sum(), (q, k, v))

    for a, b in zip(gradients("auto"), gradients("reference"), strict=True):
        assert torch.allclose(a, b, atol=1e-10)
    with pytest.raises(RuntimeError, match="no gradient"):
        gradients("triton")
    with pytest.raises(RuntimeError, match="no 8 bits for"):
        active_tiles.attend(q, k, v, blocks, backend="torch-int8")


@pytest.mark.parametrize("length", [1, 8, 13])
def test_bits_are_packed_and_unpacked(length: int) -> None:
    flags = torch.rand(2, 3, length, generator=torch.Generator().manual_seed(0)) < 0.5
    bits = active_tiles.pack(flags)
    assert bits.shape == (2, 3, -(-length // 8)) and bits.dtype == torch.uint8
    assert torch.equal(active_tiles.unpack(bits, length), flags)


def interpreted(
    inputs: Tensors, blocks: BlockIndex, active: torch.Tensor, *arguments: Any
) -> active_tiles.Result:
    """The Triton kernel, interpreted, with outputs that are NaN unless it writes them."""
    pytest.importorskip("triton")
    from diffpatch.kernels.active_tiles import triton_impl as active_tiles_triton
    from tests.kernels.gpu import triton_interpreter

    with (
        triton_interpreter.interpreted(),
        poisoned(),
        mock.patch.object(active_tiles_triton, "arch", lambda device: 90),
    ):
        return active_tiles_triton.attend(*inputs, blocks, active, *arguments)


def check_kernel(
    inputs: Tensors, blocks: BlockIndex, *, masked: bool = False, reverse: bool = False,
    strip: int = 0,
) -> None:  # fmt: skip
    q, k, v = inputs = uneven(inputs, blocks)
    active = some(blocks, q.shape[2], strip=strip)
    scale = 4 * q.shape[-1] ** -0.5
    rest = (scale, half_of(q.shape[1]) if masked else None)
    expected, expected_lse, found = active_tiles_reference.attend(
        q.double(), k.double(), v.double(), blocks, active, *rest, -0.5, reverse, strip
    )
    assert found is not None and 0 < found.sum() < active.sum()
    for threshold in (-0.5,) if masked else (-0.5, None):
        out, lse, hits = interpreted(inputs, blocks, active, *rest, threshold, reverse, strip)
        assert out.dtype == q.dtype
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}[q.dtype]
        assert (out.double() - expected).norm() <= tolerance * expected.norm()
        blind = expected.abs().sum(-1) == 0
        assert blind.any() and not out[blind].any()  # rows that see nothing
        assert torch.equal(lse.isinf(), expected_lse.isinf())
        assert torch.allclose(lse[~blind].double(), expected_lse[~blind], atol=2e-5)
        assert (hits is None) == (threshold is None)
        assert hits is None or torch.equal(hits, found)


@pytest.mark.parametrize(
    ("dtype", "size", "heads", "masked", "reverse"),
    [
        (torch.float32, 64, [0, 1, 0, 2], True, False),
        (torch.float32, 24, None, False, True),
        (torch.bfloat16, 128, [0, 1, 0, 2], False, True),
        (torch.float16, 72, None, True, True),
    ],
)
def test_the_kernel_is_the_definition(
    dtype: torch.dtype, size: int, heads: list[int] | None, masked: bool, reverse: bool
) -> None:
    blocks = random_blocks(LARGER, kept=0.7, heads=heads, seed=1)
    inputs = random_qkv(2, sum(LARGER), 4, size, dtype, key_heads=2)
    check_kernel(inputs, blocks, masked=masked, reverse=reverse)


def test_the_kernel_on_tiles_larger_than_a_program() -> None:
    blocks = random_blocks([200, 150, 256, 40], kept=0.8, seed=2)
    check_kernel(random_qkv(2, 646, 1, 64, torch.bfloat16), blocks)


@pytest.mark.parametrize(("dtype", "strip"), [(torch.bfloat16, 32), (torch.float32, 50)])
def test_the_kernel_on_strips_of_keys(dtype: torch.dtype, strip: int) -> None:
    blocks = random_blocks([128, 100, 41], kept=0.8, heads=[0, 1], seed=2)
    check_kernel(random_qkv(2, 269, 2, 64, dtype), blocks, strip=strip)


def test_the_kernel_on_an_odd_grid_with_text() -> None:
    grid = TokenGrid(5, 7, 9, text_before=11, text_after=3)
    blocks = Neighborhood(window=(3, 5, 5)).pattern(grid).blocks
    check_kernel(random_qkv(2, grid.num_tokens, 2, 32), blocks, reverse=True)


def test_the_table_of_everything_reads_no_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million tokens have a hundred million pairs of tiles."""
    whole = random_blocks([4, 3, 4], kept=2.0, partial=0.0)
    monkeypatch.setattr(BlockIndex, "rows", property(lambda _: pytest.fail("reads its lists")))
    table = tile_table(whole, 2)
    assert table.complete and table.length == 3 * 6
    with pytest.raises(pytest.fail.Exception, match="reads its lists"):
        tile_table(random_blocks([4, 3, 4], kept=0.5, partial=0.0), 2)


def test_heads_attend_together_while_they_are_alike_and_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(active_tiles_torch, "MAX_SCORES", 100)
    counts = [5, 1, 5, 0, 4, 5, 9, 30]
    found = list(active_tiles_torch._alike(counts, held=5))
    assert sorted(head for heads, _ in found for head in heads) == [0, 1, 2, 4, 5, 6, 7]
    for heads, most in found:
        assert most == max(counts[head] for head in heads)
        assert len(heads) == 1 or len(heads) * most * 5 <= 100
        assert all(counts[head] >= active_tiles_torch.ALIKE * most for head in heads)
    assert [len(heads) for heads, _ in found] == [1, 1, 4, 1]
