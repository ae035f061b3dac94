"""The two ways a command ends early: the request was wrong, or the work failed."""

from __future__ import annotations


class UsageError(Exception):
    """The command line asks for something that cannot work; exit code 2."""


class RunError(Exception):
    """The request was fine and the work failed; exit code 1."""
