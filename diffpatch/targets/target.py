"""What a user asks for, read from one text: a quality, a kept fraction, an error or a speedup."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from diffpatch.errors import BadParameter

Goal = Literal["psnr", "kept", "error", "speedup"]

_FORMS = (
    ("psnr", re.compile(r"([0-9.]+)\s*db", re.IGNORECASE)),
    ("kept", re.compile(r"kept\s*=?\s*([0-9.]+)\s*(%?)", re.IGNORECASE)),
    ("error", re.compile(r"error\s*=?\s*([0-9.]+)\s*(%?)", re.IGNORECASE)),
    ("speedup", re.compile(r"([0-9.]+)\s*[x×]", re.IGNORECASE)),
)
HELP = "'30 dB', 'kept 0.25', 'error 5%' or '2x'"


@dataclass(frozen=True)
class Target:
    """A goal and its value.

    Attributes:
        goal: "psnr" (at least that PSNR to the dense result, in dB), "kept" (at most that fraction
            of all pairs of a run), "error" (at most that mean relative L1 error of the attention)
            or "speedup" (at least that speedup of the whole denoising).
        value: in the unit of the goal; a fraction is not given in percent.
    """

    goal: Goal
    value: float

    @classmethod
    def parse(cls, text: object) -> Target:
        """Read a target such as '30 dB', 'kept 0.25', 'kept 25%', 'error 5%', '2x'.

        Raises:
            BadParameter: the text has another form, or its number is out of range.
        """
        words = text.strip() if isinstance(text, str) else ""
        for goal, form in _FORMS:
            if found := form.fullmatch(words):
                value = _number(found[1], text)
                if found.re.groups > 1 and found[2]:
                    value /= 100
                return cls(goal, value)._checked(text)  # type: ignore[arg-type]
        raise BadParameter(f"target={text!r} must be a text such as {HELP}")

    def _checked(self, text: object) -> Target:
        allowed = {
            "psnr": (0 < self.value <= 100, "above 0 and at most 100 dB"),
            "kept": (0 < self.value <= 1, "a fraction in (0, 1], or percent with %"),
            "error": (0 <= self.value < 1, "a fraction below 1, or percent with %"),
            "speedup": (self.value >= 1, "at least 1"),
        }
        fits, expected = allowed[self.goal]
        if not fits:
            raise BadParameter(f"target={text!r}: {self.goal} must be {expected}")
        return self

    def __str__(self) -> str:
        return {
            "psnr": f"{self.value:g} dB",
            "kept": f"kept {self.value:g}",
            "error": f"error {100 * self.value:g}%",
            "speedup": f"{self.value:g}x",
        }[self.goal]


def _number(digits: str, text: object) -> float:
    try:
        value = float(digits)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise BadParameter(f"target={text!r} must be a text such as {HELP}")
    return value
