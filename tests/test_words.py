"""One voice in what people read: docstrings, error messages, and the pages beside the code."""

from __future__ import annotations

import ast
import contextlib
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("diffpatch", "kernels", "pipelines", "eval", "examples")
PAGES = ("README.md", "CONTRIBUTING.md", "kernels/README.md", "pipelines/README.md")
# "Return the mask." or "The mask.", and never "Returns the mask."
THIRD_PERSON = re.compile(
    r"(Returns|Builds|Loads|Makes|Turns|Computes|Creates|Gives|Writes|Reads|Runs|Prints|Parses"
    r"|Renders|Describes|Imports|Draws|Samples|Encodes|Decodes|Checks|Finds|Says|Adds|Applies"
    r"|Removes|Starts|Saves|Trains|Measures|Shows|Yields|Converts|Takes|Generates|Fits) [a-z`]"
)
ROLE = re.compile(r":(class|func|data|meth|mod|attr):`")
NOT_A = re.compile(r"\b(?<![Tt]here )(is|are) no (?!longer|larger|smaller|more|less|fewer)[a-z]")


def docstrings(folder: str) -> Iterator[tuple[str, str]]:
    for path in (ROOT / folder).rglob("*.py"):  # which does not follow links
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                name = getattr(node, "name", "")
                yield f"{path.relative_to(ROOT)} {name}", ast.get_docstring(node) or ""


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_have_one_voice(folder: str) -> None:
    found = list(docstrings(folder))
    assert len(found) > 20
    for pattern, at_start in ((THIRD_PERSON, True), (ROLE, False), (NOT_A, False)):
        match = pattern.match if at_start else pattern.search
        assert [where for where, text in found if match(text)] == [], pattern.pattern


@pytest.mark.parametrize("page", PAGES)
def test_pages_say_is_not_a(page: str) -> None:
    assert not NOT_A.search((ROOT / page).read_text(encoding="utf-8"))


def test_names_in_docstrings_exist() -> None:
    """A renamed module or function is renamed where people read of it, too."""
    named = {
        (name, where)
        for folder in FOLDERS
        for where, text in docstrings(folder)
        for name in re.findall(r"`(diffpatch(?:\.\w+)+)`", text)
    }
    assert len(named) > 30
    assert sorted((name, where) for name, where in named if not exists(name)) == []


def exists(name: str) -> bool:
    """Whether a dotted name is that of a module, or of something in one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            found: Any = importlib.import_module(".".join(parts[:count]))
            for part in parts[count:]:
                found = getattr(found, part, None)
            return found is not None
    return False
