"""Dealing out a budget over curves, against trying every combination."""

from __future__ import annotations

import itertools
import random

import pytest

from diffpatch import BadParameter
from diffpatch.targets.curves import Choice, Point, choose, lower_hull


def random_curves(seed: int, units: int = 3, points: int = 4) -> dict[str, list[Point]]:
    draw = random.Random(seed)
    rules = ("drop", "virtual")
    curves = {}
    for i in range(units):
        curve = [Point(draw.uniform(0.05, 0.9), draw.uniform(0, 1), draw.choice(rules))
                 for _ in range(points)]  # fmt: skip
        curves[f"u{i}"] = [*curve, Point(1.0, 0.0, "dense")]
    return curves


def every_choice(curves: dict[str, list[Point]], weights: dict[str, float]) -> list[Choice]:
    total, found = sum(weights.values()), []
    for points in itertools.product(*curves.values()):
        picked = dict(zip(curves, points, strict=True))
        kept = sum(weights[u] * p.kept for u, p in picked.items()) / total
        error = sum(weights[u] * p.error for u, p in picked.items()) / total
        found.append(Choice(picked, kept, error, 0.0))
    return found


def test_a_hull_is_below_every_point_and_convex() -> None:
    for seed in range(50):
        curve = random_curves(seed, 1, 9)["u0"]
        hull = lower_hull(curve)
        slopes = [(a.error - b.error) / (b.kept - a.kept) for a, b in itertools.pairwise(hull)]
        assert slopes == sorted(slopes, reverse=True) and min(slopes) > 0
        for point in curve:
            if point.kept < hull[0].kept:
                pytest.fail("a cheaper point is missing")
            for a, b in itertools.pairwise(hull):
                if a.kept <= point.kept <= b.kept:
                    line = a.error + (b.error - a.error) * (point.kept - a.kept) / (b.kept - a.kept)
                    assert point.error >= line - 1e-12


def test_points_of_equal_kept_fraction_leave_the_better_one() -> None:
    curve = [Point(0.5, 0.3, "virtual"), Point(0.5, 0.2, "drop"), Point(1.0, 0.0, "dense")]
    assert lower_hull(curve) == [Point(0.5, 0.2, "drop"), Point(1.0, 0.0, "dense")]


@pytest.mark.parametrize("seed", range(30))
def test_no_choice_of_the_same_cost_on_the_hulls_corners_is_better(seed: int) -> None:
    """At the kept fraction that a multiplier gives, nothing that keeps as little errs less."""
    curves = random_curves(seed)
    weights = {"u0": 1.0, "u1": 2.0, "u2": 0.5}
    everything = every_choice(curves, weights)
    for error in (0.5, 0.3, 0.1, 0.02):
        found = choose(curves, error=error, weights=weights)
        assert found.error <= error + 1e-12
        rivals = [c for c in everything if c.kept <= found.kept - 1e-12]
        assert all(c.error >= found.error - 1e-9 for c in rivals)


@pytest.mark.parametrize("seed", range(30))
def test_a_budget_is_kept_and_nothing_that_fits_is_left_lying(seed: int) -> None:
    curves = random_curves(seed)
    least = choose(curves, error=10.0).kept
    for kept in (least, 0.4, 0.6, 0.9, 1.0):
        if kept < least:
            continue
        found = choose(curves, kept=kept)
        assert found.kept <= kept + 1e-9
        assert found.kept == pytest.approx(sum(p.kept for p in found.points.values()) / 3)
        assert found.error == pytest.approx(sum(p.error for p in found.points.values()) / 3)
        for unit, point in found.points.items():
            hull = lower_hull(curves[unit])
            beyond = hull[hull.index(point) + 1 :]
            assert not beyond or found.kept + (beyond[0].kept - point.kept) / 3 > kept


def test_the_multiplier_is_the_price_of_the_next_step() -> None:
    curves = {"a": [Point(0.2, 1.0, "drop"), Point(0.4, 0.2, "drop"), Point(1.0, 0.0, "dense")]}
    assert choose(curves, error=0.2).slope == pytest.approx(0.2 / 0.6)
    assert choose(curves, error=1.0).slope == pytest.approx(0.8 / 0.2)
    assert choose(curves, kept=1.0).slope == 0.0


def test_what_cannot_be_had_is_refused_with_what_can() -> None:
    curves = {"a": [Point(0.3, 0.5, "drop"), Point(0.6, 0.1, "drop")]}
    with pytest.raises(BadParameter, match=r"kept=0\.2 cannot be reached: .* keeps 0\.3"):
        choose(curves, kept=0.2)
    with pytest.raises(BadParameter, match=r"error=0\.05 cannot be reached: .* has 0\.1"):
        choose(curves, error=0.05)
    with pytest.raises(BadParameter, match="give exactly one"):
        choose(curves)
    with pytest.raises(BadParameter, match="no curve"):
        choose({}, kept=0.5)
