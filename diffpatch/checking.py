"""The one check of a parameter's type, whether it comes from Python, the command line or YAML.

Types are the annotations; pydantic decides, strictly: a text is not a number, nor is True, and NaN
and infinity are none. What is said about a value that does not fit is said here, in words.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

from annotated_types import Ge

from diffpatch.errors import BadParameter, choices

P = ParamSpec("P")
R = TypeVar("R")

Count = Annotated[int, Ge(1)]  # of things of which there must be one
Natural = Annotated[int, Ge(0)]
SEEDS = 2**63  # torch takes no seed from here on

PLAIN = (type(None), bool, int, float, str)
WORDS = {
    type(None): "none",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
}
MANY = {bool: "times true or false", int: "whole numbers", float: "numbers", str: "texts"}
NUMERALS = {2: "two", 3: "three", 4: "four", 5: "five"}


def check(owner: str, name: str, value: Any, hint: Any) -> Any:
    """A value as it is kept (see `frozen`).

    Args:
        owner: what the parameter belongs to, such as "radial"; empty where its name says enough.
        name: of the parameter.
        value: what was given.
        hint: its type, as annotated. A text in ``Annotated[int, "a prime number"]`` is what is
            said to be expected; bounds, such as those of `Count`, are checked too.

    Raises:
        BadParameter: it does not fit; names parameter, value and what was expected.
    """
    value = frozen(value)
    problem = _problem(value, hint)
    if problem is not None:
        place = f"{owner}: {name}" if owner else name
        raise BadParameter(f"{place}={shown(value)} must be {problem}")
    return value


def checked(*elsewhere: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Check the arguments of a function by their annotations before it begins (see `check`).

    It gets them as they are kept, paths aside.

    Args:
        *elsewhere: parameters that the function itself has more to say about.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        places = list(inspect.signature(function).parameters)
        own = {n: function.__annotations__[n] for n in places if n in function.__annotations__}

        @functools.cache  # at the first call: it needs what annotations name
        def hints() -> dict[str, Any]:
            asked = types.SimpleNamespace(__annotations__=own)
            names = inspect.unwrap(function).__globals__
            found = typing.get_type_hints(asked, names, include_extras=True)
            return {name: found[name] for name in own if name not in elsewhere}

        def kept(name: str, value: Any) -> Any:
            hint = hints().get(name, Any)  # Any, too, for what goes to **parameters
            if hint is Any or isinstance(hint, TypeVar):
                return value
            found = check(function.__name__, name, value, hint)
            return value if isinstance(value, os.PathLike) else found

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> R:
            placed = [kept(*pair) for pair in zip(places, args, strict=False)]
            named = {name: kept(name, value) for name, value in kwargs.items()}
            return function(*placed, *args[len(placed) :], **named)

        return wrapper

    return decorate


def check_fields(instance: Any, owner: str) -> None:
    """Check and freeze what the fields of a frozen dataclass hold, those left out of comparisons
    aside.

    Raises:
        BadParameter: as in `check`.
    """
    hints = field_types(type(instance))
    for field in dataclasses.fields(instance):
        if field.compare and field.name in hints:
            value = getattr(instance, field.name)
            kept = check(owner, field.name, value, hints[field.name])
            if kept is not value:
                object.__setattr__(instance, field.name, kept)


def check_names(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse parameters that there are not.

    Raises:
        BadParameter: names the closest that there is.
    """
    names = list(known)
    for name in given:
        if name not in names:
            raise BadParameter(f"{owner} has no parameter {name!r}: {choices(name, names)}")


def field_types(cls: Any) -> Mapping[str, Any]:
    """The types of the fields of a dataclass, as annotated."""
    return _field_types(cls)


@functools.lru_cache(maxsize=256)
def _field_types(cls: Any) -> Mapping[str, Any]:
    try:
        hints = typing.get_type_hints(cls, include_extras=True)
    except NameError:  # a class inside of a function, annotated with what only that knows
        return {}
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def frozen(value: Any) -> Any:
    """Lists as tuples, arrays and scalars of numpy as Python's numbers, paths as texts."""
    if type(value) in PLAIN:
        return value
    if isinstance(value, list | tuple):
        return tuple(map(frozen, value))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return frozen(value.tolist())
    return value


def expected(hint: Any) -> str:
    """What a parameter of this type must be, after "must be".

    >>> expected(float), expected(int | None)
    ('of type float (a number)', 'a whole number or none')
    """
    if hint in MANY:
        return f"of type {hint.__name__} ({WORDS[hint]})"
    return _words(hint)


def _words(hint: Any) -> str:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        said = [extra for extra in options[1:] if isinstance(extra, str)]
        return said[0] if said else _words(options[0])
    if origin in (typing.Union, types.UnionType):
        return _either([_words(o) for o in options if not (o is int and float in options)])
    if origin is typing.Literal:
        return _either([repr(option) for option in options])
    if origin is tuple:
        return _words_of_tuple(options)
    if origin is Sequence:
        return _words_of_tuple((*options, Ellipsis))
    if origin is Mapping:
        return "a mapping"
    if origin is Callable:
        return "a function"
    if isinstance(hint, type):
        return WORDS.get(hint, f"a {hint.__name__}")
    return "something else"


def _either(parts: list[str]) -> str:
    *others, last = dict.fromkeys(parts)
    return f"{', '.join(others)} or {last}" if others else last


def _words_of_tuple(options: tuple[Any, ...]) -> str:
    first, size = options[0], len(options)
    if options[-1] is Ellipsis:
        return f"a list of {MANY[first]}" if first in MANY else f"a list, each {_words(first)}"
    if first in MANY and set(options) == {first}:
        return f"{NUMERALS.get(size, size)} {MANY[first]}"
    return f"a list of {size}: {', '.join(map(_words, options))}"


def _problem(value: Any, hint: Any) -> str | None:
    """What a value must be and is not, or None if it fits."""
    if hint is Any or (type(value) is hint and (hint is not float or math.isfinite(value))):
        return None  # the usual case, without pydantic
    if isinstance(hint, type) and hint not in PLAIN and typing.get_origin(hint) is None:
        return None if isinstance(value, hint) else expected(hint)
    from pydantic import ValidationError

    try:
        _adapter(hint).validate_python(value)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        for one in found:
            if one["type"] == "greater_than_equal":
                return f"at least {one['ctx']['ge']}"
            if one["type"] == "finite_number":
                return "a finite number"
        return expected(hint)
    return None


@functools.lru_cache(maxsize=256)
def _adapter(hint: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    strict = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
    return TypeAdapter(hint, config=strict)


def file_path(value: str | Path) -> Path:
    """Where a file is to be written.

    Raises:
        BadParameter: the path is empty or that of a folder.
    """
    path = Path(value)
    if not path.name or path.is_dir():
        raise BadParameter(f"path={os.fspath(value)!r} must be the path of a file, not of a folder")
    return path


def shown(value: Any) -> str:
    """A value as a message shows it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def refuse_dense(names: Iterable[str]) -> None:
    """Refuse dense as one of the methods: under its name stands what they are compared with.

    Raises:
        BadParameter: it is among them.
    """
    if "dense" in names:
        raise BadParameter(
            "dense is what methods are compared with, and is measured anyway; drop it"
        )
