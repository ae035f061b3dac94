"""The COCO and VBench examples on a handful of tiny items: rendered, resumed, measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffpatch.eval.quality import items, vbench
from tests import tiny
from tests.eval import tiny_eval
from tests.scripts import load_example

WORDS = ["a cat", "a red dog", "two birds", "a fox in snow", "the sea"]


@pytest.fixture
def coco(tmp_path: Path) -> dict[str, Path]:
    """Five real pictures with COCO's annotations, a tiny Flux, and tiny judges."""
    (tmp_path / "val").mkdir()
    generator = torch.Generator().manual_seed(0)
    images, annotations = [], []
    for number, words in enumerate(WORDS):
        pixels = torch.randint(0, 255, (40, 50 + number, 3), generator=generator)
        file = f"COCO_val2014_{number + 42:012d}.jpg"
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(tmp_path / "val" / file)
        images.append({"id": number + 42, "file_name": file})
        annotations += [{"image_id": number + 42, "caption": text} for text in (words, "second")]
    data = json.dumps({"images": images, "annotations": annotations})
    (tmp_path / "captions.json").write_text(data)
    tiny.flux().pipe.save_pretrained(tmp_path / "flux")
    tiny_eval.save_clip(tmp_path / "clip")
    tiny_eval.save_dinov2(tmp_path / "dinov2")
    return {name: tmp_path / name for name in ("val", "captions.json", "flux", "clip", "dinov2")}


def coco_words(coco: dict[str, Path], out: Path, *more: str) -> list[str]:
    words = ["--images", str(coco["val"]), "--captions", str(coco["captions.json"])]
    words += ["--model", str(coco["flux"]), "--clip", str(coco["clip"]), "-o", str(out)]
    words += ["--features", str(coco["dinov2"]), "--height", "32", "--width", "32"]
    return [*words, "--steps", "1", "--set", "window=0.5", *more]


def test_coco(
    coco: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    script, out = load_example("coco_fid"), tmp_path / "out"
    captions = script.read_captions(coco["captions.json"], 9)
    assert list(captions.values()) == WORDS
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert script.main(coco_words(coco, out)) == 0
    assert len(list((out / "dense").iterdir())) == len(list((out / "neighborhood").iterdir())) == 2
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert script.main(coco_words(coco, out)) == 0
    shown = capsys.readouterr()
    assert "6 pictures are left" in shown.err and "CLIP" in shown.out and "FD" in shown.out
    result = json.loads((out / "scores.json").read_text())
    halves, dense, fast = result["rows"]
    assert (halves["count"], dense["count"], fast["count"]) == (5, 5, 5)
    for row in (dense, fast):
        [sets] = row["sets"].values()
        assert sets["fd"] > 0 and sets["small_sample"] and "kd" in sets
        assert "clip_score" in row["scores"]
    assert "psnr" in fast["scores"] and "psnr" not in dense["scores"]
    assert before.items() <= {p: p.stat().st_mtime_ns for p in out.rglob("*.png")}.items()
    assert script.main(coco_words(coco, out)) == 0
    assert "0 pictures are left" in capsys.readouterr().err
    assert json.loads((out / "scores.json").read_text())["rows"] == result["rows"]
    for changed in (["--seed", "3"], ["--set", "stride=1"]):
        assert script.main(coco_words(coco, out, *changed)) == 2
        assert "choose another -o" in capsys.readouterr().err


def test_coco_needs_its_pictures(
    coco: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_example("coco_fid")
    assert script.main(coco_words(coco, tmp_path / "out", "--set", "windw=1")) == 2
    assert "did you mean 'window'" in capsys.readouterr().err
    next(coco["val"].iterdir()).unlink()
    assert script.main(coco_words(coco, tmp_path / "out", "--count", "5")) == 2
    assert "has no picture COCO_val2014" in capsys.readouterr().err


def test_vbench_renders_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("imageio_ffmpeg")
    script, out = load_example("vbench_prompts"), tmp_path / "videos"
    tiny.wan().pipe.save_pretrained(tmp_path / "wan")
    (tmp_path / "list.txt").write_text("A cat.\n\nA dog, in snow\nA cat.\n")
    words = ["render", str(tmp_path / "list.txt"), "-o", str(out), "--samples", "2"]
    words += ["--model", str(tmp_path / "wan"), "--height", "32", "--width", "32"]
    words += ["--num-frames", "5", "--steps", "1", "--method", "window", "--seed", "3"]
    assert script.main(words) == 0
    names = ["A cat.-0.mp4", "A cat.-1.mp4", "A dog, in snow-0.mp4", "A dog, in snow-1.mp4"]
    assert sorted(path.name for path in out.glob("*.mp4")) == names
    clips = [items.read_frames(out / name) for name in names]
    assert all(clip.shape == (5, 3, 32, 32) for clip in clips)
    assert not torch.equal(clips[0], clips[1])  # other seeds
    stamps = {name: (out / name).stat().st_mtime_ns for name in names[:3]}
    (out / names[3]).unlink()
    assert script.main(words) == 0
    assert "1 of 4 videos are left" in capsys.readouterr().err
    assert {name: (out / name).stat().st_mtime_ns for name in names[:3]} == stamps
    assert torch.equal(items.read_frames(out / names[3]), clips[3])  # the seed it had before


def vbench_result(folder: Path, value: float, **changes: float) -> Path:
    folder.mkdir(exist_ok=True)
    names = [*vbench.QUALITY, *vbench.SEMANTIC]
    scores = dict.fromkeys(names, value) | changes
    entry: dict[str, Any] = {
        name: [score, [{"video_path": "a.mp4", "video_results": score}]]
        for name, score in scores.items()
    }
    path = folder / "radial_eval_results.json"
    path.write_text(json.dumps(entry))
    return path


def test_vbench_scores_are_normalised_and_weighted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = {name: high for part in (vbench.QUALITY, vbench.SEMANTIC)
            for name, (_, high, _) in part.items()}  # fmt: skip
    perfect = vbench.read_result([vbench_result(tmp_path, 0.0, **best)])
    assert perfect["quality"] == perfect["semantic"] == perfect["total"] == pytest.approx(1)
    assert perfect["missing"] == [] and perfect["videos"]["scene"] == 1
    # A half-weight dimension at its lowest takes 0.5 of 6.5 from quality, and 0.8 of that in all.
    still = vbench.read_result([vbench_result(tmp_path, 0.0, **{**best, "dynamic_degree": 0.0})])
    assert still["total"] == pytest.approx(1 - 0.8 * 0.5 / 6.5)
    percent = vbench.read_result([vbench_result(tmp_path, 0.5, imaging_quality=64.0)])
    assert percent["dimensions"]["imaging_quality"] == pytest.approx(0.64)
    script = load_example("vbench_prompts")
    assert script.main(["read", str(tmp_path / "radial_eval_results.json")]) == 0
    shown = capsys.readouterr().out
    assert "imaging_quality" in shown and "64.00%" in shown and "total" in shown


def test_parts_of_vbench_have_no_total(tmp_path: Path) -> None:
    path = tmp_path / "some_eval_results.json"
    path.write_text(json.dumps({"scene": [0.4, []], "subject_consistency": [0.9, []]}))
    result = vbench.read_result([path])
    assert "total" not in result and "quality" not in result and len(result["missing"]) == 14
    path.write_text("[]")
    with pytest.raises(vbench.VBenchError, match="not a result of VBench"):
        vbench.read_result([path])


def test_vbench_lists(tmp_path: Path) -> None:
    path = tmp_path / "VBench_full_info.json"
    entries = [{"prompt_en": "a", "dimension": ["scene"]},
               {"prompt_en": "b", "dimension": ["temporal_flickering", "scene"]}]  # fmt: skip
    path.write_text(json.dumps(entries))
    found = vbench.videos(path)
    assert len(found) == 5 + 25 and found[:2] == [("a", 0), ("a", 1)]
    for prompt in ("a/b", "x" * 260, ""):
        with pytest.raises(vbench.VBenchError, match="cannot be a file name"):
            vbench.file_name(prompt, 0)
    path.write_text('{"a": 1}')
    with pytest.raises(vbench.VBenchError, match="not a prompt list"):
        vbench.videos(path)


@pytest.mark.parametrize(
    ("name", "words"),
    [("coco_fid", ["--captions", "--features"]), ("vbench_prompts", ["render", "read"])],
)
def test_examples_read_the_command_line(
    name: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_example(name)
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        script.main()
    shown = capsys.readouterr().out
    assert f"python examples/{name}.py" in shown and all(word in shown for word in words)
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--no-such-option"])
    assert script.main() == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
