"""The example that draws the clips of a sweep under each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffpatch.eval.media import save_frames
from tests.scripts import load_example

RED = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)


def write_run(sweep: Path, name: str, method: str | None, side: int, color: torch.Tensor) -> None:
    folder = sweep / "runs" / name
    folder.mkdir(parents=True)
    record = {
        "prompt": "a red square", "method": method, "label": method or "dense",
        "settings": {"num_frames": 5, "height": side, "width": side},
        "quality": {"caption_accuracy": 0.5} if method else {},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record))
    save_frames(color.expand(5, 3, side, side), folder / "frames.npz")


def test_rows_are_by_size_and_dense_first(tmp_path: Path) -> None:
    example = load_example("strips")
    write_run(tmp_path, "a", "larger", 16, RED)
    write_run(tmp_path, "b", None, 16, RED.flip(1))
    write_run(tmp_path, "c", None, 8, 0 * RED)
    found = example.runs_of(tmp_path)
    assert [example.title(run) for run, _ in found] == [
        "dense, 5 frames of 8x8",
        "dense, 5 frames of 16x16",
        "larger, 5 frames of 16x16: the judge reads 50% of the caption",
    ]
    out = tmp_path / "strips.png"
    example.main([str(tmp_path), "-o", str(out), "--frames", "3", "--side", "20"])
    with Image.open(out) as image:
        assert image.size == (60, 3 * (20 + example.LINE))
        last = [
            image.getpixel((30, row * (20 + example.LINE) + example.LINE + 5)) for row in (1, 2)
        ]
    assert last == [(0, 0, 255), (255, 0, 0)]
    with pytest.raises(SystemExit, match="no run whose prompt has 'blue'"):
        example.main([str(tmp_path), "--prompt", "blue"])
