"""The errors of the ground floor; `diffpatch.errors` adds those that know methods and models."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DiffpatchError(Exception):
    """Base of everything diffpatch raises on purpose."""


class BadParameter(DiffpatchError, ValueError):
    """An argument has a value that cannot work; another value would."""


class BackendUnavailable(DiffpatchError, RuntimeError):
    """The backend asked for cannot run here, or not with these tensors."""


def choices(value: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the closest match if there is one, and all names.

    >>> choices("radiall", ["radial", "window"])
    "did you mean 'radial'? known: radial, window"
    """
    names = sorted(known)
    close = difflib.get_close_matches(value, names, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"known: {', '.join(names)}"
