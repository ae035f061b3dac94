"""What is said of several measurements of one thing."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median, quantiles


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles, as `median`, `low` and `high`."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return {"median": median(values), "low": low, "high": high}
