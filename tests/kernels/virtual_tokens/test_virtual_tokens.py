"""Virtual tokens beside chosen strips, by torch and Triton: against one softmax in fp64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from diffpatch import Dense, TokenGrid
from diffpatch.kernels.active_tiles import api as active_tiles
from diffpatch.kernels.active_tiles.table import tile_table
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.merge import merge
from diffpatch.kernels.virtual_tokens import api as virtual_tokens
from diffpatch.kernels.virtual_tokens.tokens import Missed
from tests.exactness import poisoned
from tests.kernels.random_blocks import random_qkv

GRID = TokenGrid(3, 5, 7, text_before=4)
TILE, STRIP, POOL = 24, 10, 4
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def index() -> BlockIndex:
    return Dense(tile=TILE).pattern(GRID).blocks


def chosen(blocks: BlockIndex, heads: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps bool (B, H, N, n): what is exact, and what is virtual; head 0 drops the rest, and some
    rows have neither."""
    table, random = tile_table(blocks, STRIP), torch.Generator().manual_seed(4)
    shape = (batch, heads, table.num_tiles, len(table.strips))
    active = torch.rand(shape, generator=random) < 0.4
    active[:, 0, 0] = False
    shown = ~active
    shown[:, 0] = False
    return active, shown


def by_formula(
    tensors: Tensors,
    blocks: BlockIndex,
    active: torch.Tensor,
    shown: torch.Tensor,
    scale: float,
    key_mask: torch.Tensor,
    only: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax over the keys of active strips and the pieces of strips shown, query by query.

    Of one token, where only that is wanted: all of them take seconds.
    """
    q, k, v = (x.double() for x in tensors)
    table = tile_table(blocks, STRIP)
    borders = table.strips.first.tolist()
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -math.inf, dtype=torch.float64)
    tiles = [blocks.order[a:b].tolist() for a, b in itertools.pairwise(blocks.starts.tolist())]
    for b, h, i in itertools.product(range(len(q)), range(q.shape[2]), range(len(tiles))):
        g = h * k.shape[2] // q.shape[2]
        for token in tiles[i] if only is None else {only} & {*tiles[i]}:
            x = q[b, token, h] * scale
            scores, values = [], []
            for j, (a, z) in enumerate(itertools.pairwise(borders)):
                if active[b, h, i, j]:
                    for key in blocks.order[a:z].tolist():
                        if key_mask[b, key]:
                            scores.append(x @ k[b, key, g])
                            values.append(v[b, key, g])
                elif shown[b, h, i, j]:
                    parts = math.ceil((z - a) / POOL)
                    cuts = [a + (z - a) * p // parts for p in range(parts + 1)]
                    for first, last in itertools.pairwise(cuts):
                        piece = blocks.order[first:last]
                        piece = piece[key_mask[b, piece]]
                        if not len(piece):
                            continue
                        mean = k[b, piece, g].mean(0)
                        second = 0.5 * (x.square() @ (k[b, piece, g] - mean).square().mean(0))
                        bound = torch.tensor(math.log(len(piece)))
                        scores.append(x @ mean + bound + torch.minimum(second, bound))
                        values.append(v[b, piece, g].mean(0))
            if scores:
                together = torch.stack(scores)
                lse[b, token, h] = together.logsumexp(0)
                out[b, token, h] = together.softmax(0) @ torch.stack(values)
    return out, lse


def both(
    tensors: Tensors,
    blocks: BlockIndex,
    active: torch.Tensor,
    shown: torch.Tensor,
    scale: float,
    key_mask: torch.Tensor,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = tensors
    flags = tile_table(blocks, STRIP).flags(active)
    near = active_tiles.attend(
        q, k, v, blocks, flags, scale=scale, key_mask=key_mask, strip=STRIP,
        backend="torch" if backend == "triton" else backend,
    )  # fmt: skip
    tokens = virtual_tokens.pool(
        k, v, blocks, POOL, key_mask=key_mask, strip=STRIP, backend=backend
    )
    return virtual_tokens.attend_virtual(
        q, tokens, blocks, scale, (near.out, near.lse), backend, shown=shown
    )


def inputs(dtype: torch.dtype) -> tuple[Tensors, torch.Tensor]:
    tensors = random_qkv(2, GRID.num_tokens, 4, 16, dtype, key_heads=2)
    key_mask = torch.rand(2, GRID.num_tokens, generator=torch.Generator().manual_seed(2)) < 0.8
    key_mask[1, 30:60] = False
    return tensors, key_mask


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_exact_and_virtual_share_one_softmax(backend: str) -> None:
    blocks = index()
    tensors, key_mask = inputs(torch.float64)
    active, shown = chosen(blocks, 4)
    expected = by_formula(tensors, blocks, active, shown, 0.4, key_mask)
    with poisoned():
        out, lse = both(tensors, blocks, active, shown, 0.4, key_mask, backend)
    assert torch.allclose(out, expected[0], atol=1e-6)  # log n is in fp32
    assert torch.allclose(lse, expected[1], atol=1e-6)
    assert lse[:, : GRID.text_before, 0].isinf().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_shows_what_it_is_told(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from tests.kernels.gpu.triton_interpreter import as_on_a_gpu

    blocks = index()
    tensors, key_mask = inputs(dtype)
    active, shown = chosen(blocks, 4)
    expected = by_formula(tensors, blocks, active, shown, 0.4, key_mask)
    with as_on_a_gpu():
        out, lse = both(tensors, blocks, active, shown, 0.4, key_mask, "triton")
    error = (out.double() - expected[0]).norm() / expected[0].norm()
    assert error < (1e-6 if dtype == torch.float32 else 1e-2)
    assert torch.equal(lse.isinf(), expected[1].isinf())


@pytest.mark.parametrize("sharp", [0.1, 0.4, 1.0])
def test_products_of_bf16_lose_no_more_than_the_output_is_rounded_by(sharp: float) -> None:
    """The bias (counts and second order) is not rounded with them, or only its small part."""
    blocks = index()
    tensors, key_mask = inputs(torch.bfloat16)
    active, shown = chosen(blocks, 4)
    exact = by_formula(tensors, blocks, active, shown, sharp, key_mask)
    found = both(tensors, blocks, active, shown, sharp, key_mask, "torch")
    rounding = (exact[0].bfloat16().double() - exact[0]).norm()
    assert (found[0].double() - exact[0]).norm() < 3 * rounding
    seen = exact[1].isfinite()
    assert (found[1].double() - exact[1])[seen].abs().max() < 0.02


def missed_by_formula(
    tensors: Tensors,
    blocks: BlockIndex,
    shown: torch.Tensor,
    scale: float,
    key_mask: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the mean query of each tile to the keys shown, less that to their means."""
    q, k, v = (x.double() for x in tensors)
    tiles = [blocks.order[a:b] for a, b in itertools.pairwise(blocks.starts.tolist())]
    means = torch.stack([q[:, tile].mean(1) for tile in tiles], 1)  # (B, N, H, D)
    out, lse = torch.zeros_like(means), torch.zeros(means.shape[:3], dtype=torch.float64)
    for i, tile in enumerate(tiles):
        every = q.clone()
        every[:, tile] = means[:, i, None]  # so that any query of the tile is its mean
        found = []
        for exact, far in ((shown, shown & False), (shown & False, shown)):
            first = int(tile[0])
            found.append(by_formula((every, k, v), blocks, exact, far, scale, key_mask, first))
        known = (found[0][1][:, tile[0]] > -math.inf) & (found[1][1][:, tile[0]] > -math.inf)
        (exact_out, exact_lse), (rough_out, rough_lse) = found
        out[:, i] = (exact_out - rough_out)[:, tile[0]].masked_fill(~known[..., None], 0.0)
        lse[:, i] = (exact_lse - rough_lse)[:, tile[0]].masked_fill(~known, 0.0)
    return out.transpose(1, 2), lse.transpose(1, 2)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_what_virtual_tokens_miss_is_what_the_mean_query_sees(backend: str) -> None:
    blocks = index()
    tensors, key_mask = inputs(torch.float64)
    _, shown = chosen(blocks, 4)
    tokens = virtual_tokens.pool(*tensors[1:], blocks, POOL, key_mask=key_mask, strip=STRIP)
    with poisoned():
        found = virtual_tokens.missed(
            *tensors, tokens, blocks, 0.4, shown=shown, key_mask=key_mask, backend=backend
        )
    expected = missed_by_formula(tensors, blocks, shown, 0.4, key_mask)
    assert torch.allclose(found.out, expected[0], atol=1e-6)
    assert torch.allclose(found.lse, expected[1], atol=1e-6)
    assert not found.out[:, 0].any() and found.out[:, 1:].any()  # head 0 is shown nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [False, True])
def test_the_kernel_sees_what_virtual_tokens_miss(dtype: torch.dtype, hidden: bool) -> None:
    pytest.importorskip("triton")
    from tests.kernels.gpu.triton_interpreter import as_on_a_gpu

    blocks = index()
    tensors, key_mask = inputs(dtype)
    key_mask = key_mask if hidden else torch.ones_like(key_mask)
    _, shown = chosen(blocks, 4)
    expected = missed_by_formula(tensors, blocks, shown, 0.4, key_mask)
    with as_on_a_gpu():
        mask = key_mask if hidden else None
        tokens = virtual_tokens.pool(
            *tensors[1:], blocks, POOL, key_mask=mask, strip=STRIP, backend="triton"
        )
        found = virtual_tokens.missed(
            *tensors, tokens, blocks, 0.4, shown=shown, key_mask=mask, backend="triton"
        )
    for one, right in zip(found, expected, strict=True):
        assert torch.isfinite(one).all()
        assert (one.double() - right).norm() / right.norm() < (
            1e-4 if dtype == torch.float32 else 0.05  # a difference of numbers of 16 bits
        )


def test_a_tile_of_equal_queries_misses_nothing_once_corrected() -> None:
    """Then all of its queries are its mean, and the correction is all that was missing."""
    blocks = index()
    (q, k, v), key_mask = inputs(torch.float64)
    tile = blocks.tile_of_place[blocks.place]
    q = q[:, tile]  # the same query at every token of a tile
    active, shown = chosen(blocks, 4)
    exact = by_formula((q, k, v), blocks, active | shown, shown & False, 0.4, key_mask)
    near = by_formula((q, k, v), blocks, active, shown & False, 0.4, key_mask)
    tokens = virtual_tokens.pool(k, v, blocks, POOL, key_mask=key_mask, strip=STRIP)
    lost = virtual_tokens.missed(q, k, v, tokens, blocks, 0.4, shown=shown, key_mask=key_mask)
    rough, out = (
        virtual_tokens.attend_virtual(
            q, tokens, blocks, 0.4, near, "torch", shown=shown, missed=missed
        )[0]
        for missed in (None, lost)
    )
    assert torch.allclose(out, exact[0], atol=1e-6)
    assert not torch.allclose(rough, exact[0], atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beside", [True, False])
def test_the_kernel_adds_what_is_missed(dtype: torch.dtype, beside: bool) -> None:
    """To the virtual part alone, also in heads and rows that see nothing near, or nothing far."""
    pytest.importorskip("triton")
    from tests.kernels.gpu.triton_interpreter import as_on_a_gpu

    blocks = index()
    tensors, key_mask = inputs(dtype)
    active, shown = chosen(blocks, 4)
    q, k, v = tensors
    lost = Missed(torch.randn(2, 4, blocks.num_tiles, 16), torch.rand(2, 4, blocks.num_tiles))
    wide = (q.double(), k.double(), v.double())
    near = by_formula(wide, blocks, active, shown & False, 0.4, key_mask) if beside else None
    far = by_formula(wide, blocks, active & False, shown, 0.4, key_mask)
    far = lost.added(*far, blocks)
    far[0][far[1].isinf()] = 0.0  # nothing is added to nothing
    expected = far if near is None else merge(*near, *far)
    begun = None if near is None else (near[0].to(dtype), near[1].float())
    with as_on_a_gpu():
        tokens = virtual_tokens.pool(
            k, v, blocks, POOL, key_mask=key_mask, strip=STRIP, backend="triton"
        )
        out, lse = virtual_tokens.attend_virtual(
            q, tokens, blocks, 0.4, begun, "triton", shown=shown, missed=lost
        )
    error = (out.double() - expected[0]).norm() / expected[0].norm()
    assert error < (1e-6 if dtype == torch.float32 else 1e-2)
    seen = expected[1].isfinite()
    assert torch.equal(lse.isfinite(), seen)
    assert torch.allclose(
        lse.double()[seen], expected[1][seen], atol=1e-5 if dtype == torch.float32 else 0.05
    )


def test_the_correction_has_gradients() -> None:
    blocks = index()
    tensors, key_mask = inputs(torch.float64)
    _, shown = chosen(blocks, 4)
    q, k, v = (x[:, :, :2].clone().requires_grad_() for x in tensors)
    shown = shown[:, :2]

    def total(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        tokens = virtual_tokens.pool(k, v, blocks, POOL, key_mask=key_mask, strip=STRIP)
        lost = virtual_tokens.missed(q, k, v, tokens, blocks, 0.4, shown=shown, key_mask=key_mask)
        return lost.out.square().sum() + lost.lse.sum()

    grads = torch.autograd.grad(total(q, k, v), (q, k, v))
    step = [torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(n))
            for n, x in enumerate((q, k, v))]  # fmt: skip
    with torch.no_grad():
        ends = [total(*(x + s * 1e-5 * d for x, d in zip((q, k, v), step, strict=True)))
                for s in (1, -1)]  # fmt: skip
    slope = sum(float((g * d).sum()) for g, d in zip(grads, step, strict=True))
    assert float(ends[0] - ends[1]) / 2e-5 == pytest.approx(slope, rel=1e-4)


def test_pieces_never_cross_the_border_of_a_strip() -> None:
    blocks = index()
    tokens = virtual_tokens.pool(*random_qkv(1, GRID.num_tokens, 1, 8)[1:], blocks, 7, strip=STRIP)
    pieces, strips = tokens.pieces, tile_table(blocks, STRIP).strips
    assert set(strips.first.tolist()) <= set(pieces.first.tolist())
    for piece, strip in enumerate(pieces.whole.tolist()):
        assert strips.first[strip] <= pieces.first[piece]
        assert pieces.first[piece + 1] <= strips.first[strip + 1]
    assert pieces.first.diff().max() <= 7 and strips.first.diff().max() <= STRIP


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_of_moments_is_their_definition(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from diffpatch.kernels.selection.moments import moments
    from tests.kernels.gpu.triton_interpreter import as_on_a_gpu

    blocks = index()
    (_, k, _), key_mask = inputs(dtype)
    strips = tile_table(blocks, STRIP).strips
    for hidden in (None, key_mask):
        exact = moments(k.double(), blocks, strips, hidden, "torch")
        with as_on_a_gpu():
            found = moments(k, blocks, strips, hidden, "triton")
        assert torch.equal(found.count.double(), exact.count)
        assert found.mean.dtype == torch.float32
        assert torch.allclose(found.mean.double(), exact.mean, atol=1e-5)
        assert torch.allclose(found.variance.double(), exact.variance, atol=1e-5)
    square = k.double()[:, strips.index[2][strips.valid[2]]].square().mean(1)
    assert torch.allclose(moments(k, blocks, strips).square[:, :, 2].double(), square, atol=1e-4)
