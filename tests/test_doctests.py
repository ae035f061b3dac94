"""Examples in docstrings are what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("diffpatch", "kernels", "pipelines", "eval")


def modules() -> list[str]:
    """Every module with an example, by the name it is imported by."""
    found = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name == "__init__.py":  # pictures of a session, with a pipeline of the reader's
                continue
            if not path.is_symlink() and ">>> " in path.read_text(encoding="utf-8"):
                name = path.relative_to(ROOT).with_suffix("").parts
                found.append(".".join(name if folder == "diffpatch" else ("diffpatch", *name)))
    return sorted(set(found))


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted and not result.failed
