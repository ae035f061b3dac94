"""The rules of the house that a machine can check: names, and the sizes of files and folders."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = ("diffpatch", "kernels", "pipelines", "eval")
FILES, LINES = 15, 400  # of code: most files of a folder, most lines of a file


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_no_class_name_is_defined_twice() -> None:
    found: defaultdict[str, list[str]] = defaultdict(list)
    for path in sources(*PRODUCT):  # rglob does not follow the links inside diffpatch/
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(path.relative_to(ROOT).as_posix())
    assert len(found) > 150
    assert {name: files for name, files in found.items() if len(files) > 1} == {}


@pytest.mark.parametrize("folder", [*PRODUCT, "tests", "examples"])
def test_files_and_folders_stay_small(folder: str) -> None:
    counts: defaultdict[str, int] = defaultdict(int)
    long = {}
    for path in sources(folder):
        counts[path.parent.relative_to(ROOT).as_posix()] += 1
        if (lines := path.read_text(encoding="utf-8").count("\n")) > LINES:
            long[path.relative_to(ROOT).as_posix()] = lines
    assert counts and long == {}
    assert {name: count for name, count in counts.items() if count > FILES} == {}
