"""The example that trains a LoRA for longer clips: a step or two, stopped and gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffpatch.pipelines.demo import load_demo
from tests.scripts import load_example

TINY = ["--frames", "14", "--side", "64", "--rank", "2", "--rate", "0.01"]


def test_it_learns_is_judged_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    example = load_example("train_longer_lora")
    judged = ["--judge", "1", "--trained", "5", "--sampling-steps", "1"]
    at_once, halves = tmp_path / "at_once", tmp_path / "halves"
    example.main([*TINY, *judged, "--steps", "2", "--out", str(at_once)])
    for steps in ("1", "2"):
        example.main([*TINY, "--judge", "0", "--steps", steps, "--out", str(halves)])
    one, other = (json.loads((folder / "loss.json").read_text()) for folder in (at_once, halves))
    assert one["losses"] == other["losses"] and len(one["losses"]) == 2
    assert set(one["judge"]) == {"before", "after"}
    assert set(one["judge"]["after"]) == {"10", "20"}
    assert 0 <= one["judge"]["after"]["20"]["caption_accuracy"] <= 1
    file = "pytorch_lora_weights.safetensors"
    learned, again = (load_file(folder / file) for folder in (at_once, halves))
    assert all(torch.equal(learned[name], again[name]) for name in learned)
    changed = [x for name, x in learned.items() if "lora_B" in name]
    assert len(changed) == 6 * 4 and all(x.any() for x in changed)


def test_diffusers_loads_what_it_writes(tmp_path: Path) -> None:
    example = load_example("train_longer_lora")
    example.main([*TINY, "--judge", "0", "--steps", "1", "--out", str(tmp_path)])
    pipe = load_demo(dtype=torch.float32)
    latents, text = torch.randn(1, 16, 3, 4, 4), torch.randn(1, 4, 96)
    call = {"hidden_states": latents, "timestep": torch.tensor([500.0])}
    with torch.no_grad():
        plain = pipe.transformer(**call, encoder_hidden_states=text)[0]
        pipe.load_lora_weights(tmp_path)
        assert not torch.equal(pipe.transformer(**call, encoder_hidden_states=text)[0], plain)


def test_other_models_need_data(tmp_path: Path) -> None:
    example = load_example("train_longer_lora")
    with pytest.raises(SystemExit, match="--model needs --data"):
        example.main(["--model", "somebody/wan", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="holds no safetensors"):
        example.file_batches(tmp_path, 1)
