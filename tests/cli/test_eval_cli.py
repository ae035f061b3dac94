"""`diffpatch eval`: folders against a folder, methods on a model, and every way to ask wrongly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffpatch.cli import main
from diffpatch.eval import media
from diffpatch.eval.quality import items
from diffpatch.eval.quality.metrics import psnr
from tests import tiny
from tests.eval import tiny_eval

CAPTIONS = [
    "a large red circle moves left over a striped navy background",
    "a small white ring grows over a black background",
    "a large cyan cross moves up over a pink background",
    "a small green square shrinks over a teal background",
]


def frames(seed: int, count: int = 9, height: int = 40, width: int = 44) -> torch.Tensor:
    """Smooth random frames (F, 3, H, W) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 3, 5, 5, generator=generator)
    size = (count, height, width)
    return torch.nn.functional.interpolate(coarse, size, mode="trilinear")[0].transpose(0, 1)


def write(folder: Path, suffix: str = ".apng", noise: float = 0.0) -> None:
    """Four clips, a little changed if asked for; folders of pictures for an empty suffix."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(7)
    for seed in range(4):
        clip = frames(seed)
        clip = (clip + noise * torch.randn(clip.shape, generator=generator)).clamp(0, 1)
        if suffix == ".npy":
            np.save(folder / f"clip{seed}.npy", clip.numpy())
        else:
            media.save(media.to_images(clip), folder / f"clip{seed}{suffix}", 8)


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The JSON of a command that works."""
    assert main(["eval", *words, "--json", "--quiet"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return json.loads(shown.out)


def rows(result: dict[str, Any]) -> dict[str, Any]:
    return {row["name"]: row for row in result["rows"]}


@pytest.mark.parametrize("suffix", [".apng", ".npy", "", ".webp", ".gif", ".mp4"])
def test_a_folder_against_itself_is_perfect(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "dense", suffix)
    result = run([str(tmp_path / "dense"), "--reference", str(tmp_path / "dense")], capsys)
    found = rows(result)
    assert list(found) == ["reference", "reference, halves", "dense"]
    scores, sets = found["dense"]["scores"], found["dense"]["sets"]["contrast"]
    assert scores["psnr"] == 100 and scores["ssim"] == pytest.approx(1, abs=1e-6)
    assert scores["relative_l1"] == 0 and scores["clip_i"] == pytest.approx(1, abs=1e-6)
    assert sets["fd"] == pytest.approx(0, abs=1e-6) and sets["small_sample"]
    assert all(floor["fd"] > 0 for floor in found["reference, halves"]["sets"].values())
    assert any("lossy" in note for note in result["notes"]) == (suffix in (".webp", ".gif", ".mp4"))


def test_scores_are_those_of_the_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "dense", ".npy")
    write(tmp_path / "quiet", ".npy", 0.02)
    write(tmp_path / "loud", ".npy", 0.2)
    folders = [str(tmp_path / name) for name in ("quiet", "loud")]
    again = ["--floor", str(tmp_path / "dense")]
    result = run([*folders, "--reference", str(tmp_path / "dense"), *again], capsys)
    found = rows(result)
    assert list(found) == ["reference", "floor", "quiet", "loud"]
    assert found["floor"]["role"] == "floor" and found["floor"]["scores"]["psnr"] == 100
    for maker, count in (("contrast", 4), ("frames", 36)):
        quiet, loud = found["quiet"]["sets"][maker], found["loud"]["sets"][maker]
        assert quiet["fd"] < loud["fd"] and quiet["count"] == count
    for name in ("quiet", "loud"):
        files = sorted((tmp_path / name).iterdir())
        expected = [psnr(torch.from_numpy(np.load(path)), frames(seed)).mean
                    for seed, path in enumerate(files)]  # fmt: skip
        entries = found[name]["items"]
        assert [entries[f"clip{seed}"]["psnr"] for seed in range(4)] == pytest.approx(expected)
        assert found[name]["scores"]["psnr"] == pytest.approx(sum(expected) / 4)
    assert "lpips" in result["missing"] and "no prompt" in result["missing"]["clip_score"]


def test_captions_come_from_a_file_or_from_beside_the_clip(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "dense")
    words = [str(tmp_path / "dense"), "--reference", str(tmp_path / "dense")]
    texts = {f"clip{seed}": text for seed, text in enumerate(CAPTIONS)}
    (tmp_path / "c.json").write_text(json.dumps(texts))
    (tmp_path / "c.txt").write_text("".join(f"{name}\t{text}\n" for name, text in texts.items()))
    expected = run([*words, "--captions", str(tmp_path / "c.json")], capsys)
    assert {"clip_score", "caption_accuracy"} <= set(rows(expected)["dense"]["scores"])
    lines = run([*words, "--captions", str(tmp_path / "c.txt")], capsys)
    assert rows(lines)["dense"] == rows(expected)["dense"]
    (tmp_path / "dense" / "render.json").write_text(json.dumps({"prompt": CAPTIONS[0]}))
    beside = rows(run(words, capsys))["dense"]["items"]["clip0"]
    assert beside == rows(expected)["dense"]["items"]["clip0"]


def test_two_renderings_are_matched_by_their_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("radial", "dense"):
        for number in range(2):
            folder = tmp_path / name / f"{number:03d}-a-cat"
            folder.mkdir(parents=True)
            media.save(media.to_images(frames(number)), folder / f"{name}.apng", 8)
            (folder / "render.json").write_text(json.dumps({"prompt": "a cat"}))
    result = run([str(tmp_path / "radial"), "--reference", str(tmp_path / "dense")], capsys)
    row = rows(result)["radial"]
    assert row["count"] == 2 and row["scores"]["psnr"] == 100


@pytest.mark.parametrize("count", [1, 2])
def test_what_render_wrote_is_evaluated_as_it_lies(
    count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One folder with dense in it, by the names of methods, and file by file."""
    out = tmp_path / "out"
    for number in range(count):
        folder = out / f"{number:03d}-a-cat" if count > 1 else out
        folder.mkdir(parents=True)
        for name, shift in (("dense", 0.0), ("radial", 0.02)):
            clip = (frames(number) + shift).clamp(0, 1)
            media.save(media.to_images(clip), folder / f"{name}.apng", 8)
            # What render makes of both, and what else it leaves.
            media.save(media.to_images(clip[:1]), folder / "radial_vs_dense.png", 8)
            media.save(media.to_images(clip), folder / "radial_vs_dense.apng", 8)
            media.save(media.to_images(clip[:1]), folder / "card.png", 8)
        (folder / "render.json").write_text(json.dumps({"prompt": "a cat"}))
    places = [str(out)], [str(out), "--reference", str(out)]
    for words in (*places, [str(out / "radial"), "--reference", str(out / "dense")]):
        row = rows(run(list(words), capsys))["radial"]
        assert row["count"] == count and 20 < row["scores"]["psnr"] < 60
    if count == 1:
        files = [str(out / "radial.apng"), "--reference", str(out / "dense.apng")]
        assert rows(run(files, capsys))["radial.apng"]["scores"] == row["scores"]
        (out / "dense.apng").unlink()
        assert main(["eval", str(out)]) == 2
        assert "diffpatch eval OUT --reference DENSE" in capsys.readouterr().err


def test_what_has_no_partner_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "dense")
    write(tmp_path / "out")
    (tmp_path / "out" / "clip1.apng").unlink()
    words = ["eval", str(tmp_path / "out"), "--reference", str(tmp_path / "dense"), "--quiet"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "out: 3 of the 4 files" in shown
    assert "* fewer than two rows per feature" in shown and "no lpips: no weights" in shown


def test_pictures_are_sets_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dense").mkdir()
    for number in range(5):  # as image sets are numbered: pictures, not the frames of one clip
        media.save(media.to_images(frames(number, 1)), tmp_path / "dense" / f"{number:04d}.png", 1)
    tiny_eval.save_dinov2(tmp_path / "dinov2")
    words = [str(tmp_path / "dense"), "--reference", str(tmp_path / "dense")]
    result = run([*words, "--features", str(tmp_path / "dinov2")], capsys)
    row = rows(result)["dense"]
    [sets] = row["sets"].values()
    assert row["count"] == sets["count"] == 5 and sets["features"] == 32
    assert "single frame" in result["missing"]["flicker"] and "notes" in result
    assert result["tools"]["features"] == str(tmp_path / "dinov2")


def test_methods_on_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.wan().pipe.save_pretrained(tmp_path / "wan")
    tiny_eval.save_clip(tmp_path / "clip")
    tiny_eval.save_lpips(tmp_path / "lpips.safetensors")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\na fox\n")
    capsys.readouterr()  # loading bars
    words = ["eval", "-m", str(tmp_path / "wan"), "--prompt-file", str(prompts), "--count", "2"]
    words += ["--method", "radial", "--method", "window", "--dense-steps", "0"]
    words += ["--height", "32", "--width", "32", "--num-frames", "17", "--steps", "2"]
    words += ["--clip", str(tmp_path / "clip"), "--lpips", str(tmp_path / "lpips.safetensors")]
    assert main([*words, "--dense-layers", "0", "--quiet", "--json", str(tmp_path / "s.json")]) == 0
    table = capsys.readouterr().out
    result = json.loads((tmp_path / "s.json").read_text())
    found = rows(result)
    names = ["dense", "dense, other arithmetic", "dense, other noise", "radial", "window"]
    assert list(found) == names and all(name in table for name in names)
    assert result["prompts"] == ["a cat", "a dog"] and result["kind"] == "model"
    numeric, noise = found[names[1]], found[names[2]]
    assert 60 < numeric["scores"]["psnr"] <= 100
    for name in ("radial", "window"):
        scores = found[name]["scores"]
        assert found[name]["kept"] < 1 and found[name]["count"] == 2
        assert noise["scores"]["psnr"] < scores["psnr"] < numeric["scores"]["psnr"]
        assert scores["lpips"] > numeric["scores"]["lpips"] >= 0
        assert {"clip_score", "clip_i", "temporal_consistency", "flicker"} <= set(scores)
    assert "psnr" not in found["dense"]["scores"] and "clip_score" in found["dense"]["scores"]
    assert "caption_accuracy" in result["missing"] and "lpips" not in result["missing"]
    assert all(part in table for part in ("PSNR", "LPIPS", "kept", "FD", "*"))


def test_the_demo_draws_its_own_captions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--height", "64", "--width", "64", "--num-frames", "9", "--steps", "2"]
    result = run(["--model", "demo", "--method", "window", "--count", "1", *small], capsys)
    assert result["prompts"][0].startswith("a ")
    assert "caption_accuracy" in rows(result)["window"]["scores"]
    assert set(result["missing"]) == {"lpips", "ms_ssim"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["OUT"], "--reference DENSE"),
        (["no/such"], "there is no file or folder no/such"),
        (["--reference", "OUT"], "--reference DENSE"),
        (["OUT", "--reference", "no/such"], "there is no folder no/such"),
        (["no/such", "--reference", "OUT"], "there is no file or folder no/such"),
        (["OUT", "--reference", "EMPTY"], "holds nothing to evaluate"),
        (["OUT", "--reference", "OTHER"], "no names fit: 'clip0' against 'else'"),
        (["OUT", "--reference", "TALL"], "has frames"),
        (["BROKEN", "--reference", "OUT"], "cannot be read"),
        (["TWICE", "--reference", "OUT"], "holds 'clip0' in two formats"),
        (["OUT", "--reference", "OUT", "--method", "radial"], "--method renders"),
        (["OUT", "--reference", "OUT", "--captions", "CAPTIONS"], "a name, a tab and a prompt"),
        (["OUT", "--reference", "OUT", "--features", "judgee"], "did you mean 'judge'"),
        (["OUT", "--reference", "OUT", "--lpips", "OUT"], "is not a safetensors file"),
        (["OUT", "--reference", "OUT", "--clip", "OUT"], "cannot be loaded as CLIPModel"),
        (["--floor", "OUT"], "--floor is for folders"),
        (["--captions", "CAPTIONS"], "--captions is for folders"),
        (["OUT", "--reference", "OUT", "--json", "CAPTIONS/s.json"], "choose another --json"),
        (["--method", "radial", "--set", "decayy=1"], "no such parameter"),
        (["-m", "demo", "--count", "0"], "at least 1"),
        (["OUT", "--reference", "OUT", "--metric", "psnr"], "did you mean '--method'"),
        (["--json", "OUT", "--reference", "OUT"], "is a folder; give a file"),
        (["--method", "radail"], "did you mean 'radial'"),
        (["-p", "a cat", "--count", "3"], "more than the 1 prompts"),
        (["--model", "no/such/folder/"], "a folder, or a hub id"),
    ],
)
def test_bad_requests_are_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "OUT")
    for name in ("EMPTY", "OTHER", "TALL", "BROKEN", "TWICE"):
        (tmp_path / name).mkdir()
    media.save(media.to_images(frames(0)), tmp_path / "OTHER" / "else.apng", 8)
    media.save(media.to_images(frames(0, height=48)), tmp_path / "TALL" / "clip0.apng", 8)
    media.save(media.to_images(frames(0)), tmp_path / "TWICE" / "clip0.apng", 8)
    media.save(media.to_images(frames(0)), tmp_path / "TWICE" / "clip1.apng", 8)
    for name in ("clip0.npy", "clip1.npy"):
        np.save(tmp_path / "TWICE" / name, frames(0).numpy())
    (tmp_path / "BROKEN" / "clip0.png").write_text("no picture")
    (tmp_path / "CAPTIONS").write_text("clip0 a red circle\n")
    places = [str(tmp_path / w) if w.partition("/")[0].isupper() else w for w in words]
    assert main(["eval", *places, "--quiet"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.splitlines()) == 1
    assert message in shown.err
    assert (tmp_path / "OUT" / "clip0.apng").is_file()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((2, 8, 9, 4), np.uint8), r"shape \(2, 8, 9, 4\)"),
        (np.zeros((8, 9), np.uint8), "wanted are frames"),
        (np.zeros((8, 9, 3), np.int64), "holds int64"),
        (np.array([{}], dtype=object), "cannot be read"),
    ],
)
def test_arrays_that_are_no_frames_are_refused(values: Any, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", values, allow_pickle=True)
    with pytest.raises(items.ItemError, match=message):
        items.read_frames(tmp_path / "a.npy")


@pytest.mark.parametrize("suffix", [".apng", ".gif", ".webp"])
def test_still_moments_keep_their_frames(suffix: str, tmp_path: Path) -> None:
    clip = frames(0)[[0, 3, 3, 3, 6, 8, 8]]
    media.save(media.to_images(clip), tmp_path / f"clip{suffix}", 8)
    found = items.read_frames(tmp_path / f"clip{suffix}")
    assert len(found) == 7 and torch.equal(found[1], found[3]) and torch.equal(found[5], found[6])


def test_arrays_in_either_order_of_axes(tmp_path: Path) -> None:
    clip = frames(0)
    pixels = (clip * 255).round().to(torch.uint8)
    np.save(tmp_path / "a.npy", pixels.permute(0, 2, 3, 1).numpy())
    np.save(tmp_path / "b.npy", pixels.numpy())
    np.save(tmp_path / "c.npy", clip[0].numpy())
    assert torch.equal(items.read_frames(tmp_path / "a.npy"), pixels / 255)
    assert torch.equal(items.read_frames(tmp_path / "b.npy"), pixels / 255)
    assert torch.equal(items.read_frames(tmp_path / "c.npy"), clip[:1])


def test_a_frame_without_a_duration_counts_once(tmp_path: Path) -> None:
    """Of an animation where others have one: there is no shortest to measure by."""
    images = media.to_images(frames(0)[[0, 3, 6]])
    images[0].save(
        tmp_path / "a.png", save_all=True, append_images=images[1:], duration=[0, 80, 160]
    )
    assert len(items.read_frames(tmp_path / "a.png")) == 3
