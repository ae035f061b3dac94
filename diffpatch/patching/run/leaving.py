"""When a denoising loop is left before its last step: by an exception, an interrupt, a `break`.

A scheduler tells of its steps, and nothing tells that no more of them will come. But pipelines loop
within ``with self.progress_bar(...)``, and whatever leaves that block closes the bar. So the bar of
a run is listened to. A loop without one ends for us with the function that has made forwards of two
steps (`Run.go`), with its scheduler, or with the scheduler's next run.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from diffpatch import internals
from diffpatch.patching.run.run import Run


def listen(values: Iterable[Any], run: Run) -> None:
    """End a run when one of the progress bars among the values is closed.

    Args:
        values: local variables of the loop.
        run: what goes on in it.
    """
    for value in list(values):
        if internals.is_progress_bar(value):
            _on_close(value, weakref.WeakMethod(run.end))


def _on_close(bar: Any, end: weakref.WeakMethod[Any]) -> None:
    before = vars(bar).get("close")  # what listens for another patch

    def close() -> None:
        if before is None:
            vars(bar).pop("close", None)
        else:
            vars(bar)["close"] = before
        try:
            bar.close()
        finally:
            if (ending := end()) is not None:
                ending()

    vars(bar)["close"] = close
