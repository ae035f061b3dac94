"""`--set key=value`: texts from the command line as typed parameters of a method."""

from __future__ import annotations

import ast
import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any

import diffpatch
from diffpatch import Method
from diffpatch.cli.errors import UsageError
from diffpatch.errors import choices


def method_parameters(name: str, texts: Sequence[str]) -> dict[str, Any]:
    """The `key=value` pairs of a method, or of a combination such as radial+temporal, checked.

    Raises:
        UsageError: no such method or parameter, or a value of another type.
        DiffpatchError: a value that the method refuses.
    """
    known = diffpatch.list_methods()
    for part in name.split("+"):
        if part not in known:
            raise UsageError(f"unknown method {part!r}: {choices(part, known)}")
    values = settings(texts, name, [known[part].cls for part in name.split("+")])
    diffpatch.make_method(name, **values)
    return values


def settings(texts: Sequence[str], name: str, classes: Sequence[type[Method]]) -> dict[str, Any]:
    """`key=value` pairs, typed by the fields of the first dataclass that has the key."""
    hints: dict[str, Any] = {}
    for cls in reversed(classes):
        hints |= {field: typing.get_type_hints(cls)[field] for field in field_names(cls)}
    values = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            raise UsageError(f"--set {text!r} must be key=value; keys: {', '.join(hints)}")
        if key not in hints:
            raise UsageError(f"{name} has no parameter {key!r}: {choices(key, hints)}")
        try:
            values[key] = convert(value.strip(), hints[key])
        except ValueError:
            kind = getattr(hints[key], "__name__", str(hints[key]))
            raise UsageError(f"--set {key}={value} must be of type {kind}") from None
    return values


def field_names(cls: type[Method]) -> list[str]:
    """The parameters of a method."""
    return [field.name for field in dataclasses.fields(cls)]


def convert(text: str, hint: Any) -> Any:
    """A text as a value of a type: numbers, bools, strings, None, tuples (4,8,8) and unions.

    Raises:
        ValueError: the text is nothing of that type.
    """
    options = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        # bool before int before float before str: the narrowest reading wins.
        for option in sorted(options, key=_breadth):
            try:
                return convert(text, option)
            except ValueError:
                continue
    elif origin is tuple:
        parts = _parts(text)
        kinds = [options[0]] * len(parts) if options[-1] is Ellipsis else options
        if parts and ("," in text or len(kinds) == 1) and len(parts) == len(kinds):
            return tuple(convert(part, kind) for part, kind in zip(parts, kinds, strict=True))
    elif origin is typing.Literal and text in map(str, options):
        return next(option for option in options if str(option) == text)
    elif isinstance(hint, type) and issubclass(hint, Method):
        return diffpatch.make_method(text)
    elif hint in (None, type(None)) and text.lower() == "none":
        return None
    elif hint is bool and text.lower() in ("true", "false", "1", "0", "yes", "no"):
        return text.lower() in ("true", "1", "yes")
    elif hint in (int, float, str):
        return hint(text)
    elif hint is typing.Any:
        return ast.literal_eval(text)
    raise ValueError(f"{text!r} is not of type {hint}")


def _parts(text: str) -> list[str]:
    """What commas separate, those inside of brackets aside: two parts in (1,2),(3,4)."""
    text, depth, pieces = text.strip(), 0, [""]
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    if len(pieces) == 1 and text[:1] in ("(", "[") and text[-1] in ")]":
        return _parts(text[1:-1])
    return [piece.strip() for piece in pieces if piece.strip()]


def _breadth(hint: Any) -> int:
    order = [type(None), bool, int, float]
    return order.index(hint) if hint in order else 5 if hint is str else 4
