"""The errors diffpatch raises: one line each, naming the value and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DiffpatchError(ValueError):
    """Base of everything diffpatch raises on purpose."""


class UnknownMethod(DiffpatchError):
    """The method name is not registered."""


class UnknownFamily(DiffpatchError):
    """No transformer of a known family was found in the target."""


class BadParameter(DiffpatchError):
    """A method or schedule parameter has a value that cannot work."""


class NotPatched(DiffpatchError):
    """The target carries no patch."""


def choices(value: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the closest match if there is one, and all names.

    >>> choices("radiall", ["radial", "window"])
    "did you mean 'radial'? known: radial, window"
    """
    names = sorted(known)
    close = difflib.get_close_matches(value, names, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"known: {', '.join(names)}"
