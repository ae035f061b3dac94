"""The front of quality against time: sparse attention, steps that are cached or held, and both.

The points of the front were rendered (`diffpatch.tuning.front`). If two of them differ in one thing
only, points between them are predicted by a straight line. That thing is the kept fraction of
attention, the number of dense steps, the threshold of the cache, or the tolerance of held steps.
PSNR is a line over the logarithm of the fraction, threshold or tolerance, and over the dense steps
themselves; time is a line over the fraction and over the dense steps.

PSNR above `FINEST` counts as `FINEST`: nobody sees the difference, and prompts differ most there.

One prompt is harder than another by about the same amount at every point, so the spread over
prompts is pooled over all points. A point's `low` is the PSNR that four of five prompts reach.
A few prompts say little about the spread, so `USUAL_SPREAD` is added to it with the weight of
`USUAL_WEIGHT` prompts.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from diffpatch.errors import BadParameter
from diffpatch.targets.settings import Measured

BETWEEN = 8  # parts into which the way between two measured points is cut
FINEST = 50.0  # dB
FOUR_OF_FIVE = 0.8416  # standard deviations below the mean that leave one of five below
USUAL_SPREAD = 3.0  # dB between prompts, where nothing is known: on twelve of the demo model 2.1
# with sparse attention in 8 steps and 3.6 with a cache in 30
USUAL_WEIGHT = 2


@dataclass(frozen=True)
class Applied:
    """One way to run a model.

    Attributes:
        sparse: kept fraction of sparse attention calls; 1 leaves all attention dense.
        dense_steps: first steps that stay dense, as a fraction of the run.
        cache: threshold of the step cache; None without a cache.
        hold: tolerance within which steps are held; None if none are.
    """

    sparse: float
    dense_steps: float
    cache: float | None = None
    hold: float | None = None

    @property
    def skips(self) -> bool:
        """Whether it leaves steps out, in part or as a whole."""
        return self.cache is not None or self.hold is not None

    @property
    def label(self) -> str:
        """A name such as "attention 25% after 15% + cache 0.1": the first 15 % stay dense."""
        parts = []
        if self.sparse < 1:
            parts = [f"attention {100 * self.sparse:.3g}% after {100 * self.dense_steps:.3g}%"]
        parts += [f"cache {self.cache:g}"] if self.cache is not None else []
        parts += [f"hold {self.hold:g}"] if self.hold is not None else []
        return " + ".join(parts) or "dense"


@dataclass(frozen=True)
class FrontPoint:
    """What to expect of one way to run a model.

    Attributes:
        applied: that way.
        psnr: mean PSNR over the prompts, in dB.
        spread: standard deviation of the PSNR of another prompt from that mean, in dB.
        time: time of the denoising, as a fraction of the dense time.
        calls: fraction of the attention calls that is made in spite of the cache.
        measured: True if it was rendered; False if it is predicted from two that were.
    """

    applied: Applied
    psnr: float
    spread: float
    time: float
    calls: float = 1.0
    measured: bool = True

    @property
    def low(self) -> float:
        """PSNR that four of five prompts reach, in dB."""
        return self.psnr - FOUR_OF_FIVE * self.spread


def measured_points(front: Sequence[Measured]) -> list[FrontPoint]:
    """One point for each way that was rendered with all prompts, fastest first."""
    groups: dict[Applied, list[Measured]] = defaultdict(list)
    for run in front:
        groups[Applied(run.sparse, run.dense_steps, run.cache, run.hold)].append(run)
    most = max((len(runs) for runs in groups.values()), default=0)
    whole = {applied: runs for applied, runs in groups.items() if len(runs) == most}
    spread = _spread([[min(run.psnr, FINEST) for run in runs] for runs in whole.values()])
    points = [
        FrontPoint(
            applied,
            psnr=statistics.fmean(min(run.psnr, FINEST) for run in runs),
            spread=spread,
            time=statistics.geometric_mean(run.seconds / run.dense_seconds for run in runs),
            calls=statistics.fmean(run.calls for run in runs),
        )
        for applied, runs in whole.items()
    ]
    return sorted(points, key=lambda point: point.time)


def _spread(groups: Sequence[Sequence[float]]) -> float:
    """Standard deviation of another prompt's PSNR from the mean of those that were measured."""
    count = min(map(len, groups), default=0)
    if not count:
        return 0.0
    pooled = statistics.fmean(statistics.variance(g) for g in groups) if count > 1 else 0.0
    told = USUAL_WEIGHT + count - 1
    usual = (USUAL_WEIGHT * USUAL_SPREAD**2 + (count - 1) * pooled) / told
    return math.sqrt(usual * (1 + 1 / count))


def with_between(points: Iterable[FrontPoint]) -> list[FrontPoint]:
    """The points, and predicted ones between neighbours that differ in one thing; fastest first.

    Nothing is predicted between sparse and dense attention, which different kernels compute.
    """
    points = list(points)
    found = list(points)
    for name, (differs, between) in _LINES.items():
        lines: dict[Applied, list[FrontPoint]] = defaultdict(list)
        same: dict[str, Any] = {name: 0.0}
        for point in filter(differs, points):
            lines[replace(point.applied, **same)].append(point)
        for line in lines.values():
            found += _cut(line, name, between)
    return sorted(found, key=lambda point: point.time)


Between = Callable[[FrontPoint, FrontPoint, float], FrontPoint]


def _value(point: FrontPoint, name: str) -> float:
    """What a point applies of one thing; 0 where that is nothing."""
    return getattr(point.applied, name) or 0.0


def _cut(line: Sequence[FrontPoint], name: str, between: Between) -> list[FrontPoint]:
    pairs = itertools.pairwise(sorted(line, key=lambda point: _value(point, name)))
    return [between(low, high, n / BETWEEN) for low, high in pairs for n in range(1, BETWEEN)]


def _between_kept(low: FrontPoint, high: FrontPoint, part: float) -> FrontPoint:
    least, most = low.applied.sparse, high.applied.sparse
    sparse = least * (most / least) ** part
    linear = (sparse - least) / (most - least)
    return _mixed(low, high, part, linear, replace(low.applied, sparse=sparse))


def _between_steps(low: FrontPoint, high: FrontPoint, part: float) -> FrontPoint:
    few, many = low.applied.dense_steps, high.applied.dense_steps
    steps = round(few + part * (many - few), 4)
    return _mixed(low, high, part, part, replace(low.applied, dense_steps=steps))


def _between_limits(name: str, low: FrontPoint, high: FrontPoint, part: float) -> FrontPoint:
    least, most = _value(low, name), _value(high, name)
    limit: dict[str, Any] = {name: float(f"{least * (most / least) ** part:.3g}")}
    return _mixed(low, high, part, part, replace(low.applied, **limit))


def _is_sparse(point: FrontPoint) -> bool:
    return point.applied.sparse < 1


# The one thing in which neighbours on a line differ: of which points, and what is between them.
_LINES: dict[str, tuple[Callable[[FrontPoint], bool], Between]] = {
    "sparse": (_is_sparse, _between_kept),
    "dense_steps": (_is_sparse, _between_steps),
    "cache": (lambda p: p.applied.cache is not None, partial(_between_limits, "cache")),
    "hold": (lambda p: p.applied.hold is not None, partial(_between_limits, "hold")),
}


def _mixed(
    low: FrontPoint, high: FrontPoint, part: float, linear: float, applied: Applied
) -> FrontPoint:
    """PSNR at one part of the way from low to high, times at another."""
    return FrontPoint(
        applied,
        low.psnr + part * (high.psnr - low.psnr),
        low.spread,
        low.time + linear * (high.time - low.time),
        low.calls + linear * (high.calls - low.calls),
        measured=False,
    )


def pareto(points: Iterable[FrontPoint]) -> list[FrontPoint]:
    """The points that are better than every faster one, fastest first."""
    front: list[FrontPoint] = []
    for point in sorted(points, key=lambda point: (point.time, -point.psnr)):
        if not front or point.psnr > front[-1].psnr:
            front.append(point)
    return front


def time_at(points: Iterable[FrontPoint], psnr: float) -> float | None:
    """Time of the fastest point that reaches a mean PSNR; None where none does."""
    return min((point.time for point in points if point.psnr >= psnr - 1e-9), default=None)


def fastest(front: Sequence[Measured], psnr: float, target: str) -> FrontPoint:
    """The fastest point at which four of five prompts reach a PSNR.

    Raises:
        BadParameter: no point that is faster than dense does; the message names the best one.
    """
    points = [point for point in with_between(measured_points(front)) if point.time < 1]
    fitting = [point for point in points if point.low >= psnr]
    if fitting:
        return min(fitting, key=lambda point: point.time)
    best = max(points, key=lambda point: point.low, default=None)
    had = "nothing that was measured is faster than dense"
    if best is not None:
        had = (
            f"the best that is faster than dense has {best.low:.1f} dB in four of five prompts"
            f" ({best.applied.label}, {1 / best.time:.2f}×)"
        )
    raise BadParameter(f"target={target!r} cannot be reached: {had}")


def best_within(front: Sequence[Measured], time: float, target: str) -> FrontPoint:
    """The best point that takes at most a given fraction of the dense time.

    Raises:
        BadParameter: no point is that fast; the message names the fastest.
    """
    points = with_between(measured_points(front))
    fitting = [point for point in points if point.time <= time]
    if fitting:
        return max(fitting, key=lambda point: point.low)
    best = points[0]
    raise BadParameter(
        f"target={target!r} cannot be reached: the fastest that was measured is"
        f" {1 / best.time:.2f}× at {best.psnr:.1f} dB ({best.applied.label})"
    )
