"""Curves of error against kept fraction, and how a budget is divided among units.

Every *unit* (such as a head of a layer) has a curve. Each of its points is a rule and a size that
were tried: the fraction kept, and the distance of the output from dense. The best choice for a
multiplier λ minimises Σ error + λ Σ kept, so it only uses points on the lower convex hulls of the
curves. `choose` therefore walks down the hulls, taking their segments steepest first until the
budget is spent. The rest of the budget goes to the steepest segments that still fit (Everett,
Operations Research 11(3), 1963).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from diffpatch.errors import BadParameter

Unit = TypeVar("Unit")


class OutOfReach(BadParameter):
    """No choice is that small.

    Args:
        what: "kept" or "error".
        wanted: the largest value that was asked for.
        best: the least that can be had.
    """

    def __init__(self, what: str, wanted: float, best: float) -> None:
        had = "least that was measured keeps" if what == "kept" else "best that was measured has"
        super().__init__(f"{what}={wanted:.3g} cannot be reached: the {had} {best:.3g}")
        self.best = best


@dataclass(frozen=True, order=True)
class Point:
    """One setting of a unit that was tried.

    Attributes:
        kept: fraction of the query-key pairs that was computed.
        error: distance of the unit's output from dense; any measure that adds up over units.
        rule: what became of the other pairs, such as "virtual" or "drop".
    """

    kept: float
    error: float
    rule: str


Curve = Sequence[Point]


@dataclass(frozen=True)
class Choice:
    """One point chosen for every unit.

    Attributes:
        points: unit -> its point.
        kept: weighted mean of the kept fractions.
        error: weighted mean of the errors.
        slope: the multiplier λ for which this choice is the best: error saved per further kept
            fraction; 0 if nothing is left to save.
    """

    points: Mapping[str, Point]
    kept: float
    error: float
    slope: float


def lower_hull(curve: Curve) -> list[Point]:
    """The points of a curve that no mixture of other points beats, by ascending kept fraction.

    Errors fall along the hull, ever more slowly. Of equal points, the one whose rule comes first by
    name stays.
    """
    hull: list[Point] = []
    for point in sorted(curve):
        if hull and (point.kept == hull[-1].kept or point.error >= hull[-1].error):
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: Point, b: Point) -> float:
    """Error saved per kept fraction on the way from a to b; b keeps more."""
    return (a.error - b.error) / (b.kept - a.kept)


def choose(
    curves: Mapping[str, Curve],
    *,
    kept: float | None = None,
    error: float | None = None,
    weights: Mapping[str, float] | None = None,
) -> Choice:
    """The choice of least error within a kept fraction, or of least kept fraction within an error.

    Args:
        curves: unit -> its curve, which has at least one point.
        kept: largest mean kept fraction, in (0, 1].
        error: largest mean error, at least 0.
        weights: unit -> its share of the pairs, if units differ in size; None weights all alike.

    Raises:
        BadParameter: not exactly one of `kept` and `error` is given.
        OutOfReach: it cannot be reached.
    """
    if (kept is None) == (error is None):
        raise BadParameter(f"kept={kept} and error={error}: give exactly one of them")
    share = _shares(curves, weights)
    hulls = {unit: lower_hull(curve) for unit, curve in curves.items()}
    at = dict.fromkeys(hulls, 0)
    spent = math.fsum(share[u] * hull[0].kept for u, hull in hulls.items())
    made = math.fsum(share[u] * hull[0].error for u, hull in hulls.items())
    _refuse_impossible(hulls, share, kept, error, spent)
    steepest = [(-_slope(hull[0], hull[1]), u) for u, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steepest)
    slope = 0.0
    while steepest and (error is None or made > error):
        negative, unit = heapq.heappop(steepest)
        hull, place = hulls[unit], at[unit]
        dearer = spent + share[unit] * (hull[place + 1].kept - hull[place].kept)
        if kept is not None and dearer > kept * (1 + 1e-12):
            slope = slope or -negative  # this unit is done; others may still have a step that fits
            continue
        spent = dearer
        made -= share[unit] * (hull[place].error - hull[place + 1].error)
        at[unit] = place + 1
        if place + 2 < len(hull):
            heapq.heappush(steepest, (-_slope(hull[place + 1], hull[place + 2]), unit))
    if error is not None and steepest:
        slope = -steepest[0][0]
    points = {unit: hull[at[unit]] for unit, hull in hulls.items()}
    return Choice(points, spent, max(made, 0.0), slope)


def _shares(curves: Mapping[str, Curve], weights: Mapping[str, float] | None) -> dict[str, float]:
    if not curves:
        raise BadParameter("there is no curve to choose from")
    found = dict.fromkeys(curves, 1.0) if weights is None else {u: weights[u] for u in curves}
    total = math.fsum(found.values())
    return {unit: weight / total for unit, weight in found.items()}


def _refuse_impossible(
    hulls: Mapping[str, list[Point]],
    share: Mapping[str, float],
    kept: float | None,
    error: float | None,
    least: float,
) -> None:
    if kept is not None and not least <= kept * (1 + 1e-12):
        raise OutOfReach("kept", kept, least)
    best = math.fsum(share[u] * hull[-1].error for u, hull in hulls.items())
    if error is not None and not best <= error * (1 + 1e-12):
        raise OutOfReach("error", error, best)
