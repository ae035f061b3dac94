"""Reports of sweeps over images to start from, and of folders whose files are damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffpatch.eval.media import save_frames
from diffpatch.eval.sweep.report.page import _prompts, _Room
from diffpatch.eval.sweep.report.summary import summarize
from diffpatch.eval.sweep.scores import FEATURES, rescore
from diffpatch.files import DamagedFile, read_json, write_json
from tests.eval.sweep.report.tiny_report import PROMPTS, made, write


def runs() -> list[dict[str, Any]]:
    """Dense and two methods from four images, which have one prompt and one name."""
    found = []
    for number, prompt in enumerate(PROMPTS):
        image = {"path": f"{number}/start.png", "sha256": 64 * str(number)}
        three = made("dense", "dense", prompt), made("method", "radial", prompt, 10.0, 30.0)
        for result in (*three, made("method", "window", prompt, 10.0, 20.0 + number)):
            found.append(result | {"prompt": "it moves", "image": image})
    return found


def test_images_of_one_prompt_are_scenes_of_their_own(tmp_path: Path) -> None:
    summary = write(tmp_path, runs(), {"psnr": 25.0})
    [_, _, window] = summary.rows
    names = [f"it moves (start.png, {6 * str(number)})" for number in range(4)]
    assert list(window.by_prompt) == names and [each["prompt"] for each in window.each] == names
    assert window.behind is not None and window.behind["mean"] == pytest.approx(-8.5)
    scenes = _prompts(summary.results, tmp_path, _Room(), None)
    assert [scene["text"] for scene in scenes] == names
    alone = [result | {"prompt": ""} for result in runs()]
    assert "(start.png, 000000)" in write(tmp_path, alone, {}).rows[1].by_prompt


def test_damaged_features_are_named(tmp_path: Path) -> None:
    found = runs()
    for result in found:
        (tmp_path / "runs" / result["name"]).mkdir(parents=True)
        np.save(tmp_path / "runs" / result["name"] / FEATURES, np.zeros((1, 3), np.float32))
    assert write(tmp_path, found, {}).rows[1].distances["clips"] == 4
    broken = tmp_path / "runs" / found[1]["name"] / FEATURES
    for content in (b"", broken.read_bytes()[:-4]):
        broken.write_bytes(content)
        with pytest.raises(DamagedFile, match=r"features\.npy is damaged; add --rescore"):
            summarize(tmp_path)


def test_scoring_anew_keeps_details_of_short_clips_and_no_stale_features(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    save_frames(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
                run / "frames.npz")  # fmt: skip
    prompt = "a small blue ring grows over a gray background"
    known = {"model": "toy", "prompt": prompt, "quality": {"objects": 1.0}}
    write_json(run / "run.json", known)
    write_json(tmp_path / "sweep.json", {"networks": {}})
    np.save(run / FEATURES, np.zeros((1, 3), np.float32))  # of a network that was named before
    assert rescore(tmp_path) == 1
    assert "objects" in read_json(run / "run.json")["quality"]
    assert not (run / FEATURES).exists()
    plain = known | {"quality": {"clip_score": 1.0}}
    write_json(run / "run.json", plain)
    assert rescore(tmp_path) == 1 and "objects" not in read_json(run / "run.json")["quality"]
