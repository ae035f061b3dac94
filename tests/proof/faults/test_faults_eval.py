"""Faults while `diffpatch eval` writes: what was measured is never lost, and one line says why."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffpatch.cli import eval as command
from diffpatch.cli import generation, main
from diffpatch.eval import media
from diffpatch.eval.quality import evaluate
from tests.proof.faults.injected import At, full, killed_at, read_only

RESULT: dict[str, Any] = {
    "rows": [{"name": "fast", "count": 1, "scores": {"psnr": 21.5}, "sets": {}, "items": {}}],
    "tools": {"clip": "contrast"}, "missing": {}, "notes": [],
}  # fmt: skip
CLIPS = ["a cat-0.mp4", "a dog-0.mp4"]
OLD = '{"old": 1}\n'
FAULTS = pytest.mark.parametrize("fault", [full, read_only])
LASTING = pytest.mark.parametrize("lasting", [False, True])


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], int]:
    """The command on folders that take no time to measure, over scores of an earlier call."""
    monkeypatch.setattr(command, "_folders", lambda *_: (RESULT, []))
    scores = tmp_path / "scores.json"
    scores.write_text(OLD)
    return lambda: main(["eval", "fast", "--reference", "dense", "--json", str(scores), "--quiet"])


def test_scores_of_a_killed_eval_are_the_old_or_the_new(
    folders: Callable[[], int], tmp_path: Path
) -> None:
    number = 0
    while killed_at(number, folders):
        assert json.loads((tmp_path / "scores.json").read_text()) in (json.loads(OLD), RESULT)
        number += 1
    assert number > 4, "the faults met nothing"


@FAULTS
@LASTING
def test_scores_that_cannot_be_written_are_printed(
    folders: Callable[[], int], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    fault: Callable[[], None], lasting: bool,
) -> None:  # fmt: skip
    scores, number, met = tmp_path / "scores.json", 0, 0
    while True:
        scores.write_text(OLD)
        with At(number, fault, lasting) as at:
            code = folders()
        shown, written = capsys.readouterr(), json.loads(scores.read_text())
        if at.count <= number:
            break
        number += 1
        assert written in (json.loads(OLD), RESULT)
        if code == 0:  # what failed was not needed
            assert written == RESULT
            continue
        assert len(shown.err.splitlines()) == 1
        assert "space" in shown.err or "Read-only" in shown.err
        if code == 1:
            assert "21.50" in shown.out
            assert json.loads(shown.out[shown.out.index("{") :]) == RESULT
            met += 1
        else:  # said before anything was measured
            assert code == 2 and not shown.out
    assert code == 0 and written == RESULT and "{" not in shown.out and met > 2


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], int]:
    """The command on a model that takes no time, with clips for VBench; its result is printed."""

    def measured(*_: Any, keep: Callable[..., None], **__: Any) -> dict[str, Any]:
        for number in range(2):
            keep("dense", number, torch.zeros(2, 3, 4, 4))
        return RESULT

    def save(images: Any, path: Path, fps: float) -> None:
        with path.open("w") as file:
            file.write("whole")

    monkeypatch.setattr(command, "_tools", lambda *_: None)
    monkeypatch.setattr(command, "fitted_call", lambda call, pipe: call)
    load = SimpleNamespace(dtype=torch.float32)
    monkeypatch.setattr(generation, "load", lambda *_: load)
    monkeypatch.setattr(evaluate, "evaluate_model", measured)
    monkeypatch.setattr(media, "has_ffmpeg", lambda: True)
    monkeypatch.setattr(media, "save", save)
    words = ["eval", "-m", "demo", "-p", "a cat", "-p", "a dog", "--json", "--quiet"]
    return lambda folder: main([*words, "--vbench-export", str(tmp_path / folder)])


def clips(folder: Path) -> list[str]:
    """The names of those that are there, all of them whole."""
    found = sorted(folder.glob("dense/*.mp4"))
    assert all(path.read_text() == "whole" for path in found)
    return [path.name for path in found]


@FAULTS
@LASTING
def test_a_clip_that_cannot_be_kept_does_not_end_a_measurement(
    model: Callable[[str], int], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    fault: Callable[[], None], lasting: bool,
) -> None:  # fmt: skip
    number = met = 0
    while True:
        with At(number, fault, lasting) as at:
            code = model(f"{number}")
        shown, found = capsys.readouterr(), clips(tmp_path / f"{number}")
        if at.count <= number:
            break
        number += 1
        if code == 0:  # what failed was not needed
            assert found == CLIPS and shown.err == ""
            continue
        assert len(shown.err.splitlines()) == 1
        assert "space" in shown.err or "Read-only" in shown.err
        if code == 1:  # measured, and said what is missing; 2: said before anything was done
            assert json.loads(shown.out)["rows"] == RESULT["rows"]
            assert f"clips are missing in {tmp_path / str(number - 1)}: " in shown.err
            met += 1
        else:
            assert code == 2 and not shown.out and not found
    assert code == 0 and shown.err == "" and found == CLIPS and met > 6


def test_clips_of_a_killed_eval_are_whole(model: Callable[[str], int], tmp_path: Path) -> None:
    number = 0
    while killed_at(number, functools.partial(model, f"{number}")):
        clips(tmp_path / f"{number}")
        number += 1
    assert number > 6
