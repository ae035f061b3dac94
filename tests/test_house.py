"""The rules of the house that a machine can check: names, sizes, dataclasses."""

from __future__ import annotations

import ast
import os
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = ("diffpatch", "kernels", "pipelines", "eval")
FILES, LINES = 15, 400  # of code: most files of a folder, most lines of a file
# Those that are filled in while something runs.
FILLED = {
    "AttentionMaps", "ChosenTiles", "Forward", "Idle", "Measurements", "Path", "Picture", "Plot",
    "Progress", "Record", "_Bench", "_Room", "_StepClock",
    "Metadata",  # another library makes and changes it
}  # fmt: skip


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


def test_dataclasses_stay_as_they_are() -> None:
    """None can be changed but what a run fills in; `==` of what holds tensors asks for itself."""
    changeable, compared = set(), set()
    for path in package():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ClassDef):
                continue
            given = [_settings(one) for one in node.decorator_list]
            for settings in (one for one in given if one is not None):
                if settings.get("frozen") is not True:
                    changeable.add(node.name)
                if _holds_tensors(node) and settings.get("eq") is not False:
                    compared.add(node.name)
    assert changeable == FILLED
    assert compared == set()


def package() -> list[Path]:
    """All files of the package, links followed."""
    return [
        Path(folder, name)
        for folder, _, names in os.walk(ROOT / "diffpatch", followlinks=True)
        for name in sorted(names)
        if name.endswith(".py")
    ]


def _settings(decorator: ast.expr) -> dict[str | None, object] | None:
    """What a dataclass is told; None where it is not that decorator."""
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    if ast.unparse(called) not in ("dataclass", "dataclasses.dataclass"):
        return None
    words = decorator.keywords if isinstance(decorator, ast.Call) else []
    return {word.arg: ast.literal_eval(word.value) for word in words}


def _holds_tensors(node: ast.ClassDef) -> bool:
    if any("Wrapper" in ast.unparse(base) for base in node.bases):  # methods: as their settings are
        return False
    fields = [ast.unparse(one.annotation) for one in node.body if isinstance(one, ast.AnnAssign)]
    held = [field for field in fields if "Callable" not in field]
    return any("Tensor" in field or "ndarray" in field for field in held)
