"""Faults at every operation on files, one after the other: what a test needs to inject them."""

from __future__ import annotations

import errno
import os
import pathlib
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

OPERATIONS: tuple[tuple[Any, str], ...] = (
    (os, "replace"), (os, "fsync"), (os, "mkdir"), (os, "unlink"), (shutil, "rmtree"),
    (pathlib.Path, "open"), (pathlib.Path, "mkdir"), (pathlib.Path, "unlink"),
    (pathlib.Path, "replace"), (pathlib.Path, "write_text"),
)  # fmt: skip
Fault = Callable[[], None]


def kill() -> None:
    """As `kill -9` from outside."""
    os.kill(os.getpid(), signal.SIGKILL)


def full() -> None:
    """No space is left."""
    raise OSError(errno.ENOSPC, "No space left on device")


def read_only() -> None:
    """The folder became read-only, as a share that was lost."""
    raise OSError(errno.EROFS, "Read-only file system")


class At:
    """Within this, operation number `number` on files fails; every later one too, if `lasting`.

    Attributes:
        count: operations so far; the fault was met if there are more than `number`.
    """

    def __init__(self, number: int, fault: Fault, lasting: bool = False) -> None:
        self.count, self._number, self._fault, self._lasting = 0, number, fault, lasting
        self._patches = [
            mock.patch.object(owner, name, self._wrapped(owner, name)) for owner, name in OPERATIONS
        ]

    def _wrapped(self, owner: Any, name: str) -> Any:
        real = getattr(owner, name)

        def operation(*args: Any, **kwargs: Any) -> Any:
            number = self.count
            self.count += 1
            if number == self._number or (self._lasting and number > self._number):
                self._fault()
            return real(*args, **kwargs)

        return operation

    def __enter__(self) -> At:
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self._patches:
            patch.stop()


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Do something in a process of its own, which is killed at that operation; whether it was."""
    child = os.fork()
    if child == 0:
        try:
            with At(number, kill):
                work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def note(root: Path, name: str) -> None:
    """Add a line that no injected fault can touch."""
    file = os.open(root / "noted", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, f"{name}\n".encode())
    os.close(file)


def noted(root: Path) -> list[str]:
    """The lines so far."""
    path = root / "noted"
    return path.read_text().splitlines() if path.exists() else []
