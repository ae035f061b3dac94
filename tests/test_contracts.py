"""Who may know whom: the contracts of pyproject.toml hold, and a violation would be found.

The contracts are checked on a copy, in which the links inside diffpatch/ are folders and the
kernels have the `__init__.py` that they must not have in the tree: the checker follows neither
otherwise.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("house")
    no_caches = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(ROOT / "diffpatch", folder / "diffpatch", ignore=no_caches)
    (folder / "diffpatch" / "kernels" / "__init__.py").touch()
    return folder


def checked(house: Path) -> tuple[int, str]:
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    words = [sys.executable, "-c", code, str(ROOT / "pyproject.toml"), "--no-cache", "--no-logo"]
    env = {**os.environ, "PYTHONPATH": str(house)}
    done = subprocess.run(words, cwd=house, env=env, capture_output=True, text=True, timeout=280)
    return done.returncode, done.stdout + done.stderr


def test_the_contracts_hold(house: Path) -> None:
    code, said = checked(house)
    assert code == 0, said
    assert "3 kept, 0 broken" in said


@pytest.mark.parametrize(
    ("file", "imported", "contract"),
    [
        ("kernels/merge.py", "diffpatch.patterns.grid", "kernels know tensors"),
        ("methods/dense.py", "diffpatch.pipelines.families.grids", "floors"),
        ("pipelines/families/grids.py", "diffpatch.methods.dense", "floors"),
        ("patching/options/schedule.py", "diffpatch.eval.media", "floors"),
        ("eval/media.py", "diffpatch.cli.output", "floors"),
        ("kernels/blocks.py", "diffpatch.kernels.block_sparse.api", "no circles"),
    ],
)
def test_a_violation_is_found(house: Path, file: str, imported: str, contract: str) -> None:
    path = house / "diffpatch" / file
    before = path.read_text(encoding="utf-8")
    path.write_text(before + f"\n\nimport {imported}\n", encoding="utf-8")
    try:
        code, said = checked(house)
    finally:
        path.write_text(before, encoding="utf-8")
    assert code != 0
    assert any(contract in line and "BROKEN" in line for line in said.splitlines()), said


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_examples_use_what_is_public(script: Path) -> None:
    found = r"(?:from|import) (diffpatch\.cli[\w.]*)(?: import (.*))?"
    imported = re.findall(found, script.read_text(encoding="utf-8"))
    assert set(imported) <= {("diffpatch.cli", "scripts"), ("diffpatch.cli", "main")}
