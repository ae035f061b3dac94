"""`diffpatch tune` and what takes its file, on a tiny pipeline."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import diffpatch
from diffpatch.cli import main
from diffpatch.targets.settings import Settings
from diffpatch.tuning import tune as tuning
from tests import tiny

SIZE = ["--height", "128", "--width", "128", "--num-frames", "9", "--steps", "4"]
TUNE = ["-p", "a cat", "-p", "a dog", "-p", "a fox", *SIZE, "--kept", "0.5", "--caches", "1000",
        "--holds"]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "wan"
    tiny.wan().pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tuned(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tuned") / "wan.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "SIZES", (0.3, 0.6))
        words = ["tune", "-m", model, *TUNE, "--hold-out", "1", "--target", "kept 0.8"]
        assert main([*words, "-o", str(path)]) == 0
    return path


def test_one_command_writes_settings_a_page_and_a_picture(
    tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {p.name for p in tuned.parent.iterdir()} == {"wan.json", "wan.html", "wan.svg"}
    settings = Settings.load(tuned)
    assert settings.measured_on.prompts == ["a cat", "a dog"]
    assert [one.prompt for one in settings.checked] == ["a fox"]
    assert {(run.sparse, run.cache) for run in settings.front} == {
        (1.0, 1000.0), (0.5, None), (0.5, 1000.0)
    }  # fmt: skip
    page = tuned.with_suffix(".html").read_text(encoding="utf-8")
    assert "a fox" in page and "kept fraction of each head" in page and "<script" not in page
    picture = tuned.with_suffix(".svg").read_text(encoding="utf-8")
    assert "attention 50% after 50% + cache 1000" in picture
    assert main(["plan", "--settings", str(tuned), "--target", "kept 0.8"]) == 0
    told = capsys.readouterr().out
    assert "attention 50%" in told and "target kept 0.8" in told and "a fox" in told


@pytest.mark.parametrize("suffix", [".json", ".html", ".svg"])
def test_a_file_that_is_there_is_not_replaced_unasked(
    model: str, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / f"wan{suffix}"
    mine.write_text("mine", encoding="utf-8")
    assert main(["tune", "-m", model, *TUNE, "-o", str(tmp_path / "wan.json")]) == 2
    assert f"wan{suffix} exists; add --overwrite" in capsys.readouterr().err
    assert [p.read_text(encoding="utf-8") for p in tmp_path.iterdir()] == ["mine"]


def test_rendering_with_settings(
    tuned: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["render", "-m", model, "-p", "a bird", *SIZE, "--format", "apng", "--quiet"]
    asked = ["--settings", str(tuned), "--target", "kept 0.8", "--compare", "dense"]
    assert main([*words, *asked, "--json", "-o", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["runs"]["tuned"]["kept"] <= 0.8 + 1e-6
    assert result["runs"]["tuned"]["options"]["target"] == "kept 0.8"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--settings", "TUNED"], "--settings and --target go together"),
        (["--target", "30 dB"], "--settings and --target go together"),
        (["--settings", "TUNED", "--target", "soon"], "must be a text such as"),
        (["--settings", "TUNED", "--target", "2x", "--set", "decay=1"], "drop --set"),
        (["--settings", "TUNED", "--target", "2x", "--method", "radial"], "drop --method"),
    ],
)
def test_targets_and_settings_belong_together(
    tuned: Path, model: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tuned) if word == "TUNED" else word for word in words]
    for command in (["render", "-m", model, "-p", "a", *SIZE], ["plan"]):
        assert main([*command, *words]) == 2
        assert message in capsys.readouterr().err


def test_an_impossible_target_is_answered_with_the_best(
    tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--settings", str(tuned), "--target", "90x"]) == 1
    assert "cannot be reached: the fastest that was measured" in capsys.readouterr().out


def test_a_sweep_takes_settings_and_caches(tuned: Path, model: str, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        f"model: {model}\nprompts: [a bird]\nsteps: 4\nnoise_floor: []\n"
        "sizes: {height: 128, width: 128, num_frames: 9}\n"
        "methods:\n  - {method: dense, cache: [1000]}\n"
        "  - {method: dense, hold: [1000]}\n"
        f"  - {{settings: {tuned}, target: [kept 0.8]}}\n",
        encoding="utf-8",
    )
    out = tmp_path / "runs"
    assert main(["sweep", str(sweep), "-o", str(out), "--quiet"]) == 0
    rows = json.loads((out / "summary.json").read_text(encoding="utf-8"))["rows"]
    labels = {row["label"] for row in rows}
    assert labels == {"dense", "dense cache=1000.0", "dense hold=1000.0", "kept 0.8 (wan.json)"}


def test_killed_at_any_moment_it_goes_on(model: str, tmp_path: Path) -> None:
    path = tmp_path / "wan.json"
    words = [sys.executable, "-m", "diffpatch", "tune", "-m", model, "-p", "a cat", *SIZE]
    words += [
        "--kept",
        "0.5",
        "--caches",
        "1000",
        "--holds",
        "--target",
        "kept 0.8",
        "-o",
        str(path),
    ]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    for line in process.stderr:  # the first clip of the front is begun, its curves are done
        if line.startswith("clip 2 of"):
            break
    process.kill()
    process.wait()
    left = {p.name.partition("-")[0] for p in tmp_path.iterdir()}
    assert "wan.curves" in left and not path.exists()
    again = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "curves 1 of 1" not in again.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"wan.json", "wan.html", "wan.svg"}
    assert (
        len(Settings.load(path).front) == 5
    )  # a cache; attention after 15 and 50 %, with and without


def test_what_was_tuned_is_what_a_patch_does(tuned: Path, model: str) -> None:
    pipe = tiny.wan()
    plain = pipe.run()
    settings = Settings.load(tuned)
    # What was timed on a busy machine may be slower than dense.
    front = [
        run.model_copy(update={"seconds": 1.0, "dense_seconds": 2.0}) for run in settings.front
    ]
    settings = settings.model_copy(update={"front": front})
    with diffpatch.patched(pipe.pipe, settings=settings, target="1.5x"):
        pass
    assert torch.equal(pipe.run(), plain)
