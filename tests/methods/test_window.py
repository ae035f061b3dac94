"""Window attention: partitions, how they change over layers and steps, and by groups of heads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import diffpatch
from diffpatch import Neighborhood, TokenGrid, Window
from tests.brute import GRIDS, Position, brute_force, check


@pytest.mark.parametrize("quarters", range(4))
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_window_partitions_the_grid(grid: TokenGrid, quarters: int) -> None:
    sizes = [math.ceil(n / 2) for n in grid.shape]

    def cell(p: Position) -> list[int]:
        shifts = [quarters * s // 4 for s in sizes]
        return [
            (x - d) // s if s < n else 0
            for x, s, d, n in zip(p, sizes, shifts, grid.shape, strict=True)
        ]

    expected = brute_force(grid, lambda q, k: cell(q) == cell(k))
    windows: Any = tuple(sizes)
    check(Window(window=windows).pattern(grid, quarters), expected)


def test_window_shifts_by_half_on_every_other_layer_or_step() -> None:
    assert [Window(shift="layer").variant(layer, 0) for layer in range(3)] == [0, 2, 0]
    assert [Window(shift="step").variant(0, step) for step in range(3)] == [0, 2, 0]
    assert Window(shift="none").variant(1, 1) == 0


def test_random_shifts_follow_the_seed_and_nothing_else() -> None:
    def moves(seed: int) -> list[int]:
        return [Window(shift="random", seed=seed).variant(3, step) for step in range(40)]

    torch.manual_seed(1)
    first = moves(7)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    assert moves(7) == first != moves(8)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert set(first) == {0, 1, 2, 3}
    assert Window(shift="random", seed=7).variant(0, 5) == first[5]  # one move for all layers


def test_odd_layers_may_have_one_window_more() -> None:
    method, grid = Window(window=(-1, 0.5, 4), shift="count"), TokenGrid(2, 9, 12)
    for layer, (rows, columns) in enumerate([(2, 3), (3, 4)]):
        mask = method.pattern(grid, method.variant(layer, 0)).dense()[0]
        assert len(mask.unique(dim=0)) == rows * columns  # as many kinds of rows as windows


def test_cross_shaped_windows_are_stripes_by_groups_of_heads() -> None:
    grid = TokenGrid(2, 6, 9, text_after=3)
    pattern = Window.cross(2).pattern(grid)
    rows = brute_force(grid, lambda q, k: q[1] // 2 == k[1] // 2)
    columns = brute_force(grid, lambda q, k: q[2] // 2 == k[2] // 2)
    assert torch.equal(pattern.dense(), torch.stack([rows, columns]))
    stripes = Neighborhood(heads=(Neighborhood((-1, 2, -1), stride=(1, 2, 1)), 1)).pattern(grid)
    assert torch.equal(stripes.dense()[0], rows)
    assert not (pattern.blocks.mask_ids >= 0).any()


def test_cross_shaped_windows_run_in_a_pipeline() -> None:
    from tests.tiny import wan

    tiny, calls = wan(), dict[str, Any](dense_steps=0, shift="none")
    heads = ((-1, 1, -1), (-1, -1, 2))
    diffpatch.patch(tiny.pipe, "window", heads=heads, **calls)
    both = tiny.run()
    report = diffpatch.report(tiny.pipe)
    assert report.dense_calls == 0 and report.kept == pytest.approx(0.5)
    for one in heads:
        diffpatch.patch(tiny.pipe, "window", window=one, **calls)
        assert not torch.equal(tiny.run(), both)
