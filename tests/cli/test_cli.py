"""The command line, in this process and on tiny pipelines: files, figures, every way to fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import diffpatch
from diffpatch.cli import main
from diffpatch.cli.parameters import convert
from diffpatch.eval.card import STAGE, TILE, card_text
from tests import tiny
from tests.tiny import images

SIZE = ["--height", "32", "--width", "32", "--num-frames", "17", "--steps", "2"]


@pytest.fixture(scope="module")
def rendered(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of one comparison."""
    out = tmp_path_factory.mktemp("rendered")
    options = ["--compare", "dense", "--format", "apng", "--dense-layers", "0", "--quiet"]
    model = str(models / "wan")
    assert main(["render", "-m", model, "-p", "a cat", *SIZE, *options, "-o", str(out)]) == 0
    return out


def frames(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.stack([np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(image)])


def test_render_writes_everything_it_names(rendered: Path) -> None:
    names = {"dense.apng", "radial.apng", "radial_vs_dense.apng", "radial_vs_dense.png"}
    names |= {"card.png", "card.webp", "index.html"}
    with Image.open(rendered / "card.png") as still, Image.open(rendered / "card.webp") as moving:
        assert still.size == moving.size == (1200, 630)
    assert {path.name for path in rendered.iterdir()} == {*names, "render.json"}
    result = json.loads((rendered / "render.json").read_text())
    assert {Path(path).name for path in result["files"].values()} == {*names, "render.json"}
    assert frames(rendered / "radial.apng").shape == (17, 32, 32, 3)
    assert len(frames(rendered / "radial_vs_dense.apng")) == 17


def test_the_page_shows_both_clips_and_the_line_to_paste(rendered: Path) -> None:
    page = (rendered / "index.html").read_text(encoding="utf-8")
    assert page.index('src="dense.apng"') < page.index('src="radial.apng"')
    assert "diffpatch.patch(pipe, &#34;radial&#34;, dense_layers=0)" in page
    assert "https://" not in page and "card.webp" in page
    said = card_text(rendered / "card.png")
    result = json.loads((rendered / "render.json").read_text())
    assert said == card_text(rendered / "card.webp")
    assert (said.speedup, said.kept) == (
        result["speedup"]["total"], result["runs"]["radial"]["kept"],
    )  # fmt: skip


def test_the_card_shows_what_was_chosen_by_content(models: Path, tmp_path: Path) -> None:
    """Not all that there was to choose from, which is every pair."""
    chosen = ["--method", "dynamic", "--set", "kept=0.3", "--set", "rest=drop", "--set", "tile=16"]
    size = ["--height", "64", "--width", "64", "--num-frames", "9", "--steps", "2"]
    words = ["-m", str(models / "wan"), "-p", "a cat", *chosen, *size, "--format", "apng"]
    free = ["--dense-steps", "0", "--dense-layers", "0", "--compare", "dense", "--quiet"]
    assert main(["render", *words, *free, "-o", str(tmp_path)]) == 0
    left, top = STAGE[0] + 350, STAGE[1] + STAGE[3] + 14
    with Image.open(tmp_path / "card.png") as still:
        green = np.array(still.convert("RGB"))[top : top + TILE, left : left + TILE, 1]
    assert green.min() < 60 and green.max() > 200


def test_render_reports_times_quality_and_circumstances(rendered: Path) -> None:
    result = json.loads((rendered / "render.json").read_text())
    dense, fast = result["runs"]["dense"], result["runs"]["radial"]
    for run in (dense, fast):
        assert len(run["seconds"]["steps"]) == 2
        assert 0 < run["seconds"]["denoising"] < run["seconds"]["total"]
    assert dense["kept"] == 1.0 and 0 < fast["kept"] < 1.0
    assert fast["kept"] == pytest.approx(fast["report"]["kept"], abs=1e-4)
    gain = dense["seconds"]["denoising"] / fast["seconds"]["denoising"]
    assert result["speedup"]["denoising"] == pytest.approx(gain, rel=0.01)
    assert len(result["quality"]["psnr"]["per_frame"]) == 17
    assert 10 < result["quality"]["psnr"]["mean"] < 100
    assert result["settings"]["num_inference_steps"] == 2 and result["seed"] == 0
    assert result["environment"]["versions"]["torch"] == torch.__version__
    assert "warmed up" in result["measured"]


def test_the_dense_video_is_what_the_pipeline_makes(rendered: Path) -> None:
    call = {"height": 32, "width": 32, "num_frames": 17, "num_inference_steps": 2}
    video = tiny.wan().run(**call, negative_prompt=None, max_sequence_length=512, prompt="a cat")
    expected = (video[0].permute(0, 2, 3, 1) * 255).round().numpy()
    assert np.abs(frames(rendered / "dense.apng") - expected).max() <= 1


@pytest.mark.parametrize(("method", "name"), [("dense", "held"), ("window", "window")])
def test_steps_are_held_with_and_without_a_method(
    method: str, name: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["-m", str(models / "wan"), "-p", "a cat", *SIZE[:-1], "6", "--format", "apng"]
    words += ["--method", method, "--hold", "1000", "--compare", "dense", "--quiet", "--json"]
    assert main(["render", *words, "-o", str(tmp_path)]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert list(runs) == ["dense", name] and runs[name]["options"]["hold"] == 1000
    assert runs[name]["report"]["held_steps"] == 4, "two steps tell how fast the result changes"
    assert (tmp_path / f"{name}.apng").is_file()


def test_json_on_stdout_and_nothing_else(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# a comment\na dog\n\n")
    model = ["-m", str(models / "wan"), "-p", "a cat", "--prompt_file", str(prompts)]
    chosen = ["--method", "window", "--set", "window=1,2,2", "--set", "shift=none"]
    quick = ["--num_inference_steps=2", *SIZE[:-2], "--format", "webp", "--quiet", "--json"]
    assert main(["render", *model, *chosen, *quick, "-o", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    results = json.loads(shown.out)
    assert [result["prompt"] for result in results] == ["a cat", "a dog"]
    assert results[0]["runs"]["window"]["options"]["window"] == [1, 2, 2]
    folders = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert folders == ["001-a-cat", "002-a-dog"]
    assert (tmp_path / "out" / "002-a-dog" / "window.webp").is_file()


def test_images_and_summary(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "start.png"
    Image.new("RGB", (32, 32), "teal").save(image)
    common = ["-m", str(models / "flux"), "-p", "a cat", "--height", "32", "--width", "32"]
    method = ["--method", "neighborhood", "--compare", "dense", "--steps", "3"]
    assert main(["render", *common, *method, "-o", str(tmp_path / "text")]) == 0
    shown = capsys.readouterr()
    assert "speedup" in shown.out and "PSNR to dense" in shown.out
    assert "kept" in shown.err and "s/step" in shown.err
    with Image.open(tmp_path / "text" / "neighborhood.png") as picture:
        assert picture.size == (32, 32)
    start = ["--image", str(image), "--method", "dense", "--quiet"]
    assert main(["render", *common, *start, "--steps", "4", "-o", str(tmp_path / "image")]) == 0
    result = json.loads((tmp_path / "image" / "render.json").read_text())
    assert result["pipeline"] == "FluxImg2ImgPipeline"
    assert list(result["runs"]) == ["dense"] and "speedup" not in result


def test_image_to_video(models: Path, tmp_path: Path) -> None:
    image = tmp_path / "start.png"
    Image.new("RGB", (64, 64), "teal").save(image)
    start = ["-m", str(models / "i2v"), "-p", "a cat", "--image", str(image)]
    options = [*SIZE, "--format", "png", "--quiet", "-o", str(tmp_path / "out")]
    assert main(["render", *start, *options]) == 0
    assert len(list((tmp_path / "out" / "radial").iterdir())) == 17


def test_a_dry_run_shows_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--compare", "dense", "--set", "decay=1", "--dense-steps", "0.25", "--dry-run"]
    assert main(["render", "-m", "demo", "-p", "a cat", *options, "-o", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "decay=1.0" in shown and "radial_vs_dense" in shown and "num_frames" in shown
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "radail"], "did you mean 'radial'"),
        (["--methd", "radial"], "did you mean '--method'"),
        (["--set", "deca=1"], "did you mean 'decay'"),
        (["--set", "decay=much"], "must be of type float"),
        (["--set", "decay"], "must be key=value; keys: decay"),
        (["--set", "decay=-1"], "decay=-1.0 must be"),
        (["--method", "radial+window"], "does not combine"),
        (["--method", "radial+temporal", "--set", "refesh=2"], "did you mean 'refresh'"),
        (["--method", "dense", "--set", "decay=1"], "dense has none"),
        (["--steps", "0"], "at least 1"),
        (["--dense-steps", "1.5"], "a count such as 12 or a fraction"),
        (["--dense-steps", "9", "--steps", "4"], "more than the 4 steps"),
        (["--dense-layers", "a,b"], "layer numbers"),
        (["--image", "no/such/file.png"], "there is no file no/such/file.png"),
        (["--prompt-file", "no/such/file.txt"], "there is no file"),
        (["--prompt-file", "."], ". is a folder: give a file"),
        (["--dtype", "fp8"], "known: auto, bf16, fp16, fp32"),
        (["--format", "mp5"], "did you mean 'mp4'"),
        (["--model", "no/such/folder/"], "a folder, or a hub id"),
        (["--seed", "many"], "whole number"),
        (["--seed", str(2**63)], "at least 0 and below 9223372036854775808"),
        (["--device", "tpu7"], "device"),
        (["--hold", "0"], "at least 1e-06"),
    ],
)
def test_bad_requests_are_one_line(
    options: list[str],
    message: str,
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["render", "-m", str(models / "wan"), "-p", "a cat", "--quiet", *SIZE, *options]
    assert fails(words, tmp_path, capsys, code=2).count(message) == 1


def test_requests_that_only_the_model_can_refuse(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "notes.png"
    image.write_text("no image")
    wan = ["render", "-m", str(models / "wan"), "-p", "a cat", "--quiet", *SIZE]
    flux = ["render", "-m", str(models / "flux"), "-p", "a cat", "--quiet"]
    i2v = ["render", "-m", str(models / "i2v"), "-p", "a cat", "--quiet"]
    empty = ["render", "-m", str(tmp_path), "-p", "a cat"]
    wide = ["--method", "neighborhood", "--set", "window=99"]
    for words, message in [
        ([*wan, *wide], "window"),
        ([*wan, "--dense-layers", "9"], "dense_layers=9"),
        ([*wan, "--height", "50"], "height=50 must be a multiple of 16 for wan, such as 48"),
        ([*wan, "--image", str(image)], "takes no image"),
        ([*i2v, "--image", str(image)], "not an image that Pillow can read"),
        (i2v, "give --image"),
        ([*flux, "--num-frames", "9"], "drop --num-frames"),
        ([*flux, "--format", "mp4"], "cannot hold images"),
        ([*flux, "--method", "radial"], "neighborhood or window"),
        (empty, "no model_index.json"),
        (["render"], "give --prompt"),
        ([], "required: COMMAND"),
    ]:
        assert message in fails(words, tmp_path / "out", capsys, code=2)


def test_a_dry_run_finds_what_only_configs_tell(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any weights are loaded, which may take long."""
    images.dit().pipe.save_pretrained(tmp_path / "dit")
    render = ["render", "-p", "a cat", "--dry-run", "--quiet", "-m"]
    square = ["--height", "32", "--width", "32"]
    for words, message in [
        ([str(models / "wan"), "--width", "71"], "width=71 must be a multiple of 16"),
        ([str(tmp_path / "dit")], "DiTPipeline takes no prompt, it needs class_labels"),
        (
            [str(models / "wan"), "--method", "neighborhood", "--set", "window=[99,2,2]"],
            "window along time=99 must be between 1 and the axis length",
        ),
        (
            [str(models / "flux"), *square, "--method", "window", "--set", "window=[1,2,99]"],
            "window along width=99",
        ),
    ]:
        assert message in fails([*render, *words], tmp_path / "out", capsys, code=2)
    quick = ["sweep", "-p", "a cat", "-o", str(tmp_path / "out"), "-m", str(tmp_path / "dit")]
    assert "takes no prompt" in fails([*quick, "--height", "32", "--width", "32"], tmp_path / "x",
                                      capsys, code=2)  # fmt: skip
    assert main([*render, str(models / "flux"), "-o", str(tmp_path / "out")]) == 0
    [run] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("run ")]
    assert run.split()[1] == "neighborhood"  # radial is for videos
    if Path("/proc/version").is_file():  # where not even root can write
        assert main([*render, str(models / "flux"), "-o", "/proc/diffpatch"]) == 2
        assert "/proc/diffpatch cannot be written to" in capsys.readouterr().err


def test_a_reader_who_has_seen_enough_is_no_error() -> None:
    command = [sys.executable, "-m", "diffpatch", "families"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # as `| head` does
    assert (process.stderr.read(), process.wait()) == (b"", 0)


def test_results_are_kept_unless_told_otherwise(
    models: Path, rendered: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["render", "-m", str(models / "wan"), "-p", "a cat", *SIZE, "--format", "apng"]
    assert main([*words, "--compare", "dense", "-o", str(rendered)]) == 2
    assert "add --overwrite" in capsys.readouterr().err


def test_broken_weights_write_nothing(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["render", "-m", str(models / "nan"), "-p", "a cat", "--quiet", *SIZE]
    line = fails(words, tmp_path / "out", capsys, code=1)
    assert "NaN" in line and "--dtype" in line


def test_errors_of_ours_show_their_origin_on_request(
    models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def broken(*args: Any, **options: Any) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr("diffpatch.cli.render.sampling.sample", broken)
    words = ["render", "-m", str(models / "wan"), "-p", "a cat", "--quiet", *SIZE]
    assert "AssertionError: a bug (--debug" in fails(words, tmp_path / "out", capsys, code=1)
    with pytest.raises(AssertionError, match="a bug"):
        main([*words, "-o", str(tmp_path / "out"), "--debug"])


def test_ctrl_c_leaves_nothing_behind(models: Path, tmp_path: Path) -> None:
    """In a process of its own, because only there Ctrl-C is what a user's Ctrl-C is."""
    out = tmp_path / "out"
    words = ["-m", str(models / "wan"), "-p", "a cat", *SIZE[:-1], "2000", "-o", str(out)]
    command = [sys.executable, "-m", "diffpatch", "render", *words]

    def listen() -> None:  # where the tests run in the background, their processes would not
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listen) as process:
        assert process.stderr is not None
        first = [process.stderr.readline() for _ in range(2)]
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert first[1].startswith("warming up"), [*first, rest]
    assert process.returncode == 130
    said = "interrupted; no file was left half-written; the same command starts again"
    assert rest.splitlines()[-1] == f"diffpatch: {said}"
    assert "Traceback" not in rest
    assert not out.exists()


@pytest.mark.parametrize("command", ["methods", "families"])
def test_tables_list_the_registries(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    known = (
        diffpatch.list_methods()
        if command == "methods"
        else [f.name for f in diffpatch.list_families()]
    )
    assert main([command]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in known)
    assert main([command, "--json"]) == 0
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)] == list(known)


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("3", int | float, 3),
        ("0.5", int | float, 0.5),
        ("-1", int | float | tuple[int | float, ...], -1),
        ("(4, 0.5,8)", int | float | tuple[int | float, ...], (4, 0.5, 8)),
        ("5,", int | tuple[int, ...], (5,)),
        ("1,2,3", tuple[int, int, int], (1, 2, 3)),
        ("auto", str | int, "auto"),
        ("7", str | int, 7),
        ("none", int | None, None),
        ("yes", bool, True),
        ("false", bool | tuple[bool, bool, bool], False),
    ],
)
def test_values_get_the_type_of_their_field(text: str, hint: Any, value: Any) -> None:
    result = convert(text, hint)
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(("text", "hint"), [("x", int), ("1,2", tuple[int, int, int]), ("2", bool)])
def test_values_of_another_type_are_refused(text: str, hint: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        convert(text, hint)


def fails(words: list[str], out: Path, capsys: pytest.CaptureFixture[str], code: int) -> str:
    """The one line that a failing command prints; it must leave nothing behind."""
    before = sorted(out.iterdir()) if out.exists() else None
    output = ["-o", str(out)] if words[:1] == ["render"] else []
    assert main([*words, *output]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("diffpatch: "), shown.err
    assert (sorted(out.iterdir()) if out.exists() else None) == before
    return lines[0]


def test_a_pipe_of_the_shell_is_a_file_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_text, args=("a red circle\n",), daemon=True).start()
    words = ["render", "-m", "demo", "--prompt-file", str(pipe), "-o", str(tmp_path / "out")]
    assert main([*words, "--dry-run"]) == 0
    assert "a red circle" in capsys.readouterr().out
