"""Methods set to an equal share of the pairs: near on any grid, so that they can be compared."""

from __future__ import annotations

import dataclasses

import pytest

import diffpatch
from diffpatch import BadParameter, Neighborhood, Radial, TokenGrid, Window
from diffpatch.planning.fit import fit_kept, kept_of

GRIDS = [
    TokenGrid(33, 16, 16),
    TokenGrid(21, 30, 52),
    TokenGrid(13, 11, 17, text_before=20),
    TokenGrid(1, 45, 71, text_after=77),
]
METHODS = ["radial", "neighborhood", "window", "linear", "window+temporal"]


@pytest.mark.parametrize("kept", [0.5, 0.25, 0.12])
@pytest.mark.parametrize("name", METHODS)
def test_a_budget_is_met_within_a_few_points(name: str, kept: float) -> None:
    for grid in GRIDS:
        if grid.num_frames == 1 and name == "radial":
            continue
        method = fit_kept(name, grid, kept)
        assert kept_of(method, grid) == pytest.approx(kept, abs=0.05), f"{grid}: {method}"
        assert diffpatch.make_method(method) == method


def test_what_is_kept_is_what_a_dense_mask_says() -> None:
    grid = TokenGrid(4, 6, 9, text_before=3)
    window = Window(window=(-1, 0.5, 0.5))
    masks = [window.pattern(grid, shifted).dense() for shifted in (0, 2)]
    assert kept_of(window, grid) == pytest.approx(sum(m.float().mean().item() for m in masks) / 2)


def test_only_the_size_of_a_method_changes() -> None:
    base = Neighborhood(stride=1, causal=(True, False, False))
    fitted = fit_kept(base, TokenGrid(5, 9, 9), 0.2)
    assert isinstance(fitted, Neighborhood)
    assert dataclasses.replace(fitted, kept=None) == base
    published = fit_kept(Radial(rule="published", sink=False), TokenGrid(21, 30, 52), 0.4)
    assert isinstance(published, Radial) and published.kept is None and not published.sink
    assert kept_of(published, TokenGrid(21, 30, 52)) == pytest.approx(0.4, abs=0.01)


def test_a_budget_out_of_reach_gives_the_nearest() -> None:
    grid = TokenGrid(21, 30, 52)
    method = fit_kept("radial", grid, 0.1, rule="published")
    assert kept_of(method, grid) == kept_of(Radial(decay=1e-6, rule="published"), grid) > 0.25


def test_all_of_the_pairs_is_a_budget() -> None:
    grid = TokenGrid(3, 6, 8, text_after=2)
    for name in METHODS:
        assert kept_of(fit_kept(name, grid, 1.0), grid) == pytest.approx(1, abs=0.05), name


def test_impossible_budgets_say_what_to_do() -> None:
    for kept in (0, -0.1):
        with pytest.raises(BadParameter, match=rf"kept={kept} must be a fraction"):
            fit_kept("window", TokenGrid(3, 5, 7), kept)
    with pytest.raises(BadParameter, match=r"kept=1\.5 must be a fraction"):
        fit_kept("window", TokenGrid(3, 5, 7), 1.5)
    with pytest.raises(BadParameter, match=r"kept=0\.2 must be None with rule='published'"):
        Radial(rule="published", kept=0.2)


def test_radial_below_its_near_frames_still_keeps_nearer_frames_better() -> None:
    grid = TokenGrid(8, 24, 24)
    mask = Radial(kept=0.2, sink=False).pattern(grid).dense()[0].view(8, 576, 8, 576)
    share = [mask[0, :, j].float().mean().item() for j in range(8)]
    assert mask.float().mean().item() == pytest.approx(0.2, abs=0.03)
    assert share[0] >= share[1] > share[2] >= share[4] > 0
