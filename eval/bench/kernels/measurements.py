"""A run of many measurements on one device: each is written as it is made, and none is all lost.

What fails is named where it failed, what hangs ends the run with what there is, what there is no
time for is written as not measured, and after a GPU that answers no more nothing is tried.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from diffpatch.eval.bench.kernels.watch import Watch

Result = dict[str, Any]
Say = Callable[[str], None]


class DeviceLost(RuntimeError):
    """The GPU answers no more: nothing can be measured after this in the same process."""


@dataclass
class Measurements:
    """What measurements share: the device, the time, and whether the GPU answers.

    Attributes:
        device: where everything runs.
        limit: seconds after which nothing should be running; None for no limit.
        say: told what is measured.
        save: given `result` after every measurement.
        result: what there is so far, ready for JSON: lists of rows by kind.
        current: kind and row of what is measured now.
        longest: seconds of the longest row of each kind.
        lost: why nothing can be measured any more.
    """

    device: torch.device
    limit: float | None
    say: Say
    save: Callable[[Result], None]
    result: Result
    current: tuple[str, Result] = ("", {})
    began: float = field(default_factory=lambda: time.perf_counter())
    longest: dict[str, float] = field(default_factory=dict)
    lost: str | None = None

    def spent(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self.began

    def add(
        self, kind: str, row: Result, measure: Callable[[Watch], Result], expected: float = 0.0
    ) -> None:
        """Measure a row, or say why not, and save what there is.

        Args:
            kind: the list of the result that it goes to.
            row: what it is about.
            measure: makes the rest of it, watched.
            expected: seconds that it may take, where no row of its kind has taken longer yet.
        """
        about = ", ".join(str(value) for value in row.values() if value is not None)
        self.say(f"{self.spent():.0f} s: {kind}: {about}")
        self.current = kind, row
        self._end(self._outcome(kind, measure, expected))

    def hung(self, reason: str) -> None:
        """End the process, as nothing else ends a kernel that waits for itself."""
        self._end({"failed": f"hangs: {reason}; the rest was not measured"})
        os._exit(1)

    def _end(self, outcome: Result) -> None:
        kind, row = self.current
        reason = reason_of(outcome)
        if reason:
            self.say(f"  {reason}")
        self.result.setdefault(kind, []).append(row | outcome)
        self.result["seconds"] = self.spent()
        self.save(self.result)

    def _outcome(self, kind: str, measure: Callable[[Watch], Result], expected: float) -> Result:
        """What was measured, or why nothing was."""
        if self.lost:
            return {"failed": self.lost}
        began, longest = self.spent(), self.longest.get(kind, 0.0)
        if self.limit is not None and began + max(longest, expected) > self.limit:
            return {"not_measured": f"{began:.0f} of {self.limit:.0f} seconds are over"}
        try:
            outcome = measure(Watch(self.device, self.say, self.hung))
        except DeviceLost as error:
            self.lost = f"the GPU answers no more: {error}"
            return {"failed": self.lost}
        except Exception as error:  # of any kind: the other rows are worth having
            outcome = self._failed(error)
        outcome["row_seconds"] = self.spent() - began
        self.longest[kind] = max(longest, outcome["row_seconds"])
        return outcome

    def _failed(self, error: Exception) -> Result:
        try:
            return {"failed": failure(error, self.device)}
        except DeviceLost as lost:
            self.lost = f"the GPU answers no more: {lost}"
            return {"failed": self.lost}


def failure(error: Exception, device: torch.device) -> str:
    """What to write about an error that is over; the memory it leaves is given back.

    Raises:
        DeviceLost: it is not over, as every use of the GPU fails from now on.
    """
    words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if device.type != "cpu":
        try:
            torch.accelerator.synchronize(device)
            torch.accelerator.empty_cache()
        except RuntimeError:
            raise DeviceLost(words) from error
    return words


def reason_of(row: Result) -> str:
    """Why a row or an entry of it has no speed, or nothing."""
    if "failed" in row:
        return f"failed: {row['failed']}"
    return f"not measured: {row['not_measured']}" if "not_measured" in row else ""
