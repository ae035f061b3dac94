"""The method `dynamic` as a whole against its definition, token by token in fp64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from diffpatch import Dynamic, TokenGrid
from diffpatch.kernels.active_tiles import api as active_tiles
from diffpatch.kernels.active_tiles.table import tile_table
from diffpatch.methods.base import AttentionCall
from diffpatch.methods.dynamic import costs
from tests.exactness import poisoned
from tests.kernels.random_blocks import random_qkv

HEADS, KEY_HEADS = 4, 2
# Parts of 21×30×52, 21×45×80 and 1×80×80 with their odd borders; all of them would take minutes.
GRIDS = [
    TokenGrid(3, 15, 13, text_before=4, text_after=3),
    TokenGrid(2, 15, 20, text_after=5),
    TokenGrid(1, 20, 20),
]


def cut(tokens: torch.Tensor, most: int) -> list[torch.Tensor]:
    """As few parts of at most so many tokens as can be, of about equal length."""
    parts = math.ceil(len(tokens) / most)
    ends = [len(tokens) * p // parts for p in range(parts + 1)]
    return [tokens[a:b] for a, b in itertools.pairwise(ends)]


def by_definition(
    method: Dynamic, tensors: list[torch.Tensor], grid: TokenGrid, mask: torch.Tensor,
    exact: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """One softmax over the keys of exact strips and the means of the pieces of all others, which
    are corrected by what the mean query of the tile sees in the keys themselves.

    Args:
        method: with tile, strip and pool given.
        tensors: q, k, v.
        grid: their tokens.
        mask: bool (B, S), the keys that count.
        exact: bool (B, H, N, n).
    """
    q, k, v = (x.double() for x in tensors)
    blocks, scale = method.pattern(grid).blocks, q.shape[-1] ** -0.5
    tiles = [blocks.order[a:b] for a, b in itertools.pairwise(blocks.starts.tolist())]
    strips = [strip for tile in tiles for strip in cut(tile, method.strip)]
    out = torch.zeros_like(q)
    for b, h, i in itertools.product(range(len(q)), range(q.shape[2]), range(len(tiles))):
        x, g = q[b, tiles[i], h] * scale, h * k.shape[2] // q.shape[2]
        alive = [strip[mask[b, strip]] for strip in strips]
        near = torch.cat([alive[j] for j in range(len(strips)) if exact[b, h, i, j]])
        pieces = [
            piece[mask[b, piece]]
            for j, strip in enumerate(strips)
            if not exact[b, h, i, j]
            for piece in cut(strip, method.pool)
            if mask[b, piece].any()
        ]
        weights, values = (x @ k[b, near, g].T).exp(), v[b, near, g]
        total, summed = weights.sum(1), weights @ values
        if method.rest == "virtual" and pieces:
            far = [k[b, piece, g] for piece in pieces], [v[b, piece, g] for piece in pieces]
            mass, mean = virtual(x, *far)
            if method.correct:
                middle, left = x.mean(0, keepdim=True), torch.cat(pieces)
                seen = (middle @ k[b, left, g].T).exp()
                rough = virtual(middle, *far)
                mean = mean + seen @ v[b, left, g] / seen.sum() - rough[1]
                mass = mass * seen.sum() / rough[0]
            total, summed = total + mass, summed + mass[:, None] * mean
        out[b, tiles[i], h] = (summed / total[:, None]).nan_to_num()
    return out


def virtual(
    x: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mass (R,) and the mean (R, D) that queries, times the scale, read in virtual tokens."""
    count = torch.tensor([math.log(len(key)) for key in keys], dtype=x.dtype)
    variance = torch.stack([key.var(0, unbiased=False) for key in keys])
    second = torch.minimum(0.5 * x.square() @ variance.T, count)
    weights = (x @ torch.stack([key.mean(0) for key in keys]).T + second + count).exp()
    total = weights.sum(1)
    return total, weights @ torch.stack([y.mean(0) for y in values]) / total[:, None]


@pytest.mark.parametrize(
    ("rest", "correct"), [("virtual", True), ("virtual", False), ("drop", True)]
)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_whole_method_is_its_definition(grid: TokenGrid, rest: str, correct: bool) -> None:
    """Batch 2, text, hidden keys, a budget for each head, a head that is all sink, and outputs that
    hold NaN before they are written, in fp64 and bf16."""
    budgets = {0: (0.15, 0.3, 0.5, 1.0)}
    method = Dynamic(rest=rest, budgets=budgets, tile=32, strip=16, pool=8, correct=correct)
    pattern, tensors = method.pattern(grid), list(random_qkv(
        2, grid.num_tokens, HEADS, 16, torch.float64, key_heads=KEY_HEADS
    ))  # fmt: skip
    mask = torch.rand(2, grid.num_tokens, generator=torch.Generator().manual_seed(2)) < 0.8
    mask[1, pattern.blocks.order[32:64]] = False  # whole strips without a key that counts
    tensors[0][:, :, :2] = tensors[0][:, :, :2].abs()
    tensors[1][:, pattern.blocks.order[:8], 0] += 20.0  # what the first two heads all look at
    for dtype, near in ((torch.float64, 1e-6), (torch.bfloat16, 0.02)):
        q, k, v = (x.to(dtype) for x in tensors)
        state: dict[str, Any] = {}
        with poisoned():
            done = method.attend(q, k, v, AttentionCall(pattern, key_mask=mask, state=state))
        table = tile_table(pattern.blocks, 16)
        shape = (table.num_tiles, len(table.strips))
        exact = active_tiles.unpack(state["bits"], math.prod(shape)).unflatten(3, shape)[:, :, 0]
        expected = by_definition(method, [q, k, v], grid, mask, exact)
        error = (done.out.double() - expected).norm() / expected.norm()
        assert error < near


def test_scores_that_are_all_alike_choose_the_first() -> None:
    grid = GRIDS[0]
    q, k, v = (torch.ones_like(x) for x in random_qkv(2, grid.num_tokens, 4, 16, torch.float32))
    for rest in ("virtual", "drop"):
        method = Dynamic(rest=rest, kept=0.3, tile=32, strip=16, pool=8)
        with poisoned():
            out = method.attend(q, k, v, AttentionCall(method.pattern(grid))).out
        assert torch.allclose(out, torch.ones_like(out), atol=1e-5)


@pytest.mark.parametrize("correct", [False, True])
def test_work_counts_what_a_call_computes(correct: bool) -> None:
    grid = TokenGrid(4, 8, 16)
    q, k, v = random_qkv(1, grid.num_tokens, 4, 16, torch.float32)
    method = Dynamic(kept=0.3, tile=32, strip=16, pool=8, correct=correct)
    pattern, state = method.pattern(grid), dict[str, Any]()
    kept = float(method.attend(q, k, v, AttentionCall(pattern, state=state)).kept)
    fresh, old = (method.work(pattern, age, "torch") for age in (0, 1))
    assert fresh is not None and old is not None
    tokens = grid.num_tokens
    exact = old.pairs_of_few / tokens**2
    means = tokens // 32 if correct else 0
    assert exact + (1 - exact) * (1 / 8 + means / tokens) == pytest.approx(kept, abs=1e-6)
    assert old.virtual == tokens * tokens / 8 + means * tokens and old.pooled == tokens
    maps = costs.PRODUCTS * (tokens // 32) * (tokens // 16)
    assert fresh.virtual - old.virtual == maps and fresh.pooled == 4 * tokens
    drop = Dynamic(rest="drop", kept=0.3, tile=32, strip=16)
    dropped = drop.work(pattern, 1, "triton")
    assert dropped is not None and dropped.virtual == dropped.pooled == 0
    assert dropped.pairs / tokens**2 == pytest.approx(drop.kept_at(pattern, 1), abs=1e-6)
    assert Dynamic(rule="sol", threshold=1.0).work(pattern, 0, "torch") is None
    assert method.scratch_size(pattern, 4) == 4 * 5 * 4 * (tokens // 32) * (tokens // 16)
