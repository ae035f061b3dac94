"""Many prompts over many processes and many attempts: which of them are left for this process.

Started by ``accelerate launch`` or ``torchrun``, processes take turns in the list of prompts, each
on the accelerator of its own local rank. Nothing is exchanged: every prompt has a folder of its
own, whose files appear whole or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffpatch.cli import output
from diffpatch.cli.errors import UsageError


@dataclass(frozen=True)
class Process:
    """One of the processes that share a command.

    Attributes:
        rank: its number, from 0.
        count: how many there are.
        local_rank: its number on this machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @classmethod
    def current(cls, environment: Mapping[str, str] = os.environ) -> Process:
        """This process, as its launcher describes it; alone without one."""
        rank, count = (int(environment.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1)))
        return cls(rank, count, int(environment.get("LOCAL_RANK", rank)))

    def device(self, asked: str | None) -> str | None:
        """The device asked for, or this process's own accelerator where there are several."""
        accelerator = torch.accelerator.current_accelerator()
        if asked is not None or self.count == 1 or accelerator is None:
            return asked
        return f"{accelerator.type}:{self.local_rank}"

    def share(self, total: int) -> list[int]:
        """Which of so many prompts are rendered here."""
        return list(range(self.rank, total, self.count))


def is_finished(
    files: Mapping[str, Path], expected: Mapping[str, Any], runs: Mapping[str, Any]
) -> bool:
    """Whether an earlier attempt wrote all files, with the same request.

    Args:
        files: what is written for one prompt, the result file under "result".
        expected: entries of the result that must be the same.
        runs: the options of every run in it, by name.

    Raises:
        UsageError: they are complete and of another request.
    """
    if not all(path.exists() for path in files.values()):
        return False
    result = json.loads(files["result"].read_text(encoding="utf-8"))
    result["runs"] = {name: run.get("options", {}) for name, run in result["runs"].items()}
    wanted = json.loads(output.to_json({**expected, "runs": runs}))
    other = next((key for key in wanted if result.get(key) != wanted[key]), None)
    if other is not None:
        raise UsageError(
            f"{files['result']} is of another request: its {other} is"
            f" {_short(result.get(other))}, not {_short(wanted[other])}; repeat that request, add"
            " --overwrite instead of --resume, or choose another -o"
        )
    return True


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
