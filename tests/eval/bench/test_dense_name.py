"""Dense is what methods are compared with: none of them can take its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import diffpatch
from diffpatch.cli import main
from diffpatch.eval.bench.attention import bench_attention
from diffpatch.eval.bench.case import AttentionCase
from diffpatch.eval.bench.model import bench_model
from diffpatch.eval.bench.render import bench_render
from diffpatch.eval.quality.evaluate import evaluate_model


def test_no_method_takes_the_place_of_dense() -> None:
    case = AttentionCase(diffpatch.TokenGrid(1, 4, 4))
    nothing: Any = None
    with pytest.raises(diffpatch.BadParameter, match="dense is what methods are compared with"):
        bench_attention(case, {"dense": diffpatch.Dense()})
    with pytest.raises(diffpatch.BadParameter, match="drop it"):
        bench_model(nothing, {"dense": {}})
    with pytest.raises(diffpatch.BadParameter, match="drop it"):
        bench_render(nothing, {}, {"dense": {}})
    with pytest.raises(diffpatch.BadParameter, match="drop it"):
        evaluate_model(nothing, {}, [], {"dense": {}}, nothing)


@pytest.mark.parametrize("words", ["bench attention", "bench render", "bench model", "eval"])
def test_the_command_line_says_so_before_it_loads_anything(
    words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*words.split(), "--method", "window", "--method", "dense"]) == 2
    assert "is measured anyway; drop it" in capsys.readouterr().err
