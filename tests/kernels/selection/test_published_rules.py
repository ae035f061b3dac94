"""Published rules against their formulas, written apart, and against comfy-kitchen."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from diffpatch import Dense, TokenGrid
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.selection.api import select, tile_scores
from diffpatch.kernels.selection.choose import Counts
from diffpatch.kernels.selection.tiles import Options, Tiles
from tests.kernels.random_blocks import random_qkv
from tests.kernels.selection.test_selection import (
    GRIDS,
    SCALE,
    Tensors,
    equal_parts,
    inputs,
    pieces,
)


def by_rule(
    rule: str, tensors: Tensors, blocks: BlockIndex, strip: int, seen: torch.Tensor
) -> torch.Tensor:
    """Published scores as their papers define them; all keys count. (B, H, N, n)."""
    q, k, _ = (x.double() for x in tensors)
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    tiles, strips = pieces(blocks, strip)
    mean_q = torch.stack([q[:, :, t].mean(2) for t in tiles], 2)
    mean_k = torch.stack([k[:, :, t].mean(2) for t in strips], 2)
    scores = SCALE * torch.einsum("bhid,bhjd->bhij", mean_q, mean_k)
    if rule in ("pooled", "draft"):
        return scores
    if rule == "sol":
        centred = mean_k - mean_k.mean(2, keepdim=True)
        deviation = (
            SCALE * torch.einsum("bhid,bhd->bhi", mean_q.square(), centred.square().mean(2)).sqrt()
        )
        return SCALE * torch.einsum("bhid,bhjd->bhij", mean_q, centred) / deviation[..., None]
    if rule in ("nabla", "sparge"):
        share = scores.masked_fill(~seen, -math.inf).softmax(-1)
        return -_before(share, inclusive=rule == "sparge")
    if rule == "subblock":
        out = torch.empty_like(scores)
        quarter_q, quarter_k = (max(map(len, x)) for x in (tiles, strips))
        parts_q = [equal_parts(t, math.ceil(quarter_q / 4)) for t in tiles]
        parts_k = [equal_parts(t, math.ceil(quarter_k / 4)) for t in strips]
        for (i, own), (j, others) in itertools.product(enumerate(parts_q), enumerate(parts_k)):
            terms = [
                SCALE * (q[:, :, a].mean(2) * k[:, :, b].mean(2)).sum(-1)
                for a, b in itertools.product(own, others)
            ]
            out[:, :, i, j] = torch.stack(terms).logsumexp(0)
        return out
    if rule == "psa":
        one_q = [[p[len(p) // 2] for p in equal_parts(t, 4)] for t in tiles]
        one_k = [[p[len(p) // 2] for p in equal_parts(t, 4)] for t in strips]
        every = torch.stack([k[:, :, t] for own in one_k for t in own], 2)
        sizes, sums = [len(own) for own in one_k], []
        for chosen in one_q:
            x = torch.stack([q[:, :, t] for t in chosen], 2)
            share = (SCALE * x @ every.mT).softmax(-1).mean(2)
            sums.append(torch.stack([p.sum(-1) for p in share.split(sizes, -1)], -1))
        return torch.stack(sums, 2)
    assert rule == "xattention"
    stride = 8

    def antidiagonals(x: torch.Tensor, parts: list[torch.Tensor], backwards: bool) -> torch.Tensor:
        made = []
        for part in parts:
            filled = torch.zeros(*x.shape[:2], stride, x.shape[3], dtype=x.dtype)
            filled[:, :, : len(part)] = x[:, :, part]
            made.append((filled.flip(2) if backwards else filled).flatten(2))
        return torch.stack(made, 2)

    groups = [equal_parts(t, stride) for t in strips]
    every = antidiagonals(k, [p for own in groups for p in own], False)
    rows = []
    for tile in tiles:
        queries = antidiagonals(q, equal_parts(tile, stride), True)
        share = (SCALE / stride * queries @ every.mT).softmax(-1).mean(2)
        rows.append(torch.stack([p.sum(-1) for p in share.split([len(g) for g in groups], -1)], -1))
    return -_before(torch.stack(rows, 2), inclusive=False)


def _before(share: torch.Tensor, inclusive: bool) -> torch.Tensor:
    """The mass of all entries of a row that come earlier in falling order, entry by entry; of equal
    ones, which short groups of antidiagonals make, the first does."""
    number = torch.arange(share.shape[-1])
    larger = share[..., None, :] > share[..., None]
    larger |= (share[..., None, :] == share[..., None]) & (number < number[:, None])
    before = (share[..., None, :] * larger).sum(-1)
    return before + share if inclusive else before


PUBLISHED = ["pooled", "draft", "sol", "nabla", "sparge", "subblock", "psa", "xattention"]


@pytest.mark.parametrize("rule", PUBLISHED)
@pytest.mark.parametrize(("grid", "tile", "strip"), GRIDS[1:], ids=lambda x: str(x))
def test_published_rules_are_their_formulas(
    rule: str, grid: TokenGrid, tile: int, strip: int
) -> None:
    blocks = Dense(tile=tile).pattern(grid).blocks
    tensors, _ = inputs(grid)
    found = tile_scores(*tensors, blocks, SCALE, rule=rule, strip=strip, guard=-2.0)
    seen = torch.ones(found.shape[2:]).bool()
    expected = by_rule(rule, tensors, blocks, strip, seen)
    assert torch.allclose(found, expected, atol=1e-9)


def test_the_guard_of_sparge_keeps_tiles_that_are_unlike_themselves() -> None:
    grid = TokenGrid(2, 8, 16)
    blocks = Dense(tile=64).pattern(grid).blocks
    (q, k, v), _ = inputs(grid)
    k = torch.ones_like(k)
    k[:, blocks.order[64:128:2]] *= -1  # tile 1 points both ways: a mean cosine of 0
    q = torch.ones_like(q)
    scores = tile_scores(q, k, v, blocks, SCALE, rule="sparge", guard=0.3)
    assert scores[..., 1].isinf().all() and scores[..., [0, 2, 3]].isfinite().all()
    share = torch.tensor([1 / 3] * 3).cumsum(0)  # the column is out of the softmax
    assert torch.allclose(-scores[0, 0, 0, [0, 2, 3]].float(), share, atol=1e-6)
    q = torch.where(torch.arange(q.shape[1])[:, None, None] % 2 == 0, 1.0, -1.0) * q
    assert tile_scores(q, k, v, blocks, SCALE, rule="sparge", guard=0.3).isinf().all()


def test_sol_attn_is_that_of_comfy_kitchen() -> None:
    """Its reference: 64-token blocks in the order of the sequence, neighbours and sinks exact."""
    from comfy_kitchen.backends.eager.sol_attn import sol_attn

    from diffpatch.kernels.active_tiles import api as active_tiles
    from diffpatch.patterns.tiles import raster

    tokens = 9 * 64 + 20
    grid = TokenGrid(1, 1, tokens)
    from diffpatch.patterns.build import from_tiles

    tiling = raster(grid, 64)
    blocks = from_tiles(grid, tiling, torch.ones(10, 10).bool()).blocks
    q, k, v = random_qkv(2, tokens, 3, 32)
    number = torch.arange(10)
    near = ((number[:, None] - number).abs() <= 1) | (number < 1)
    tiles = Tiles(q, k, v, blocks, 0, 32**-0.5, None, "torch", Options())
    kept = set()
    for tau in (0.5, 1.0, 1.5):
        counts = [Counts.of(torch.ones(1, 10), 3)]
        (chosen,) = select(tiles, "sol", near[None], counts, threshold=tau)
        kept.add(int(chosen.sum()))
        out = active_tiles.attend(q, k, v, blocks, chosen.flatten(2), backend="torch").out
        theirs = sol_attn(q, k, v, tau=tau, sink_blocks=[0, 1], tail=False)
        assert torch.allclose(out, theirs, atol=1e-5)
    assert len(kept) == 3


def test_pooled_top_k_is_that_of_comfy_kitchen() -> None:
    from comfy_kitchen.backends.eager.sol_attn import sol_attn

    from diffpatch.kernels.active_tiles import api as active_tiles
    from diffpatch.patterns.build import from_tiles
    from diffpatch.patterns.tiles import raster

    grid = TokenGrid(1, 1, 640)
    blocks = from_tiles(grid, raster(grid, 64), torch.ones(10, 10).bool()).blocks
    q, k, v = random_qkv(1, 640, 2, 32)
    tiles = Tiles(q, k, v, blocks, 0, 32**-0.5, None, "torch", Options())
    none = torch.zeros(1, 10, 10).bool()
    (best,) = select(tiles, "pooled", none, [Counts.of(torch.full((1, 10), 3), 2)])
    near = (torch.arange(10)[:, None] - torch.arange(10)).abs() <= 1
    out = active_tiles.attend(q, k, v, blocks, (best | near).flatten(2), backend="torch").out
    assert torch.allclose(out, sol_attn(q, k, v, topk_ratio=0.3, tail=False), atol=1e-5)
