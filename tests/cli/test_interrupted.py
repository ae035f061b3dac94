"""Ctrl-C in the middle of every long command: exit 130, one line, nothing half-written."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffpatch.cli import main
from diffpatch.files import read_json

SIZE = ["--height", "32", "--width", "64", "--num-frames", "9", "--steps", "2"]
TWO = ["-p", "a cat", "-p", "a dog"]
LAYOUT = ["--dense-steps", "0", "--dense-layers", "0"]
Press = Callable[[int], None]


@pytest.fixture
def press() -> Iterator[Press]:
    """Press Ctrl-C when a transformer begins its forward of this number, counted from 1."""
    begun, at = 0, 0

    def hook(module: torch.nn.Module, inputs: Any) -> None:
        nonlocal begun
        if type(module).__name__ != "WanTransformer3DModel":
            return
        begun += 1
        if begun == at:
            signal.raise_signal(signal.SIGINT)

    def when(number: int) -> None:
        nonlocal at
        at = number

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
    yield when
    handle.remove()
    signal.signal(signal.SIGINT, before)


def stopped(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the last line says after "interrupted", of a command that Ctrl-C ends."""
    assert main(words) == 130
    shown = capsys.readouterr()
    line = shown.err.splitlines()[-1]
    start = "diffpatch: interrupted; no file was left half-written; "
    assert line.startswith(start) and "Traceback" not in shown.err
    return line.removeprefix(start)


def left(folder: Path) -> set[str]:
    """The files in a folder, hidden ones too, by their paths in it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_rendering_of_several_prompts_goes_on(
    models: Path, tmp_path: Path, press: Press, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["render", "-m", str(models / "wan"), *TWO, *SIZE, "--format", "apng", "--quiet"]
    words += ["--method", "window", *LAYOUT, "-o", str(tmp_path)]
    press(10)  # 4 warm up, 4 are the first prompt
    assert stopped(words, capsys) == "--resume renders only what is missing"
    assert left(tmp_path) == {"001-a-cat/window.apng", "001-a-cat/render.json"}
    first = (tmp_path / "001-a-cat/render.json").stat().st_mtime_ns
    press(0)
    assert main([*words, "--resume"]) == 0
    assert (tmp_path / "001-a-cat/render.json").stat().st_mtime_ns == first
    assert (tmp_path / "002-a-dog/render.json").is_file()


def test_a_rendering_that_replaces_says_what_to_give_instead(
    models: Path, tmp_path: Path, press: Press, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["render", "-m", str(models / "wan"), *SIZE, "--quiet", "-o", str(tmp_path)]
    press(1)
    said = stopped([*words, *TWO, "--overwrite"], capsys)
    assert said == "--resume in place of --overwrite renders only what is missing"
    press(2)
    assert stopped([*words, *TWO[:2], "--overwrite"], capsys) == "the same command starts again"
    assert left(tmp_path) == set()


def test_a_sweep_goes_on(
    models: Path, tmp_path: Path, press: Press, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sweep", "-m", str(models / "wan"), *TWO[:2], *SIZE, "--quiet", "-o", str(tmp_path)]
    press(12)
    assert stopped(words, capsys) == "the same command goes on where it was"
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/run.json")}
    assert done and not list(tmp_path.glob("report.*")) and not list(tmp_path.rglob("*.partial*"))
    press(0)
    assert main(words) == 0
    assert (tmp_path / "report.html").is_file()
    assert {path: path.stat().st_mtime_ns for path in done} == done


@pytest.mark.parametrize(
    ("command", "at"),
    [
        (["eval", *TWO, *SIZE, "--method", "window", *LAYOUT, "--json", "FILE"], 6),
        (["bench", "render", *SIZE, "--method", "window", *LAYOUT, "--json", "FILE"], 6),
        (["calibrate", "-p", "a cat", *SIZE, "--method", "dense+temporal", *LAYOUT], 6),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_keeps_nothing_begins_anew(
    command: list[str], at: int, models: Path, tmp_path: Path, press: Press,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = tmp_path / "result.json"
    file.write_text("{}")  # of an earlier time: it stays as it is
    words = [str(file) if word == "FILE" else word for word in command]
    press(at)
    said = stopped([*words, "-m", str(models / "wan"), "--quiet"], capsys)
    assert said == "the same command starts again"
    assert left(tmp_path) == {"result.json"} and file.read_text() == "{}"


def test_exported_clips_are_whole_and_are_kept(
    models: Path, tmp_path: Path, press: Press, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "clips"
    words = ["eval", "-m", str(models / "wan"), *TWO, *SIZE, "--method", "window", *LAYOUT]
    press(14)
    said = stopped([*words, "--quiet", "--vbench-export", str(out)], capsys)
    assert said == f"the same command starts again; name another --vbench-export: {out} keeps clips"
    assert left(out) and all(name.endswith("-0.mp4") for name in left(out))


def test_a_tuning_goes_on(
    models: Path, tmp_path: Path, press: Press, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("diffpatch.tuning.tune.SIZES", (0.3, 0.6))
    size = ["--height", "128", "--width", "128", "--num-frames", "9", "--steps", "2"]
    words = ["tune", "-m", str(models / "wan"), *TWO, *size, "--kept", "0.5", "--caches", "--holds"]
    words += ["--target", "kept 0.8", "--quiet", "-o", str(tmp_path / "wan.json")]
    press(10)  # 4 tell the cost, 4 are the first prompt's
    assert stopped(words, capsys) == "the same command goes on where it was"
    [stage] = tmp_path.iterdir()
    assert stage.name.startswith("wan.curves-") and read_json(stage)
    press(0)
    assert main(words) == 0
    assert left(tmp_path) == {"wan.json", "wan.html", "wan.svg"}


@pytest.mark.parametrize("target", ["plan.png", "pictures"])
@pytest.mark.parametrize("method", [[], ["--method", "radial"]], ids=["all", "radial"])
def test_a_picture_of_a_plan_is_there_or_not(
    target: str, method: list[str], tmp_path: Path, press: Press,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def half(self: Image.Image, path: Path, *_: Any, **__: Any) -> None:
        Path(path).write_bytes(b"half")
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Image.Image, "save", half)
    words = ["plan", "--model", "demo", *method, "--draw", str(tmp_path / target)]
    assert stopped(words, capsys) == "the same command starts again"
    assert left(tmp_path) == set()


def test_measurements_of_kernels_are_kept(
    tmp_path: Path, press: Press, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def interrupted(device: str, shapes: Any, *, save: Callable[[Any], None], **_: Any) -> None:
        save({"rows": [1]})
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("diffpatch.cli.bench.kernels.bench_kernels", interrupted)
    file = tmp_path / "kernels.json"
    words = ["bench", "kernels", "--device", "cpu"]
    said = stopped([*words, "--json", str(file)], capsys)
    assert said == f"{file} holds what was measured; the same command starts again"
    assert read_json(file) == {"rows": [1]}
    assert stopped(words, capsys) == "the same command starts again"
