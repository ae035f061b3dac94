"""PSNR predicted from the error of attention, and time predicted from the kept fraction.

Both predictions are straight lines, fitted to rendered pairs. PSNR is fitted against the logarithm
of the mean error: if pictures respond linearly to errors, it falls by 20 dB for ten times the
error. The time of a run, as a fraction of the dense time, is fitted against the kept fraction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffpatch.targets.settings import Rendered

FEWEST = 3  # pairs that a line with a spread needs
SMALLEST = 1e-6  # error below which pictures are as good as dense


@dataclass(frozen=True)
class FittedLine:
    """A straight line, y = at_zero + slope · x, and how far points lie from it.

    Attributes:
        at_zero: y at x = 0.
        slope: change of y per unit of x.
        spread: root mean square distance of each point from the line fitted to the others
            (leave-one-out), in units of y.
    """

    at_zero: float
    slope: float
    spread: float

    def at(self, x: float) -> float:
        """y at an x."""
        return self.at_zero + self.slope * x

    def where(self, y: float) -> float:
        """x at a y; the slope must not be 0."""
        return (y - self.at_zero) / self.slope


def fitted(x: Sequence[float], y: Sequence[float]) -> FittedLine | None:
    """The least-squares line; None if there are too few points, or all have the same x."""
    if len(x) < FEWEST or max(x) - min(x) < 1e-9:
        return None
    points, values = np.asarray(x), np.asarray(y)
    slope, at_zero = np.polyfit(points, values, 1)
    # The distance of a point from the line without it follows from its leverage.
    centred = points - points.mean()
    leverage = 1 / len(points) + centred**2 / (centred**2).sum()
    left_out = (values - at_zero - slope * points) / np.maximum(1 - leverage, 1e-9)
    return FittedLine(float(at_zero), float(slope), float(np.sqrt((left_out**2).mean())))


def quality_line(rendered: Sequence[Rendered]) -> FittedLine | None:
    """PSNR in dB against log10 of the error; None if there is no line, or it does not fall."""
    points = [(math.log10(max(pair.error, SMALLEST)), pair.psnr) for pair in rendered]
    line = fitted([x for x, _ in points], [y for _, y in points])
    return line if line is not None and line.slope < 0 else None


def time_line(rendered: Sequence[Rendered]) -> FittedLine | None:
    """Time of a run, as a fraction of the dense time, against the kept fraction; None if there is
    no line, or it does not rise."""
    line = fitted([p.kept for p in rendered], [p.seconds / p.dense_seconds for p in rendered])
    return line if line is not None and line.slope > 0 else None
