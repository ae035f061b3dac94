"""The errors diffpatch raises: one line each, naming the value and what to do about it.

After PEFT: one base, and beside it the error of Python that a caller would expect. Kernels import
nothing of ours, so what they raise is defined there.
"""

from __future__ import annotations

from diffpatch.kernels.errors import BackendUnavailable, BadParameter, DiffpatchError, choices

__all__ = [
    "BackendUnavailable",
    "BadParameter",
    "DiffpatchError",
    "NotPatched",
    "UnknownFamily",
    "UnknownMethod",
    "choices",
]


class UnknownMethod(DiffpatchError, ValueError):
    """The method name is not registered."""


class UnknownFamily(DiffpatchError, ValueError):
    """No transformer of a known family was found in the target."""


class NotPatched(DiffpatchError, ValueError):
    """The target carries no patch."""
