"""The example that distils discs into an image transformer: tiny, stopped and gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import diffpatch
from diffpatch.pipelines.demo import load_demo
from diffpatch.tuning.lora import RECORD, WEIGHTS, LoraTraining
from tests.scripts import load_example

TINY = ["--size", "128", "128", "--rank", "4", "--rate", "0.003", "--radius", "2"]
TINY += ["--sampling-steps", "2", "--each", "2", "--held-out", "1"]


def test_it_learns_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    example = load_example("distill_clear")
    at_once, halves = tmp_path / "at_once", tmp_path / "halves"
    example.main([*TINY, "--steps", "6", "--out", str(at_once)])
    for steps in ("3", "6"):
        example.main([*TINY, "--steps", steps, "--out", str(halves)])
    one, other = (json.loads((folder / RECORD).read_text()) for folder in (at_once, halves))
    assert one["losses"] == other["losses"] and len(one["losses"]) == 6
    assert one["psnr"]["before"] == other["psnr"]["before"] != one["psnr"]["after"]
    learned, again = (load_file(folder / WEIGHTS) for folder in (at_once, halves))
    assert all(torch.equal(learned[name], again[name]) for name in learned)
    assert all(x.any() for name, x in learned.items() if "lora_B" in name)
    pipe = load_demo(dtype=torch.float32)
    pipe.load_lora_weights(at_once)  # by diffusers itself
    assert pipe.get_active_adapters()


def test_both_losses_are_of_a_dense_teacher() -> None:
    """A student that sees everything and has learned nothing is the teacher."""
    example = load_example("distill_clear")
    pipe = load_demo(dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 1, "num_inference_steps": 2}
    call |= {"guidance_scale": 1.0, "max_sequence_length": 32}
    teacher = example.Teacher(pipe, call, ["a small blue ring grows over a gray background"], 2)
    loss = example.distil_loss(teacher, 1.0)
    with torch.no_grad():
        assert float(loss(pipe.transformer, 0)) < 1e-10
    with diffpatch.patched(load_demo(dtype=torch.float32).transformer, "disc", radius=1,
                           dense_layers=0) as student:  # fmt: skip
        both = float(loss(student, 0))
        alone = float(example.distil_loss(teacher, 0.0)(student, 0))
    assert both > alone > 1e-6
    again = example.Teacher(pipe, call, teacher.prompts, 2).forward(1)
    assert torch.equal(again.prediction, teacher.forward(1).prediction)


def test_what_cannot_work_says_so(tmp_path: Path) -> None:
    example = load_example("distill_clear")
    with pytest.raises(SystemExit, match="--model needs --prompts"):
        example.main(["--model", "somebody/flux", "--out", str(tmp_path)])
    few = tmp_path / "few.txt"
    few.write_text("one\n\ntwo\n")
    with pytest.raises(SystemExit, match="holds 2 prompts, and 4 are held out"):
        example.main(["--prompts", str(few), "--out", str(tmp_path)])
    model = load_demo(dtype=torch.float32).transformer
    with pytest.raises(diffpatch.DiffpatchError, match="no layer of WanTransformer3DModel ends in"):
        LoraTraining(model, tmp_path, ["nothing"], rank=2, rate=1e-3)
