"""`--set key=value`: texts from the command line as typed parameters of a method."""

from __future__ import annotations

import ast
import types
import typing
from collections.abc import Sequence
from typing import Any

import diffpatch
from diffpatch import Method
from diffpatch.checking import check_names, expected
from diffpatch.cli.errors import UsageError
from diffpatch.methods.registry import parameter_types


def method_parameters(name: str, texts: Sequence[str]) -> dict[str, Any]:
    """The `key=value` pairs of a method, or of a combination such as radial+temporal, checked.

    Raises:
        UsageError: a text that is nothing of its parameter's type.
        BadParameter, UnknownMethod: no such method or parameter, or a value that it refuses.
    """
    values = settings(texts, name)
    diffpatch.make_method(name, **values)
    return values


def settings(texts: Sequence[str], name: str) -> dict[str, Any]:
    """`key=value` pairs, read as the types of a method's parameters."""
    hints = parameter_types(name)
    values = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            raise UsageError(f"--set {text!r} must be key=value; keys: {', '.join(hints)}")
        check_names(name, [key], hints)
        try:
            values[key] = convert(value.strip(), hints[key])
        except ValueError:
            raise UsageError(f"--set {key}={value} must be {expected(hints[key])}") from None
    return values


def convert(text: str, hint: Any) -> Any:
    """A text as a value of a type: numbers, bools, strings, None, tuples (4,8,8) and unions.

    Raises:
        ValueError: the text is nothing of that type.
    """
    options = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return convert(text, options[0])
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
