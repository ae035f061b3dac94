"""Processes that share a command, as `accelerate launch` or torchrun starts them."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from diffpatch.pipelines.running.loading import choose_device

_T = TypeVar("_T")
_PATIENCE = datetime.timedelta(days=1)  # the first to finish waits for the slowest


@dataclass(frozen=True)
class Process:
    """One of the processes that share a command, or the only one.

    Attributes:
        rank: its number, from 0.
        count: how many there are.
        local_rank: its number on this machine.
        local_count: how many there are on this machine; None if all of them.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int | None = None

    @classmethod
    def current(cls, environment: Mapping[str, str] = os.environ) -> Process:
        """This process, as its launcher describes it; the only one without a launcher."""
        rank, count = (int(environment.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1)))
        beside = environment.get("LOCAL_WORLD_SIZE")
        local_rank = int(environment.get("LOCAL_RANK", rank))
        return cls(rank, count, local_rank, None if beside is None else int(beside))

    def device(self, asked: str | None = None) -> str:
        """The device asked for, else this process's own accelerator, else the CPU.

        Raises:
            ModelError: the device asked for is not available.
        """
        chosen = choose_device(asked)
        if asked is not None or self.count == 1 or chosen.type == "cpu":
            return str(chosen)
        return f"{chosen.type}:{self.local_rank % torch.accelerator.device_count()}"

    def crowded(self, asked: str | None = None) -> bool:
        """Whether several processes compute on one device, which spoils their clocks."""
        dealt = asked is None and choose_device().type != "cpu"  # a device a process
        beside = self.count if self.local_count is None else self.local_count
        return beside > (torch.accelerator.device_count() if dealt else 1)

    def mine(self, items: Sequence[_T]) -> Sequence[_T]:
        """What this process does of a list: processes take turns in it."""
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
