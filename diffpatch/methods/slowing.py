"""What a method asks of the rotary embedding of a model that goes beyond its trained size."""

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
