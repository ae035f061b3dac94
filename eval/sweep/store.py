"""The folder of a sweep: results that appear whole or not at all, and claims that die with us.

    runs/<name>/run.json, frames.npz, clip.mp4     one run, moved into place in one step
    failed/<name>.json                             one that failed, with its traceback
    claims.lock                                    who works on what

A claim is a lock on one byte of a file, which the system lifts when its process ends, however it
ends: nothing is left locked after a `kill -9`, and nobody does what another process is doing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import traceback
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from diffpatch.eval.media import load_frames
from diffpatch.eval.sweep.plan import Rendering
from diffpatch.eval.sweep.schema import BadSweep
from diffpatch.files import DamagedFile, naming, read_json, write_json

SLOTS = 64  # processes that can be told apart; their bytes follow those of all runs
FIRST_SLOT = 2**52
CLOCKS_APART = 60.0  # seconds between the clocks of machines that share a folder, at most


class Store:
    """The folder of a sweep, open for work by this process."""

    def __init__(self, root: Path) -> None:
        """Create the folder if it is not there.

        Raises:
            BadSweep: something else is at that place, or it cannot be written to.
        """
        self.root = root
        try:
            for folder in (self.runs, self.failures):
                folder.mkdir(parents=True, exist_ok=True)
            self._locks = os.open(root / "claims.lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise BadSweep(
                f"{root} cannot be written to ({error.strerror}); choose another -o"
            ) from None
        free = (n for n in range(SLOTS) if self._lock(FIRST_SLOT + n))
        self._slot = next(free, None)

    @property
    def runs(self) -> Path:
        """Where finished runs are."""
        return self.root / "runs"

    @property
    def failures(self) -> Path:
        """Where failed runs are."""
        return self.root / "failed"

    def close(self) -> None:
        """Lift all claims."""
        os.close(self._locks)

    def result(self, run: Rendering) -> dict[str, Any] | None:
        """What a finished run found out; None if it is not finished."""
        return read_json(self.runs / run.name / "run.json")

    def is_done(self, run: Rendering) -> bool:
        """Whether the run is finished: run.json is the last thing to appear."""
        return (self.runs / run.name / "run.json").is_file()

    def failure(self, run: Rendering) -> dict[str, Any] | None:
        """How a run failed; None if it did not."""
        return read_json(self.failures / f"{run.name}.json")

    def is_pending(self, run: Rendering) -> bool:
        """Whether the run has neither finished nor failed."""
        return not self.is_done(run) and not (self.failures / f"{run.name}.json").exists()

    def mend(self, run: Rendering) -> str | None:
        """Put away what is damaged of a run that nobody works on, so that it is done again.

        Returns:
            The file that was damaged; None if nothing was.
        """
        with self.claim(run) as mine:
            damaged = self._damaged(run) if mine else None
            if damaged is not None and damaged.parent == self.failures:
                damaged.unlink()
            elif damaged is not None:
                shutil.rmtree(damaged.parent)
        return None if damaged is None else str(damaged)

    def _damaged(self, run: Rendering) -> Path | None:
        frames = self.runs / run.name / "frames.npz"
        for path in (self.runs / run.name / "run.json", self.failures / f"{run.name}.json"):
            try:
                found = read_json(path)
            except DamagedFile:
                return path
            if found is not None and not isinstance(found, dict):
                return path
        return frames if frames.exists() and not zipfile.is_zipfile(frames) else None

    def frames(self, run: Rendering) -> torch.Tensor:
        """The frames of a finished run: float32 (F, 3, H, W) in [0, 1], in steps of 1/255."""
        return load_frames(self.runs / run.name / "frames.npz")

    @contextlib.contextmanager
    def claim(self, run: Rendering, wait: bool = False) -> Iterator[bool]:
        """Keep others from a run; yields whether that worked, which it does if we `wait`."""
        byte = int(run.key, 16)
        mine = self._lock(byte, wait)
        try:
            yield mine
        finally:
            if mine:
                self._unlock(byte)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other process is in such a block, for what is written once."""
        byte = FIRST_SLOT + SLOTS
        self._lock(byte, wait=True)
        try:
            yield
        finally:
            self._unlock(byte)

    def others(self) -> int:
        """How many other processes work on this sweep now."""
        count = 0
        for number in range(SLOTS):
            if number == self._slot:
                continue
            if self._lock(FIRST_SLOT + number):
                self._unlock(FIRST_SLOT + number)
            else:
                count += 1
        return count

    def finish(self, run: Rendering, data: Mapping[str, Any], stage: Path) -> None:
        """Add run.json to the files in `stage` and make them the result of the run, in one step."""
        write_json(stage / "run.json", data)
        if (self.runs / run.name).is_dir():  # what was left by somebody else's clean-up, say
            shutil.rmtree(self.runs / run.name)
        # An earlier failure goes first: killed in between, the run is pending, and never both.
        (self.failures / f"{run.name}.json").unlink(missing_ok=True)
        os.replace(stage, self.runs / run.name)

    @contextlib.contextmanager
    def stage(self, run: Rendering) -> Iterator[Path]:
        """An empty folder for the files of a run that we claimed; gone afterwards."""
        folder = self.root / f".partial-{run.name}"
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
        folder.mkdir()
        try:
            with naming(folder):
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def fail(self, run: Rendering, error: BaseException, facts: Mapping[str, Any]) -> None:
        """Record why a run failed."""
        text = "".join(traceback.format_exception(error))
        summary = f"{type(error).__name__}: {error}"
        data = {**facts, "error": summary, "traceback": text}
        write_json(self.failures / f"{run.name}.json", data)

    def forget_failures(self, before: float) -> int:
        """Drop the failures older than a time stamp, so that these runs are tried again.

        Those from the future are older, too: the clock was put back since.
        """
        count = 0
        for path in self.failures.glob("*.json"):
            with contextlib.suppress(FileNotFoundError):  # another process was quicker
                if not before <= path.stat().st_mtime <= time.time() + CLOCKS_APART:
                    path.unlink()
                    count += 1
        return count

    def _lock(self, byte: int, wait: bool = False) -> bool:
        import fcntl  # not on Windows, where the rest of the command line still works

        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, byte)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def _unlock(self, byte: int) -> None:
        import fcntl

        with contextlib.suppress(OSError):  # the store was closed, which lifted everything
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, byte)
