"""What is done of a long job, in a file beside its result, so that nothing is done twice."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffpatch.checking import file_path
from diffpatch.files import write_text


def ties_of(*parts: Any) -> str:
    """Everything that decides what a job comes to as a text: the same wherever the same is asked.

    Pictures, arrays and tensors count by what they hold: their own texts name a place in memory,
    or leave most of it out.
    """
    return json.dumps(parts, sort_keys=True, default=_by_content)


def _by_content(value: Any) -> str:
    about: tuple[Any, ...]
    if isinstance(value, Image.Image):
        about, content = (value.mode, value.size), value.tobytes()
    elif isinstance(value, torch.Tensor):
        about = (str(value.dtype), tuple(value.shape))
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray):
        about, content = (str(value.dtype), value.shape), value.tobytes()
    else:
        return str(value)
    return f"{about} {hashlib.sha256(content).hexdigest()}"


def digest_of(*parts: Any) -> str:
    """64 hex digits that stand for `ties_of`."""
    return hashlib.sha256(ties_of(*parts).encode()).hexdigest()


class Unfinished:
    """The finished units of a job, each written whole or not at all.

    What stands in a file that is damaged, or of another job, is done again.

    Args:
        path: of the result; None keeps nothing.
        ending: what is appended to its name.
        ties: everything that decides what the units come to.

    Raises:
        BadParameter: the path is empty or that of a folder.
    """

    def __init__(self, path: str | Path | None, ending: str, ties: str) -> None:
        path = None if path is None else file_path(path)
        self._file = None if path is None else path.with_name(path.name + ending)
        self._ties = ties
        self._done: dict[str, Any] = {}
        if self._file is not None and self._file.is_file():
            try:
                data = json.loads(self._file.read_text(encoding="utf-8"))
                if data["ties"] == ties:
                    self._done = dict(data["done"])
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                pass  # nothing of it is known to be true

    def get(self, unit: str) -> Any:
        """What a unit came to, as plain JSON; None if it is not done."""
        return self._done.get(unit)

    def put(self, unit: str, value: Any) -> None:
        """A unit is done."""
        self._done[unit] = value
        if self._file is None:
            return
        write_text(self._file, json.dumps({"ties": self._ties, "done": self._done}))

    def forget(self) -> None:
        """The result is written."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)
