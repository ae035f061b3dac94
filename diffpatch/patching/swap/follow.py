"""Somebody else's function, run as it is now, with another attention in it.

A function looks the names it calls up in its module, or finds them in its closure (a decorator's
wrapper finds the function it wraps there). `follow` makes a function of the same code over copies
of those places, in which attention is ours, and what reaches attention is followed likewise. The
copies are compared with the places they were made of at every call, so that whatever others put
there, before or after, is what runs; nothing is written to a module that is not ours.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffpatch.errors import DiffpatchError
from diffpatch.internals import DISPATCH, SDPA

_MISSING = object()  # a name that a module does not have: a builtin, or an error of its own
_LOADS = ("LOAD_GLOBAL", "LOAD_NAME")
_WRITES = ("STORE_GLOBAL", "DELETE_GLOBAL")

# What stands in for a value that a function finds under a name; None for what is not attention.
StandIn = Callable[[str, Any], Any]


@dataclass(frozen=True)
class Followed:
    """A function with another attention in it, and what it was made of.

    Attributes:
        original: the function.
        call: the same code, with the other attention.
        attention: what it would have called for attention, and under which name.
        code: of the original.
        found: the values of the names that the code looks up in its module, if they matter.
        held: the functions in its closure; None for all else, which the two share.
        inner: the functions that reach attention for it.
    """

    original: types.FunctionType
    call: types.FunctionType
    attention: tuple[str, Any]
    code: types.CodeType
    found: dict[str, Any]
    held: tuple[Any, ...]
    inner: tuple[Followed, ...]

    def is_current(self, function: Any) -> bool:
        """Whether it is what `follow` would make of that function now."""
        if function is not self.original or function.__code__ is not self.code:
            return False
        names = self.original.__globals__
        for name, value in self.found.items():  # plain loops: this is asked in every call
            if names.get(name, _MISSING) is not value:
                return False
        if function.__closure__:
            for now, before in zip(_held(function), self.held, strict=True):
                if now is not before:
                    return False
        return all(one.is_current(one.original) for one in self.inner) if self.inner else True

    def watched(self) -> Iterator[tuple[types.ModuleType, str, Any]]:
        """(module, name, value) of all names that the code and its inner functions look up."""
        module = sys.modules.get(self.original.__module__)
        if module is not None and vars(module) is self.original.__globals__:
            yield from ((module, n, x) for n, x in self.found.items() if x is not _MISSING)
        for one in self.inner:
            yield from one.watched()


def follow(
    function: Any, stand_in: StandIn, path: tuple[types.FunctionType, ...] = ()
) -> Followed | None:
    """The function with another attention in it; None if it is not seen to reach any.

    Args:
        function: what is called now.
        stand_in: says what attention is.
        path: the functions that lead to it, which are not followed again.

    Raises:
        DiffpatchError: the function reaches attention and changes globals of its module.
    """
    if not isinstance(function, types.FunctionType) or function in path:
        return None
    code, path = function.__code__, (*path, function)
    found = {n: function.__globals__.get(n, _MISSING) for n in _names(code, _LOADS)}
    inner: list[Followed] = []
    attention: list[tuple[str, Any]] = []

    def other(name: str, value: Any) -> Any:
        if value is None or value is _MISSING:
            return None
        made = stand_in(name, value)
        if made is not None:
            # A module of functions is attention only to code that takes attention from it.
            if not isinstance(value, types.ModuleType) or SDPA in _attributes(code):
                attention.append((name, value))
            return made
        one = None if _is_torchs(value) else follow(value, stand_in, path)
        if one is None:
            return None
        inner.append(one)
        return one.call

    renamed = {name: made for name, x in found.items() if (made := other(name, x)) is not None}
    cells = [
        cell if (made := other(name, value)) is None else types.CellType(made)
        for name, cell, value in zip(
            code.co_freevars, function.__closure__ or (), _held(function), strict=True
        )
    ]
    attention += [one.attention for one in inner]
    if not attention:
        return None
    if renamed and (written := _names(code, _WRITES)):
        raise DiffpatchError(
            f"{function.__qualname__} computes attention and writes the global {min(written)} of"
            " its module, where diffpatch cannot follow it: keep that in an object or a closure"
        )
    call = types.FunctionType(
        code, _view(function, found, renamed), function.__name__, function.__defaults__,
        tuple(cells),
    )  # fmt: skip
    call.__kwdefaults__ = function.__kwdefaults__
    if not renamed:  # names are looked up in the module itself
        found = {name: x for name, x in found.items() if callable(x)}
    return Followed(function, call, attention[0], code, found, _held(function), tuple(inner))


def asks_super(function: Any) -> bool:
    """Whether a function, or one that it wraps, may call the same method of a class above."""
    if not isinstance(function, types.FunctionType):
        return False
    if "super" in function.__code__.co_names:
        return True
    return any(asks_super(x) for x in _held(function) if x is not function)


def _view(
    function: types.FunctionType, found: dict[str, Any], renamed: dict[str, Any]
) -> dict[str, Any]:
    """The globals of a function with some of them renamed; its own where none is."""
    own = function.__globals__
    if not renamed:
        return own
    # Without a __name__, torch.compile takes names from here and not from the module of that name;
    # imports inside the function need the package.
    view = {name: own[name] for name in ("__builtins__", "__package__") if name in own}
    return view | {n: x for n, x in found.items() if x is not _MISSING} | renamed


def _held(function: types.FunctionType) -> tuple[Any, ...]:
    """The functions in a function's closure, by its cells; None for anything else."""
    values: list[Any] = []
    for cell in function.__closure__ or ():
        try:
            value = cell.cell_contents
        except ValueError:  # empty yet
            value = None
        values.append(value if isinstance(value, types.FunctionType) else None)
    return tuple(values)


def _is_torchs(value: Any) -> bool:
    """Whether a function is torch's own, which no processor reaches diffusers through."""
    return str(getattr(value, "__module__", "")).partition(".")[0] == "torch"


@functools.lru_cache(maxsize=256)
def _names(code: types.CodeType, operations: tuple[str, ...]) -> frozenset[str]:
    """The names that a code object and those nested in it use in some operations."""
    steps = (step for one in _codes(code) for step in dis.get_instructions(one))
    return frozenset(step.argval for step in steps if step.opname in operations)


def _attributes(code: types.CodeType) -> set[str]:
    return {name for one in _codes(code) for name in one.co_names}


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A code object and those nested in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


class Code:
    """What the stand-ins of one class run: its `__call__`, as it is now, with our attention.

    Attributes:
        call: that function.
        attention: what it would call for attention, behind the name of that.
        watched: (module or class, name, value) of all that it was made of.
    """

    def __init__(self, cls: Any, stand_in: StandIn, above: Sequence[Code] = ()) -> None:
        self._class = cls
        self._stand_in = stand_in
        self._above = above  # of the classes that it may call through super()
        self._followed: Followed | None = None
        self._wrapper: Any = None
        self.update()
        _CODES.add(self)

    def wrap(self, wrapper: Any) -> None:
        """Give a wrapper the signature of what it runs.

        Attention modules drop keyword arguments that the signature of `__call__` does not name.
        """
        self._wrapper = wrapper
        wrapper.__wrapped__ = self._class.__call__

    def update(self) -> None:
        """Follow what others have changed.

        Raises:
            DiffpatchError: it cannot be followed.
        """
        now = self._class.__call__
        if self._followed is not None and self._followed.is_current(now):
            return
        followed = follow(now, self._stand_in)
        if followed is not None:
            self.call, self.attention = followed.call, followed.attention
            self.watched = ((self._class, "__call__", now), *followed.watched())
        elif self._above and asks_super(now):
            self.call, self.attention = now, self._above[0].attention
            self.watched = ((self._class, "__call__", now),)
        else:
            raise DiffpatchError(
                f"{self._class.__name__}.__call__ calls neither {DISPATCH} nor F.{SDPA} by a global"
                " of its module: diffpatch does not know how it computes its attention"
            )
        self._followed = followed
        if self._wrapper is not None:
            self.wrap(self._wrapper)

    def traced(self) -> Callable[..., Any]:
        """The same for torch.compile, which makes all that it was made of a guard of its graph."""
        from torch._dynamo.comptime import comptime

        comptime(_update_all)  # runs when the graph is made; update() itself cannot be traced
        for place, name, value in self.watched:
            if getattr(place, name) is not value:
                raise DiffpatchError(f"{place.__name__}.{name} is now what cannot be followed")
        return self.call

    def here(self) -> Callable[..., Any]:
        """What to call now, traced or not."""
        if torch.compiler.is_compiling():
            return self.traced()
        self.update()
        return self.call


_CODES: weakref.WeakSet[Code] = weakref.WeakSet()  # for what is traced, and cannot be handed over


def _update_all(_: Any) -> None:
    for code in list(_CODES):
        with contextlib.suppress(DiffpatchError):
            code.update()
