"""Grids and tiles: every token in exactly one tile, borders where they belong."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffpatch import BadParameter, TokenGrid
from diffpatch.patterns.tiles import (
    Tiling,
    choose_tile,
    even_cuts,
    halved,
    raster,
    refine,
    step_cuts,
)


@given(length=st.integers(1, 200), tile=st.integers(1, 200))
def test_even_cuts_are_equal_to_one_token(length: int, tile: int) -> None:
    cuts = even_cuts(length, tile)
    sizes = [b - a for a, b in itertools.pairwise(cuts)]
    assert cuts[0] == 0 and cuts[-1] == length
    assert max(sizes) <= tile and max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-length // tile)


@given(length=st.integers(1, 90), step=st.integers(1, 40), offset=st.integers(0, 90))
def test_step_cuts_border_every_step(length: int, step: int, offset: int) -> None:
    cuts = step_cuts(length, step, offset)
    assert cuts == tuple(
        i for i in range(length + 1) if i in (0, length) or (i - offset) % step == 0
    )


def test_refine_keeps_the_old_borders() -> None:
    cuts = refine((0, 7, 20), 4)
    assert {0, 7, 20} <= set(cuts)
    assert max(b - a for a, b in itertools.pairwise(cuts)) <= 4


@pytest.mark.parametrize(
    "shape", [(21, 45, 80), (21, 30, 52), (30, 48, 80), (1, 64, 64), (3, 1, 5)]
)
def test_chosen_tiles_fit_and_waste_little(shape: tuple[int, int, int]) -> None:
    t, h, w = choose_tile(shape)
    assert t * h * w <= 128
    tiling = Tiling.even(TokenGrid(*shape), (t, h, w))
    waste = tiling.num_visual * 128 / tiling.grid.visual_tokens
    assert waste <= 1.1 or tiling.num_visual == 1


grids = st.builds(
    TokenGrid,
    *(st.integers(1, 7),) * 3,
    text_before=st.integers(0, 9),
    text_after=st.integers(0, 9),
)


@settings(deadline=None, max_examples=60)
@given(grid=grids, tile=st.tuples(*(st.integers(1, 4),) * 3))
def test_tile_order_is_a_permutation_with_compact_tiles(
    grid: TokenGrid, tile: tuple[int, int, int]
) -> None:
    tiling = Tiling.even(grid, tile)
    order = tiling.order()
    assert order.sort().values.tolist() == list(range(grid.num_tokens))
    assert int(tiling.sizes.sum()) == grid.num_tokens
    before = len(tiling.text_sizes[0])
    start = grid.text_before
    for size in tiling.sizes[before : before + tiling.num_visual].tolist():
        index = order[start : start + size] - grid.text_before
        frame, row, column = index // grid.frame_tokens, index // grid.width, index % grid.width
        box = 1
        for axis in (frame, row % grid.height, column):
            box *= int(axis.max() - axis.min()) + 1
        assert box == size and bool((index.diff() > 0).all())
        start += size


@given(st.tuples(*[st.integers(1, 9)] * 3))
@settings(max_examples=50)
def test_halves_of_a_tile_are_boxes(box: tuple[int, int, int]) -> None:
    """By hand: cut the longest side in the middle (the last of equal ones), one half, the other."""

    def expected(ranges: tuple[range, ...]) -> list[tuple[int, int, int]]:
        sides = [len(r) for r in ranges]
        if max(sides) == 1:
            return [(ranges[0][0], ranges[1][0], ranges[2][0])]
        axis = max(n for n in range(3) if sides[n] == max(sides))
        middle, whole = sides[axis] // 2, ranges[axis]
        cut = [(*ranges[:axis], part, *ranges[axis + 1 :])
               for part in (whole[:middle], whole[middle:])]  # fmt: skip
        return expected(cut[0]) + expected(cut[1])

    right = expected(tuple(range(n) for n in box))
    found = [tuple(int(x) for x in place) for place in
             torch.stack(torch.unravel_index(halved(box), box), 1)]  # fmt: skip
    assert found == right


@pytest.mark.parametrize(
    "grid", [TokenGrid(7, 10, 9, text_before=3, text_after=2), TokenGrid(2, 8, 8)]
)
def test_nested_tiles_hold_the_same_tokens_in_compact_pieces(grid: TokenGrid) -> None:
    cuts = Tiling.even(grid, (2, 4, 4)).cuts
    plain, nested = Tiling(grid, cuts), Tiling(grid, cuts, nested=True)
    borders = torch.cat([torch.zeros(1, dtype=torch.int64), plain.sizes.cumsum(0)]).tolist()
    old, new = plain.order(), nested.order()
    assert not torch.equal(old, new)
    for begin, end in itertools.pairwise(borders):
        assert torch.equal(old[begin:end], new[begin:end].sort().values)
    assert torch.equal(old[: grid.text_before], new[: grid.text_before])
    if grid.visual_tokens == grid.num_tokens:  # tiles of 32, and pieces of 8: (2, 2, 2) each
        place = torch.stack(torch.unravel_index(new[:8], grid.shape), 1)
        assert place.amax(0).tolist() == [1, 1, 1]


def test_raster_blocks_follow_the_sequence() -> None:
    grid = TokenGrid(3, 7, 11, text_before=5, text_after=2)
    tiling = raster(grid, 128)
    assert torch.equal(tiling.order(), torch.arange(grid.num_tokens))
    assert tiling.sizes.tolist() == [5, 128, 103, 2]


def test_impossible_grids_are_refused() -> None:
    with pytest.raises(BadParameter, match="height=0"):
        TokenGrid(1, 0, 4)
    with pytest.raises(BadParameter, match="text_after=-1"):
        TokenGrid(1, 1, 4, text_after=-1)
    with pytest.raises(BadParameter, match="axis length 4"):
        Tiling(TokenGrid(1, 1, 4), ((0, 1), (0, 1), (0, 3)))
