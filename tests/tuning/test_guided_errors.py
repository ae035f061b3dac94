"""The example that follows errors of attention into guided predictions, on one step of the demo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import diffpatch
from diffpatch.pipelines.running.loading import find, load_pipeline
from tests.scripts import load_example

CAPTIONS = ["a small blue ring grows over a gray background", "a large red circle"]


def test_it_follows_both_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example, out = load_example("guided_errors"), tmp_path / "errors.json"
    example.main(["-p", *CAPTIONS, "--steps", "1", "-o", str(out)])
    made = json.loads(out.read_text(encoding="utf-8"))
    assert list(made["rows"]) == ["linear", "radial"] and made["kept"] == 0.25
    for rows in made["rows"].values():
        assert [row["caption"] for row in rows] == CAPTIONS
        assert all(0.01 < row[column] < 2 for row in rows for column in example.COLUMNS)
    linear, radial = (made["rows"][name] for name in ("linear", "radial"))
    wanted = sum(a["guided"] - b["guided"] for a, b in zip(linear, radial, strict=True)) / 2
    assert made["apart"]["guided"]["mean"] == pytest.approx(wanted)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["linear", "radial", "apart"]


def test_errors_are_of_the_same_forwards_guided_as_the_pipeline_guides() -> None:
    example, pipe = load_example("guided_errors"), load_pipeline(find("demo"))
    call = {"prompt": CAPTIONS[0], "height": 32, "width": 32, "num_frames": 9}
    call |= {"num_inference_steps": 1, "guidance_scale": 3.0, "max_sequence_length": 16}
    steps = example.recorded(pipe, call)
    assert len(steps) == 1 and not pipe.transformer._forward_hooks
    model, method = pipe.transformer, diffpatch.Linear(kept=0.3)
    found = example.errors(model, method, steps, 3.0)
    (args, kwargs, prompt), (none_args, none_kwargs, none) = steps[0]
    assert not torch.equal(prompt, none)
    with torch.no_grad():
        assert torch.equal(model(*args, **kwargs)[0], prompt), "errors left something behind"
        with diffpatch.patched(model, method, dense_steps=0, dense_layers=0):
            other = model(*args, **kwargs)[0]
            other_none = model(*none_args, **none_kwargs)[0]
    guided, right = 3 * other - 2 * other_none, 3 * prompt - 2 * none
    assert found["guided"] == pytest.approx(float((guided - right).norm() / right.norm()), rel=1e-4)
    wrong = float((other - prompt).norm() / prompt.norm())
    assert found["with prompt"] == pytest.approx(wrong) and 0 < found["attention"] < 1
