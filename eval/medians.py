"""What is said of several measurements of one thing."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from statistics import fmean, median, quantiles

RESAMPLES = 2000
INSIDE = 0.95  # of the resampled means


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles, as `median`, `low` and `high`."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return {"median": median(values), "low": low, "high": high}


def paired_interval(differences: Sequence[float]) -> dict[str, float]:
    """The mean of paired differences and its 95 % bootstrap interval: `mean`, `low` and `high`.

    What is drawn again, with replacement, is the pairs: a difference of two methods on each prompt.
    The same differences give the same interval.

    Args:
        differences: one a prompt, at least one.
    """
    random, count = Random(0), len(differences)
    means = sorted(fmean(random.choices(differences, k=count)) for _ in range(RESAMPLES))
    outside = round((1 - INSIDE) / 2 * RESAMPLES)
    return {
        "mean": fmean(differences),
        "low": means[outside],
        "high": means[RESAMPLES - 1 - outside],
    }
