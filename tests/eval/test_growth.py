"""The example that measures how attention grows, on a clip of a few tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.scripts import load_example


def test_it_measures_every_method_at_every_length(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    try:
        example = load_example("growth")
        out = tmp_path / "growth.json"
        example.main(["-o", str(out), "--side", "4", "--heads", "1", "--times", "1", "3"])
    finally:
        torch.set_num_threads(threads)
    made = json.loads(out.read_text())
    lengths = {(row["method"], row["frames"]) for row in made["rows"]}
    assert lengths == {(name, n) for name in example.METHODS for n in (13, 39)}
    kept = {(row["method"], row["frames"]): row["kept"] for row in made["rows"]}
    assert kept["dense", 39] == kept["longer", 13] == 1 > kept["longer", 39]
    assert set(made["growth"]) == set(example.METHODS)
    assert "time grows with the tokens" in capsys.readouterr().out
    assert out.with_suffix(".png").stat().st_size > 0
