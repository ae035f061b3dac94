"""Scores of tiles against their formulas in fp64, written apart, and the choice from scores."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffpatch import Dense, TokenGrid, Window
from diffpatch.kernels.active_tiles.table import tile_table
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.selection import api as selection
from diffpatch.kernels.selection.api import select, tile_scores
from diffpatch.kernels.selection.choose import (
    Counts,
    above,
    bounds,
    bounds_by_kind,
    choose,
    spread_counts,
)
from diffpatch.kernels.selection.tiles import Options, Tiles
from tests.kernels.random_blocks import random_qkv

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
SCALE = 0.4


def pieces(blocks: BlockIndex, strip: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The tokens of query tiles, and of strips of keys: equal parts of at most `strip`."""
    tiles = [blocks.order[a:b] for a, b in itertools.pairwise(blocks.starts.tolist())]
    strips = []
    for tile in tiles:
        parts = math.ceil(len(tile) / strip) if strip else 1
        cuts = [len(tile) * p // parts for p in range(parts + 1)]
        strips += [tile[a:b] for a, b in itertools.pairwise(cuts)]
    return tiles, strips


def error_by_formula(
    tensors: Tensors, blocks: BlockIndex, strip: int, rest: str, key_mask: torch.Tensor
) -> torch.Tensor:
    """The rule "error" as research wrote it down, pair by pair."""
    q, k, v = (x.double() for x in tensors)
    tiles, strips = pieces(blocks, strip)
    out = torch.zeros(len(q), q.shape[2], len(tiles), len(strips), dtype=torch.float64)
    for b, h, i in itertools.product(range(len(q)), range(q.shape[2]), range(len(tiles))):
        g = h * k.shape[2] // q.shape[2]
        x = q[b, tiles[i], h]
        mean, square = x.mean(0), x.square().mean(0)
        logit, spread, mean_v, spread_v = [], [], [], []
        for tokens in strips:
            alive = tokens[key_mask[b, tokens]]
            if not len(alive):
                logit.append(-math.inf)
                spread.append(0.0)
                mean_v.append(torch.zeros_like(mean))
                spread_v.append(0.0)
                continue
            key, value = k[b, alive, g], v[b, alive, g]
            inside = float(SCALE**2 * (square * key.var(0, unbiased=False)).sum())
            bound = math.log(len(alive))
            own = SCALE * float(mean @ key.mean(0))
            logit.append(own + min(inside / 2, bound) + bound)
            spread.append(min(math.sqrt(inside), 3.0))
            mean_v.append(value.mean(0))
            spread_v.append(math.sqrt(float(value.var(0, unbiased=False).sum())))
        share = torch.tensor(logit, dtype=torch.float64).softmax(0)
        values = torch.stack(mean_v)
        if rest == "drop":
            distance = (values - share @ values).norm(dim=1)
            out[b, h, i] = torch.where(share > 0.5, torch.inf, share * distance)
        else:
            out[b, h, i] = share * torch.tensor(spread).double() * torch.tensor(spread_v).double()
    return out


# Odd grids; two are parts of 21×30×52 and 21×45×80, as all of them would take minutes.
GRIDS = [
    (TokenGrid(3, 15, 13), 64, 32),
    (TokenGrid(2, 15, 20, text_before=9), 60, 25),
    (TokenGrid(1, 20, 16, text_after=5), 64, 0),
    (TokenGrid(5, 7, 11, text_before=3, text_after=2), 33, 8),
]


def inputs(grid: TokenGrid, dtype: torch.dtype = torch.float64) -> tuple[Tensors, torch.Tensor]:
    q, k, v = random_qkv(2, grid.num_tokens, 4, 16, dtype, key_heads=2)
    mask = torch.rand(2, grid.num_tokens, generator=torch.Generator().manual_seed(3)) < 0.8
    mask[1, :70] = False  # whole strips without a key that counts
    return (q, k + 0.5, v - 1), mask


@pytest.mark.parametrize("rest", ["drop", "virtual"])
@pytest.mark.parametrize(("grid", "tile", "strip"), GRIDS, ids=lambda x: str(x))
def test_the_error_of_leaving_a_tile_out(grid: TokenGrid, tile: int, strip: int, rest: str) -> None:
    blocks = Dense(tile=tile).pattern(grid).blocks
    tensors, mask = inputs(grid)
    for hidden in (None, mask):
        found = tile_scores(*tensors, blocks, SCALE, rest=rest, strip=strip, key_mask=hidden)
        everything = torch.ones_like(mask) if hidden is None else mask
        expected = error_by_formula(tensors, blocks, strip, rest, everything)
        finite = expected.isfinite()
        assert torch.allclose(found, expected, atol=1e-9 * float(expected[finite].max()) + 1e-14)
    low = tensors[0].bfloat16(), tensors[1].bfloat16(), tensors[2].bfloat16()
    found = tile_scores(*low, blocks, SCALE, rest=rest, strip=strip)
    exact = error_by_formula(low, blocks, strip, rest, torch.ones_like(mask))
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), exact, rtol=1e-3, atol=1e-5)  # moments are in fp32


def test_values_far_from_zero_do_not_drown_their_differences() -> None:
    grid = TokenGrid(2, 8, 16)
    blocks = Dense(tile=64).pattern(grid).blocks
    (q, k, v), mask = inputs(grid)
    v = v + 1000
    found = tile_scores(q.float(), k.float(), v.float(), blocks, SCALE, rest="drop")
    expected = error_by_formula((q, k, v), blocks, 0, "drop", torch.ones_like(mask))
    assert (found - expected).norm() < 1e-2 * expected.norm()


def test_a_sink_is_scored_by_what_it_says() -> None:
    """A head whose attention is all on one tile: its output is that tile's, and so never far off,
    but dropping the tile would leave nothing of it."""
    grid = TokenGrid(2, 8, 16)
    blocks = Dense(tile=64).pattern(grid).blocks
    (q, k, v), mask = inputs(grid, torch.float32)
    q = q.abs()
    k[:, blocks.order[:64]] += 40.0
    for rest in ("drop", "virtual"):
        found = tile_scores(q, k, v, blocks, SCALE, rest=rest)
        expected = error_by_formula((q, k, v), blocks, 0, rest, torch.ones_like(mask))
        assert not found.isnan().any()
        assert torch.allclose(found.double(), expected, rtol=1e-3, atol=2e-3)
        seen, fixed = torch.ones(1, 1, 4, 4).bool(), torch.eye(4).bool()[None]
        chosen = choose(found, seen, fixed, Counts.of(torch.full((1, 4), 2), 4))
        assert (chosen & fixed).sum() == 2 * 4 * 4
        assert chosen[..., 0].all() and (chosen[:, :, 1:].sum(-1) == 2).all()


@pytest.mark.parametrize("piece", [1, 4])
def test_mass_by_pieces_is_the_softmax_to_second_order(piece: int) -> None:
    grid = TokenGrid(2, 5, 9, text_after=4)
    blocks = Window(window=(1, 5, 9)).pattern(grid).blocks
    (q, k, v), mask = inputs(grid)
    found = tile_scores(q, k, v, blocks, SCALE, rule="mass", piece=piece, key_mask=mask)
    table = tile_table(blocks)
    visited = table.map(table.valid())[0]
    tiles, _ = pieces(blocks, 0)
    k = k.repeat_interleave(2, 2)
    expected = torch.zeros_like(found)
    for b, h, i in itertools.product(range(2), range(4), range(len(tiles))):
        for own in equal_parts(tiles[i], piece):
            x, logit, owner = q[b, own, h], [], []
            for j, tile in enumerate(tiles):
                for part in equal_parts(tile, piece) if visited[i, j] else []:
                    alive = part[mask[b, part]]
                    if not len(alive):
                        continue
                    key, bound = k[b, alive, h], math.log(len(alive))
                    inside = SCALE**2 * (x.square().mean(0) * key.var(0, unbiased=False)).sum()
                    second = min(float(inside) / 2, bound)
                    logit.append(SCALE * float(x.mean(0) @ key.mean(0)) + second + bound)
                    owner.append(j)
            share = torch.tensor(logit, dtype=torch.float64).softmax(0) * len(own) / len(tiles[i])
            expected[b, h, i].index_add_(0, torch.tensor(owner), share)
    assert torch.allclose(found, expected, atol=1e-9)


def test_bounds_by_kinds_of_strips_are_those_of_all_pairs() -> None:
    """Strips of three lengths, rows that want too few, too many and some of them."""
    blocks = Dense(tile=16).pattern(TokenGrid(3, 5, 7, text_before=2)).blocks
    table = tile_table(blocks, 6)
    length, kind = table.strips.first.long().diff().unique(return_inverse=True)
    assert len(length) > 1
    random = torch.Generator().manual_seed(3)
    shape = (table.num_tiles, len(table.strips))
    fixed = torch.rand(shape, generator=random) < 0.2
    for most in (2, shape[1] // 2, shape[1] + 3):
        rows = torch.randint(0, most + 1, shape[:1], generator=random)
        sizes = table.sizes.double()[:, None]
        for price in (sizes * length, sizes * (length - 2), (sizes - 20) * length):
            of_pairs = price[:, kind].reshape(1, -1)
            expected = bounds(table, fixed[None], Counts.of(rows[None], 1), "row", of_pairs)
            assert bounds_by_kind(fixed, rows, kind, price) == pytest.approx(expected)


def best_by_sorting(
    scores: list[float], seen: list[bool], fixed: list[bool], count: int
) -> list[bool]:
    """The definition: fixed ones, then by falling score, the first of equals first."""
    must = [s and f for s, f in zip(seen, fixed, strict=True)]
    order = sorted(
        (j for j in range(len(scores)) if seen[j] and not must[j]), key=lambda j: -scores[j]
    )
    chosen = set(order[: max(0, count - sum(must))])
    return [m or j in chosen for j, m in enumerate(must)]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 4), st.integers(1, 7)),
    values=st.sampled_from(["random", "ties", "equal", "empty"]),
    scope=st.sampled_from(["row", "head", "layer"]),
    seed=st.integers(0, 99),
)
def test_the_choice_is_the_best_with_ties_to_the_first(
    shape: tuple[int, int, int, int], values: str, scope: str, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    scores = torch.rand(shape, generator=random)
    if values == "ties":
        scores = (scores * 3).floor()
    if values in ("equal", "empty"):
        scores = torch.zeros(shape)
    seen = torch.rand(1, shape[1], *shape[2:], generator=random) < (0.8 if values != "empty" else 0)
    fixed = torch.rand(1, *shape[2:], generator=random) < 0.2
    rows = torch.randint(0, shape[3] + 2, (shape[1], shape[2]), generator=random)
    found = choose(scores, seen, fixed, Counts.of(rows, shape[1]), scope)
    for b in range(shape[0]):
        whole = (scores[b], seen[0], fixed.expand(shape[1:]), rows)
        groups: list[tuple[Any, ...]] = [whole]
        if scope != "layer":
            groups = [tuple(x[h] for x in whole) for h in range(shape[1])]
        if scope == "row":
            groups = [tuple(x[i] for x in group) for group in groups for i in range(shape[2])]
        expected = [
            flag
            for value, visible, must, count in groups
            for flag in best_by_sorting(
                value.flatten().tolist(), visible.flatten().tolist(), must.flatten().tolist(),
                int(count.sum()),
            )
        ]  # fmt: skip
        assert found[b].flatten().tolist() == expected


def test_scores_that_are_no_numbers_leave_what_is_always_in() -> None:
    fixed = torch.eye(3).bool()[None]
    scores = torch.full((1, 1, 3, 3), torch.nan)
    found = choose(
        scores, torch.ones(1, 1, 3, 3).bool(), fixed, Counts.of(torch.full((1, 3), 2), 1)
    )
    assert (found & fixed).sum() == 3


@given(st.lists(st.floats(0, 9), min_size=1, max_size=40))
def test_counts_take_turns(wanted: list[float]) -> None:
    found = spread_counts(torch.tensor(wanted))
    sums = torch.tensor(wanted).double().cumsum(0)
    assert (found.cumsum(0) - sums).abs().max() < 1.001
    assert all(math.floor(x) <= n <= math.floor(x) + 1 for x, n in zip(wanted, found, strict=True))


def test_a_threshold_takes_what_exceeds_it() -> None:
    scores = torch.tensor([[[[0.0, 1.0, 2.0], [2.0, 1.5, 0.0]]]])
    seen = torch.tensor([[[[True, True, False], [True, True, True]]]])
    fixed = torch.tensor([[[False, False, True], [False, False, True]]])
    expected = [[False, False, False], [True, True, True]]
    assert above(scores, seen, fixed, 1.0)[0, 0].tolist() == expected


def test_heads_few_at_a_time_choose_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = TokenGrid(2, 8, 16)
    blocks = Dense(tile=32).pattern(grid).blocks
    (q, k, v), mask = inputs(grid, torch.float32)
    fixed = torch.eye(8).bool()[None]
    counts = [Counts.of(torch.tensor([[2] * 8, [3] * 8, [4] * 8, [1] * 8]), 4)]

    def chosen(rule: str) -> torch.Tensor:
        tiles = Tiles(q, k, v, blocks, 0, SCALE, mask, "torch", Options())
        return select(tiles, rule, fixed, counts)[0]

    for rule in ("error", "draft", "sol"):
        expected = chosen(rule)
        with monkeypatch.context() as patched:
            patched.setattr(selection, "MAX_PAIRS", 1)
            assert torch.equal(chosen(rule), expected)
        if rule == "error":
            assert torch.equal(expected.sum(-1), counts[0].rows.expand(2, -1, -1))


def equal_parts(tokens: torch.Tensor, most: int) -> list[torch.Tensor]:
    parts = math.ceil(len(tokens) / most)
    cuts = [len(tokens) * p // parts for p in range(parts + 1)]
    return [tokens[a:b] for a, b in itertools.pairwise(cuts)]
