"""What methods change beyond the trained size: the rotary embedding, and the softmax."""

from __future__ import annotations

from dataclasses import dataclass

CUT = "it slows a frequency of the rotary embedding down, which is cut over several processes here"


@dataclass(frozen=True)
class Slowing:
    """Which frequencies are slowed down until one period spans the clip or picture.

    Attributes:
        trained: frames, rows and columns of tokens in training; an axis is changed where there are
            more, None leaves it alone.
        count: how many frequencies of an axis, from the one whose period is nearest to the trained
            size (UltraImage); None for the first that repeats itself beyond it (RIFLEx).
        advice: how to use the method without.
    """

    trained: tuple[int | None, int | None, int | None]
    count: int | None
    advice: str


def sharpened(scale: float | None, factor: float, head_dim: int) -> float | None:
    """The factor on q·k times another one; None means 1 / sqrt(D), before and after."""
    if factor == 1:
        return scale
    return factor * (head_dim**-0.5 if scale is None else scale)
