"""A measurement that hangs ends with what there is, instead of taking the machine with it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# Seconds that nothing takes on a device unless it hangs, the compilers included. A kernel that
# waits for itself cannot be stopped but by ending the process. CPUs do not hang.
HANGS_AFTER = {"cuda": 300.0}


class Watch:
    """What says what is done, and calls for help if it does not end.

    Args:
        device: where the work runs.
        say: told what begins.
        hung: called with what hangs, in a thread of its own while the main one waits.
    """

    def __init__(
        self, device: torch.device, say: Callable[[str], None], hung: Callable[[str], None]
    ) -> None:
        self._after, self._say, self._hung = HANGS_AFTER.get(device.type), say, hung

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Around the work."""
        self._say(f"  {what}")
        if self._after is None:
            yield
            return
        timer = threading.Timer(self._after, self._hung, [f"{what}: no end after {self._after} s"])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
