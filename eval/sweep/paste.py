"""The line of Python that does what a run of a sweep did."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from diffpatch import Method


def arguments(method: Method | None, given: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """What `diffpatch.patch` takes beside a pipeline and a name, ready for JSON.

    Args:
        method: the method, if it was fitted to a kept fraction; its parameters are those of the
            object, and of what it wraps.
        given: the parameters otherwise.
        options: schedule and backend.
    """
    found = dict(given) if method is None else _changed(method)
    usual = {"dense_last_steps": 0, "backend": "auto"}
    told = {key: value for key, value in options.items() if value is not None}
    return found | {key: value for key, value in told.items() if usual.get(key) != value}


def line(name: str, arguments: Mapping[str, Any], remark: str = "") -> str:
    """The call to paste, with a remark behind it."""
    named = [] if "settings" in arguments else [f'"{name}"']  # settings choose the method
    words = ["pipe", *named, *(f"{key}={_text(value)}" for key, value in arguments.items())]
    return f"diffpatch.patch({', '.join(words)})" + (f"  # {remark}" if remark else "")


def _changed(method: Method) -> dict[str, Any]:
    """The fields that are not at their default, those of a wrapped method last."""
    found: dict[str, Any] = {}
    inner: Any = method
    while inner is not None:
        for field in dataclasses.fields(inner):
            value = getattr(inner, field.name)
            if field.name != "over" and value != field.default:
                found.setdefault(field.name, value)
        inner = getattr(inner, "over", None)
    return found


def _text(value: Any) -> str:
    if isinstance(value, float):
        short = f"{value:.6g}"
        return short if set(short) & set(".e") else f"{short}.0"  # 1 would be a count
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"  # of either kind, as JSON knows one only
    return repr(value)
