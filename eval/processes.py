"""Processes that share a measurement: each measures its own clips, and all get the same result."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

_T = TypeVar("_T")
_PATIENCE = datetime.timedelta(days=1)  # the first to finish waits for the slowest


@dataclass(frozen=True)
class Team:
    """One of the processes that `accelerate launch` or `torchrun` started, or a single one.

    Attributes:
        rank: the number of this process, from 0.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    def mine(self, items: Sequence[_T]) -> Sequence[_T]:
        """What this process measures: processes take turns in the list."""
        return items[self.rank :: self.count]

    def gather(self, part: _T) -> list[_T]:
        """The parts of all processes, in their order; every process has to call it.

        They travel over gloo, from main memory to main memory, whatever the accelerator is.
        """
        if self.count == 1:
            return [part]
        from torch import distributed

        if not distributed.is_initialized():
            distributed.init_process_group("gloo", timeout=_PATIENCE)
        parts: list[Any] = [None] * self.count
        distributed.all_gather_object(parts, part)
        return parts
