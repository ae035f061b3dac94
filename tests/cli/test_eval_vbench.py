"""VBench from the command line: clips under the names it reads, its scores beside ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffpatch.cli import main
from diffpatch.eval import media
from diffpatch.eval.quality import items, vbench

pytest.importorskip("imageio_ffmpeg")

PROMPTS = {"a": "a cat, in snow", "b": "a dog", "c": "a cat, in snow"}


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Dense clips as arrays, a method's as mp4, and what they show."""
    (tmp_path / "dense").mkdir()
    (tmp_path / "fast").mkdir()
    generator = torch.Generator().manual_seed(0)
    for name in PROMPTS:
        coarse = torch.rand(1, 3, 2, 3, 3, generator=generator)
        clip = torch.nn.functional.interpolate(coarse, (5, 32, 48), mode="trilinear")[0]
        np.save(tmp_path / "dense" / f"{name}.npy", clip.transpose(0, 1).numpy())
        media.save(media.to_images(clip.transpose(0, 1)), tmp_path / "fast" / f"{name}.mp4", 8)
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    return tmp_path


def command(folders: Path, *more: str) -> list[str]:
    words = ["eval", str(folders / "fast"), "--reference", str(folders / "dense"), "--quiet"]
    words += ["--captions", str(folders / "prompts.json")]
    return [*words, "--vbench-export", str(folders / "out"), *more]


def write_result(path: Path, scores: dict[str, float]) -> str:
    path.write_text(json.dumps({name: [value, []] for name, value in scores.items()}))
    return str(path)


def test_clips_go_out_under_their_prompts(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = write_result(folders / "r.json", {"scene": 0.25})
    shown = folders / "scores.json"
    words = command(folders, "--vbench-results", f"fast={scores}", "--json", str(shown))
    assert main(words) == 0
    names = ["a cat, in snow-0.mp4", "a cat, in snow-1.mp4", "a dog-0.mp4"]
    for row in ("reference", "fast"):
        assert sorted(path.name for path in (folders / "out" / row).iterdir()) == names
    pairs = {"a": names[0], "c": names[1], "b": names[2]}  # a prompt that comes again: index 1
    for name, file in pairs.items():
        source, copied = folders / "fast" / f"{name}.mp4", folders / "out" / "fast" / file
        assert copied.read_bytes() == source.read_bytes()
        clip = torch.from_numpy(np.load(folders / "dense" / f"{name}.npy"))
        encoded = items.read_frames(folders / "out" / "reference" / file)
        assert encoded.shape == clip.shape and (encoded - clip).abs().mean() < 0.03
    result, table = json.loads(shown.read_text()), capsys.readouterr().out
    assert result["vbench"]["fast"]["dimensions"] == {"scene": 0.25}
    assert len(result["rows"]) == 3 and "scene" in table and "PSNR" in table
    assert main(words) == 2  # never over an earlier export
    assert "exists; choose another --vbench-export" in capsys.readouterr().err


def test_scores_are_read_without_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    low, high = dict.fromkeys(vbench.QUALITY, 0.9), dict.fromkeys(vbench.SEMANTIC, 0.3)
    first = write_result(tmp_path / "q.json", low)
    second = write_result(tmp_path / "s.json", high)
    words = ["eval", "--vbench-results", f"dense={first}", "--vbench-results", f"dense={second}"]
    words += ["--vbench-results", f"radial={first}"]
    assert main(words) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert lines["VBench"] == ["dense", "radial"]
    assert lines["scene"] == ["30.00%"] and lines["total"][1] == "incomplete"
    assert main([*words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert set(found) == {"vbench"} and found["vbench"]["radial"]["missing"] == [*vbench.SEMANTIC]
    dense = found["vbench"]["dense"]
    assert dense["total"] == pytest.approx(0.8 * dense["quality"] + 0.2 * dense["semantic"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vbench-results", "r.json"], "takes ROW=FILE"),
        (["--vbench-results", "radial=no.json"], "there is no file no.json"),
        (["--vbench-results", "radial=DIR/prompts.json"], "is not a result of VBench"),
        (
            ["DIR/fast", "--reference", "DIR/dense", "--vbench-export", "DIR/out"],
            "no prompt is",
        ),
        (["-p", "a/b", "--vbench-export", "DIR/out"], "cannot be a file name"),
        (["-p", "a", "--vbench-export", "DIR/prompts.json"], "another --vbench-export"),
    ],
)
def test_bad_requests_are_one_line(
    words: list[str], message: str, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [word.replace("DIR", str(folders)) for word in words]
    assert main(["eval", *places, "--quiet"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.splitlines()) == 1 and message in shown.err
    assert not (folders / "out").exists()
    shutil.rmtree(folders)
