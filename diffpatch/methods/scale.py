"""The factor on scores in a softmax."""

from __future__ import annotations


def sharpened(scale: float | None, factor: float, head_dim: int) -> float | None:
    """The factor on q·k times another one; None means 1 / sqrt(D), before and after."""
    return scale if factor == 1 else factor * (scale or head_dim**-0.5)
