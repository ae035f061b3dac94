"""What people and programs put where something else was expected."""

from __future__ import annotations

import copy
import os
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

LONG = os.environ.get("DIFFPATCH_EXAMPLES") == "fuzz"
TEXTS = [
    "", " ", "\0", "..", "../../etc/passwd", "a/b", "-o", "NaN", "1e999", "true", "null", "~", "!!",
    "<script>alert(1)</script>", "</td><b x=\"'&", "{{ 7 * 7 }}", "{% raw %}", "%s%n", "$(id)",
    "\u202e",
    "ﬀ", "é" * 100, "😀", "\ud7ff", "a" * 200, "\r\n", "\t", "c:\\x", "CON", "__class__",
]  # fmt: skip
NUMBERS: list[Any] = [
    0, -1, 1, 2, 3, 2**31, 2**63, 10**30, -(2**63), 0.0, -0.0, 0.5, 1.0, 1.5, -0.5, 1e-30, 1e308,
    float("inf"), float("-inf"), float("nan"), True, False, None,
]  # fmt: skip
values: st.SearchStrategy[Any] = st.recursive(
    st.sampled_from([*TEXTS, *NUMBERS]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TEXTS), inner, max_size=3)
    ),
    max_leaves=4,
)


def examples(few: int) -> settings:
    """So many in every run of the tests, and thirty times as many in a long one."""
    return settings(max_examples=few * 30 if LONG else few)


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to everything in a structure of lists and dictionaries."""
    items: Any = ()
    if isinstance(data, dict):
        items = data.items()
    elif isinstance(data, list | tuple):
        items = enumerate(data)
    return [path, *(p for key, value in items for p in places(value, (*path, key)))]


@st.composite
def damaged(draw: st.DrawFn, data: Any, edits: int = 2) -> Any:
    """A structure in which one or two things are missing, doubled, of another name or value."""
    data = copy.deepcopy(data)
    for _ in range(draw(st.integers(1, edits))):
        path = draw(st.sampled_from(places(data)))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return draw(values)
            continue
        inner = data
        for key in path[:-1]:
            inner = inner[key]
        kind = draw(st.sampled_from(["value", "value", "value", "gone", "name", "twice"]))
        if isinstance(inner, tuple) or kind == "value":
            if isinstance(inner, tuple):
                continue
            inner[path[-1]] = draw(values)
        elif kind == "gone":
            del inner[path[-1]]
        elif kind == "name" and isinstance(inner, dict):
            inner[draw(st.sampled_from(TEXTS))] = inner.pop(path[-1])
        elif isinstance(inner, list):
            inner.append(copy.deepcopy(inner[path[-1]]))
    return data
