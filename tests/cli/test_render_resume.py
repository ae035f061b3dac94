"""What `diffpatch render --resume` takes for the same request: all that decides the result."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffpatch.cli import calibrate
from diffpatch.cli.errors import UsageError
from diffpatch.cli.output import keep_settings
from diffpatch.cli.render.job import TUNED, Job, RenderVariant, request
from diffpatch.cli.render.resume import is_finished
from diffpatch.files import DamagedFile, to_json
from diffpatch.pipelines.running import loading

LOAD = {"dtype": None, "offload": "none", "vae_tiling": False, "compile": False}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """With a first frame, and settings that choose the method."""
    chosen = tmp_path / "demo.json"
    chosen.write_text("{}", encoding="utf-8")
    return Job(
        source=loading.find("demo"), load=LOAD,
        variants=[RenderVariant(TUNED, {"settings": str(chosen), "target": "30 dB"})],
        prompts=["a cat"], call={"image": Image.new("RGB", (8, 8), "red"), "height": 8}, seed=0,
        steps=2, fps=8.0, format="webp", folders=[tmp_path],
    )  # fmt: skip


def test_another_request_is_not_finished_by_files_that_are_there(job: Job, tmp_path: Path) -> None:
    runs = {"tuned": job.variants[0].options}
    result = request(job, "a cat") | {"runs": {"tuned": {"options": runs["tuned"]}}}
    file = {"result": tmp_path / "render.json"}
    file["result"].write_text(to_json(result), encoding="utf-8")
    again = dataclasses.replace(job, call={**job.call, "image": Image.new("RGB", (8, 8), "red")})
    assert is_finished(file, request(again, "a cat"), runs)
    others: tuple[tuple[dict[str, Any], str], ...] = (
        ({"call": {**job.call, "image": Image.new("RGB", (8, 8), "blue")}}, "its inputs is"),
        ({"strength": 0.5, "first": (4, 4)}, "its strength is null, not 0.5"),
        ({"load": LOAD | {"dtype": torch.bfloat16}}, 'is null, not "torch.bfloat16"'),
    )
    for change, said in others:
        with pytest.raises(UsageError, match=said):
            is_finished(file, request(dataclasses.replace(job, **change), "a cat"), runs)
    Path(runs["tuned"]["settings"]).write_text('{"tuned": "anew"}', encoding="utf-8")
    with pytest.raises(UsageError, match="its inputs is"):
        is_finished(file, request(job, "a cat"), runs)


def test_a_result_of_an_earlier_version_is_still_the_same_request(job: Job, tmp_path: Path) -> None:
    """It names neither an image nor settings, where there were none."""
    plain = dataclasses.replace(job, call={"height": 8}, variants=[RenderVariant("radial", {})])
    found = request(plain, "a cat")
    for name in ("asked_dtype", "strength", "inputs"):
        assert found.pop(name) is None
    file = {"result": tmp_path / "render.json"}
    file["result"].write_text(json.dumps(found | {"runs": {"radial": {}}}), encoding="utf-8")
    assert is_finished(file, request(plain, "a cat"), {"radial": {}})


def test_results_of_other_settings_are_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "dense.json"
    keep_settings(path, {"seed": 0, "steps": 2})
    keep_settings(path, {"seed": 0, "steps": 2})
    with pytest.raises(UsageError, match="made with another steps;"):
        keep_settings(path, {"seed": 0})
    path.write_text('{"seed": 0', encoding="utf-8")
    with pytest.raises(DamagedFile, match=r"dense\.json is damaged"):
        keep_settings(path, {"seed": 0})


def test_a_calibration_repeats_that_no_step_or_layer_was_dense() -> None:
    """Left out, the published numbers of dense steps and layers would be taken."""
    given: dict[str, Any] = {
        "method": "dense+temporal",
        "set": [],
        "quality": None,
        "dense_last_steps": 0,
    }
    none = argparse.Namespace(**given, dense_steps=0, dense_layers=[])
    words = calibrate._options(none, (-5.0, -4.0, -3.0))
    assert words.endswith("--set threshold=-5,-4,-3 --dense-steps 0 --dense-layers 0")
    published = argparse.Namespace(**given, dense_steps=None, dense_layers=None)
    assert "--dense" not in calibrate._options(published, (-5.0, -4.0, -3.0)).replace("dense+", "")
