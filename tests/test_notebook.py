"""The notebook runs from its first cell to its last, and its outputs are stored."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


def cells() -> list[dict[str, Any]]:
    """The cells of code."""
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def test_its_outputs_are_stored_and_none_is_an_error() -> None:
    outputs = [output for cell in cells() for output in cell["outputs"]]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert {"text/html", "image/png", "text/plain"} <= kinds
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert "True" in outputs[-1]["data"]["text/plain"]  # undone, bit for bit
    assert NOTEBOOK.stat().st_size < 2**20


def test_every_cell_runs() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    names: dict[str, Any] = {}
    shown: list[Any] = []
    for cell in cells():
        tree = ast.parse(
            "".join(cell["source"]).replace("SIZE, STEPS = 5, 4", "SIZE, STEPS = 3, 3")
        )
        last = tree.body[-1]
        body = tree.body[:-1] if isinstance(last, ast.Expr) else tree.body
        exec(compile(ast.Module(body, []), NOTEBOOK.name, "exec"), names)
        if isinstance(last, ast.Expr):  # what a notebook shows
            shown.append(eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), names))
    matplotlib.pyplot.close("all")
    assert shown[-1] is True
    assert all(hasattr(one, "_repr_html_") or hasattr(one, "_repr_png_") for one in shown[:-1]
               if not hasattr(one, "transformer"))  # fmt: skip
