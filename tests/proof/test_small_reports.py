"""What reports, files of a sweep and pictures are made of, from runs that all differ."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageSequence

from diffpatch.eval.media import CLIP_SIDES, resized, save_animation
from diffpatch.eval.medians import paired_interval
from diffpatch.eval.quality.distances import FeatureSet, compare, kernel, squared_mmd
from diffpatch.eval.sweep.plan import plan_sweep
from diffpatch.eval.sweep.report.rows import METRICS, behind, row
from diffpatch.eval.sweep.report.table import cells, columns
from diffpatch.eval.sweep.spec import check_spec
from diffpatch.eval.sweep.store import Store
from tests.eval.sweep.report.tiny_report import PROMPTS, made, write


def run(label: str = "m", prompt: int = 0, psnr: float = 30.0, **changes: Any) -> dict[str, Any]:
    seconds = changes.pop("seconds", 10.0)
    return made("method", label, PROMPTS[prompt], seconds, psnr) | changes


def test_a_row_is_made_of_all_its_runs() -> None:
    runs = [run(prompt=0, psnr=20.0), run(prompt=0, psnr=30.0), run(prompt=1, psnr=34.0)]
    runs[1]["shared"] = True
    for result, peak in zip(runs, (3.0, 5.0, 4.0), strict=True):
        result["seconds"] = result["seconds"] | {"peak_gib": peak}
        result["report"]["kept_per_layer"] = {"t.0": 1.0, "t.1": 0.5, "t.2": 1.0}
    for result, dense in zip(runs, (3, 1, 2), strict=True):  # a dense step later on is no first one
        result["report"]["kept_per_step"] = [*[1.0] * dense, 0.5, 1.0]
    found = row(runs, {})
    assert found.dense_steps == 1
    assert found.shared and found.peak_gib == 5.0 and found.dense_layers == 2
    assert found.by_prompt == {PROMPTS[0]: 25.0, PROMPTS[1]: 34.0}
    assert found.least["psnr"] == 20.0 and found.counts["psnr"] == 3
    assert not row(runs[:1], {}).shared


def test_cells_are_what_their_headings_say() -> None:
    runs = [run(prompt=0, psnr=20.0, seconds=8.0), run(prompt=1, psnr=34.0, seconds=5.0)]
    del runs[1]["quality"]["lpips"]
    runs[1] |= {"wanted": 0.3}
    runs[0] |= {"wanted": 0.3, "attention_error": {
        "mean": 0.1, "per_branch": {"0": 0.25, "1": 0.5}, "difference": 0.75, "slope": 0.875,
        "per_layer": {},
    }}  # fmt: skip
    runs[1]["seconds"] = runs[1]["seconds"] | {"peak_gib": 2.5}
    one = dataclasses.replace(
        row(runs, {"kd": 0.0025}), behind={"mean": -1.0, "low": -2.5, "high": 0.5}
    )
    headings = columns([one])
    assert dict(zip(headings, cells(one, headings), strict=True)) == {
        "method": "m", "wanted": "30%", "kept": "25.0%", "time": "6.50 s", "speedup": "3.25×",
        "denoising": "3.25×", "dense beside": "20.00 s", "GiB": "2.50", "attention error": "10.0%",
        "by branch": "25.0% / 50.0%", "between branches": "75.0%", "slope": "0.88",
        "PSNR": "27.0", "dB to the best": "-1.0 (-2.5 to +0.5)", "worst PSNR": "20.0",
        "SSIM": "0.675", "LPIPS": "0.100 (1 of 2)", METRICS["caption_accuracy"].heading: "100%",
        "KD ×1000": "2.50", "runs": "2",
    }  # fmt: skip
    plain = row([made("dense", "dense", PROMPTS[0])], {})
    headings = columns([plain])
    assert dict(zip(headings, cells(plain, headings), strict=True)) == {
        "method": "dense", "kept": "100.0%", "time": "20.00 s", "speedup": "", "denoising": "",
        "dense beside": "", METRICS["caption_accuracy"].heading: "100%", "runs": "1",
    }  # fmt: skip


def test_behind_is_below_zero_for_the_worse() -> None:
    rows = [
        row([run(label, n, psnr - n) for n in range(4)], {})
        for label, psnr in (("best", 33.0), ("worse", 31.0))
    ]
    told = behind(rows[1], rows)
    assert told is not None and told["mean"] == pytest.approx(-2.0) and told["high"] < 0
    assert behind(rows[0], rows) is None
    few = [dataclasses.replace(one, by_prompt=dict(list(one.by_prompt.items())[:3]))
           for one in rows]  # fmt: skip
    assert behind(few[1], few) is None


def test_only_what_is_faster_than_dense_is_best_or_picked(tmp_path: Path) -> None:
    dense = made("dense", "dense", PROMPTS[0])
    found = [dense, run("slow", psnr=45.0, seconds=30.0), run("quick", psnr=26.0)]
    summary = write(tmp_path / "a", found, {"psnr": 25.0})
    assert {one.label for one in summary.rows if one.best} == {"quick"}
    assert summary.verdicts[0].pick == "quick"
    summary = write(tmp_path / "b", found[:2], {"psnr": 25.0})
    assert summary.verdicts[0].pick is None and summary.verdicts[0].text.startswith("Stay dense")
    level = run("level", psnr=50.0, seconds=20.0)  # as fast as dense
    summary = write(tmp_path / "d", [dense, level, found[2]], {"psnr": 25.0})
    assert {one.label for one in summary.rows if one.best} == {"quick"}
    # Of two that are as fast, the closer; where none is good enough, the closest is named.
    found = [dense, run("near", psnr=20.0), run("far", psnr=18.0), run("bold", psnr=9.0, seconds=2)]
    summary = write(tmp_path / "c", found, {"psnr": 25.0})
    assert {one.label for one in summary.rows if one.best} == {"near", "bold"}
    assert "The closest to dense is near" in summary.verdicts[0].text
    assert summary.missing == 0


def test_a_finished_run_has_not_failed_and_others_are_counted(tmp_path: Path) -> None:
    spec = check_spec({"model": "demo", "prompts": ["a"], "methods": ["window"]}, tmp_path)
    one = next(iter(plan_sweep(spec).values()))[0]
    store = Store(tmp_path / "runs")
    store.fail(one, RuntimeError("once"), {})
    assert store.failure(one) and not store.is_pending(one) and store.others() == 0
    with store.stage(one) as stage:
        store.finish(one, {"name": one.name}, stage)
    assert store.failure(one) is None and store.is_done(one)
    child = os.fork()
    if child == 0:  # the second process, whose own place is not the first
        code = 1
        try:
            code = 10 + Store(tmp_path / "runs").others()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 11
    assert store.others() == 0
    store.close()


def test_an_interval_holds_95_percent() -> None:
    random = torch.Generator().manual_seed(0)
    values = torch.randn(400, generator=random, dtype=torch.float64)
    found = paired_interval(values.tolist())
    width = 2 * 1.96 * float(values.std()) / 20
    assert found["high"] - found["low"] == pytest.approx(width, rel=0.06)


def test_distances_of_sets_that_differ_in_size() -> None:
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 3, generator=random), torch.randn(9, 3, generator=random) + 1

    def similarity(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.double() @ b.double() / 3 + 1) ** 3)

    inside = [
        sum(similarity(a, b) for a in s for b in s if a is not b and not torch.equal(a, b))
        / (len(s) * (len(s) - 1))
        for s in (x, y)
    ]
    between = sum(similarity(a, b) for a in x for b in y) / 45
    assert squared_mmd(x, y) == pytest.approx(sum(inside) - 2 * between, rel=1e-9)
    assert kernel(x, y, seed=1) != kernel(x, y, seed=2) == kernel(x, y, seed=2)
    assert compare(x, y, seed=1)["kd"] == kernel(x, y, seed=1)[0] != compare(x, y, seed=2)["kd"]
    assert compare(x, y)["small_sample"] and not compare(x[:, :2], y[:, :2])["small_sample"]
    rows = {"b": x[:1], "a": x[1:3]}
    assert torch.equal(FeatureSet(rows).stacked(), torch.cat([x[1:3], x[:1]]))


def test_an_animation_lasts_as_long_as_its_frames(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (8, 8), (n * 80, 0, 0)) for n in range(3)]
    save_animation(pictures, tmp_path / "x.gif", fps=8)
    with Image.open(tmp_path / "x.gif") as read:
        assert read.info["duration"] in (120, 125, 130) and read.info["loop"] == 0
        assert len(list(ImageSequence.Iterator(read))) == 3


def test_clips_of_a_page_fit_into_its_sides() -> None:
    smallest, largest = CLIP_SIDES
    wide = resized(torch.rand(1, 3, 240, 1920))
    assert tuple(wide.shape[-2:]) == (240 * largest // 1920, largest)
    small = torch.rand(1, 3, 100, 150)
    grown = resized(small)
    assert tuple(grown.shape[-2:]) == (300, 450) and torch.equal(grown[..., ::3, ::3], small)
    assert min(grown.shape[-2:]) >= smallest
