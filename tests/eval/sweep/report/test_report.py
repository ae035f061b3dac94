"""Reports: the method to pick, what the files say, and a page that works in a real browser."""

from __future__ import annotations

import csv
import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from diffpatch.eval import card
from diffpatch.eval.media import save_frames
from diffpatch.eval.medians import paired_interval
from diffpatch.eval.quality.distances import compare
from diffpatch.eval.sweep.report import plot as report_plot
from diffpatch.eval.sweep.report.card import sweep_card
from diffpatch.eval.sweep.report.files import describe, write_reports
from diffpatch.eval.sweep.report.rows import Row
from diffpatch.eval.sweep.report.summary import Summary, summarize
from diffpatch.eval.sweep.report.verdict import verdict
from diffpatch.eval.sweep.scores import FEATURES
from tests.eval.sweep.report.tiny_report import (
    HOSTILE,
    METHODS,
    PROMPTS,
    Reader,
    made,
    write,
)


def rows(summary: Summary, **changes: tuple[float, float]) -> list[Row]:
    """The methods with other (speedup, PSNR)."""
    found = []
    for row in summary.rows:
        gain, psnr = changes.get(row.label, (row.gain, row.quality.get("psnr", 0.0)))
        speedup = {"total": {"median": gain}} if row.kind == "method" else {}
        quality = {**row.quality, "psnr": psnr}
        found.append(Row(**{**vars(row), "speedup": speedup, "quality": quality}))
    return found


def test_the_pick_is_the_fastest_above_the_bar(summary: Summary) -> None:
    [found] = summary.verdicts
    assert found.pick == "linear" and "5.00× faster" in found.text and "PSNR ≥ 25 dB" in found.rule
    slower = verdict(rows(summary, linear=(1.5, 26.0)), {"psnr": 25})
    assert slower.pick == "radial"
    strict = verdict(rows(summary), {"psnr": 35})
    assert strict.pick is None and "closest to dense is radial" in strict.text
    slow = dict.fromkeys(METHODS, (0.9, 40.0))
    assert verdict(rows(summary, **slow), {}).text.startswith("Stay dense")
    for gain, pick in ((1.019, None), (1.021, "radial")):  # less than 1.02 is within the scatter
        scattered = verdict(rows(summary, **{**slow, "radial": (gain, 40.0)}), {})
        assert scattered.pick == pick and "at least 1.02×" in scattered.rule


def test_the_front_is_what_nothing_beats_in_both(summary: Summary) -> None:
    assert {row.label for row in summary.rows if row.best} == {"radial", "linear"}
    assert (len(summary.failures), summary.missing) == (1, 1)


def test_sets_of_clips_have_a_distance(folder: Path, summary: Summary) -> None:
    distances = {row.label: row.distances for row in summary.rows}
    assert distances["dense"] == {} and distances["radial"]["clips"] == 4
    sets = [
        torch.cat([
            torch.from_numpy(np.load(folder / "runs" / result["name"] / FEATURES))
            for result in summary.results
            if result["label"] == label
        ])
        for label in ("radial", "dense")
    ]  # fmt: skip
    assert distances["radial"] == {**compare(*sets), "clips": 4}


def test_the_csv_has_the_columns_of_a_paper(folder: Path) -> None:
    with (folder / "summary.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    wanted = (
        "model method parameters warmup_steps dense_layers kept seconds_total_median"
        " speedup_total_median speedup_denoising_median peak_gib psnr ssim lpips fd kd clips device"
        " torch diffusers diffpatch commit"
    )
    assert set(wanted.split()) <= set(lines[0])
    [line] = [line for line in lines if line["method"] == "linear"]
    assert (line["warmup_steps"], line["dense_layers"], line["psnr"]) == ("1", "0", "26.0")


def test_markdown_and_json_say_the_same(folder: Path) -> None:
    text = (folder / "summary.md").read_text(encoding="utf-8")
    assert text.startswith("# A & \\<b\\>B\\</b\\>\n")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count(" |") for line in table if "---" not in line}) == 1
    assert any(line.startswith("| linear | 25.0% | 4.00 s | 5.00× |") for line in table)
    data = json.loads((folder / "summary.json").read_text())
    assert [row["label"] for row in data["rows"]] == ["dense", *METHODS]


def test_a_row_is_the_middle_of_its_prompts_and_knows_the_worst(
    folder: Path, summary: Summary
) -> None:
    [row] = [row for row in summary.rows if row.label == "linear"]
    assert row.speedup["total"] == {"median": 5.0, "low": 4.375, "high": 5.75}
    assert row.seconds["total"]["median"] == 4.0 and row.dense_seconds["total"]["median"] == 20.0
    assert row.quality["psnr"] == pytest.approx(26.0) and row.least["psnr"] == 25.2
    assert row.middle["psnr"] == pytest.approx(26.0) and row.dense_steps == 1
    assert [each["gain"] for each in row.each] == [8.0, 5.0, 2.5, 5.0]
    text = (folder / "summary.md").read_text(encoding="utf-8")
    assert "(worst 25.2, median 26.0)" in text and "| worst PSNR |" in text
    paste = 'diffpatch.patch(pipe, "linear", kept=0.25, dense_steps=2)  # 5.0×, 26 dB here'
    assert summary.verdicts[0].line == paste and f"```python\n{paste}\n```" in text


def test_every_bar_must_be_cleared(summary: Summary) -> None:
    # All SSIM are PSNR / 40: 0.7 is cleared by radial on every prompt, by linear on none.
    assert verdict(summary.rows, {"psnr": 25, "ssim": 0.7}).pick == "radial"
    assert verdict(summary.rows, {"psnr": 25, "ssim": 0.6}).pick == "linear"
    assert verdict(summary.rows, {"psnr": 35, "ssim": 0.1}).pick is None
    assert "caption" in verdict(summary.rows, {"caption_accuracy": 0.9}).rule


def test_one_bad_prompt_is_not_hidden_by_the_mean(tmp_path: Path) -> None:
    found = [made("dense", "dense", prompt) for prompt in PROMPTS[:2]]
    for label, seconds, values in (("bold", 4.0, (43.4, 15.3)), ("shy", 10.0, (27.0, 26.0))):
        for prompt, psnr in zip(PROMPTS, values, strict=False):
            found.append(made("method", label, prompt, seconds, psnr))
    both = write(tmp_path / "both", found, {"psnr": 25.0}).verdicts[0]
    assert both.pick == "shy" and both.sure and "In the mean bold clears the bar too" in both.text
    bold = [result for result in found if result["label"] != "shy"]
    alone = write(tmp_path / "alone", bold, {"psnr": 25.0}).verdicts[0]
    assert alone.pick == "bold" and not alone.sure and "with care" in alone.text
    assert "Its worst prompt has PSNR 15.3, below the bar" in alone.text


def test_settings_are_judged_apart_and_labels_are_escaped(tmp_path: Path) -> None:
    cat = PROMPTS[0]
    found = [
        made("dense", "dense", cat), made("method", "quick", cat, 2.0, 40.0),
        # Slower and less close than the one above, but the best of a larger size.
        made("dense", "dense", cat, 90.0, setting="toy, 128×128"),
        made("method", HOSTILE, cat, 60.0, 30.0, setting="toy, 128×128", dense=90.0),
        made("method", "slow", cat, 80.0, 29.0, setting="toy, 128×128", dense=90.0),
    ]  # fmt: skip
    summary = write(tmp_path, found, {"psnr": 25.0})
    assert {row.label for row in summary.rows if row.best} == {"quick", HOSTILE}
    assert [verdict.pick for verdict in summary.verdicts] == ["quick", HOSTILE]
    write_reports(summary, tmp_path)
    reader = Reader()
    reader.feed((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert reader.open == [] and reader.tags.count("script") == 1 and "cat" not in reader.tags
    assert reader.text.count(HOSTILE) >= 4  # verdict, line to paste, table, map


def test_a_busy_machine_does_not_decide(tmp_path: Path) -> None:
    def judged(name: str, seconds: float, cpu: float, of_dense: float = 1.0) -> Summary:
        runs = [made("dense", "dense", PROMPTS[0], cpu=of_dense),
                made("method", "radial", PROMPTS[0], seconds, 30.0, cpu=cpu)]  # fmt: skip
        return write(tmp_path / name, runs, {"psnr": 25.0})

    quiet = judged("quiet", 10.0, 0.97).verdicts[0]
    assert quiet.sure and "busy" not in quiet.text and "busy" not in str(quiet.line)
    for name, loads in (("method", (0.23, 1.0)), ("dense", (1.0, 0.23))):
        busy = judged(name, 10.0, *loads)
        [found] = busy.verdicts
        assert "The machine was busy (23% CPU)" in found.text and not found.sure
        write_reports(busy, tmp_path / name)
        assert "23% CPU" in (tmp_path / name / "report.html").read_text(encoding="utf-8")
    assert "on a busy machine" in str(judged("method", 10.0, 0.23).verdicts[0].line)
    slower = judged("slower", 30.0, 0.3).verdicts[0]
    assert slower.text.startswith("No verdict") and "Stay dense" not in slower.text


def test_a_speedup_stands_beside_the_dense_time_it_is_of(tmp_path: Path) -> None:
    """After an interruption dense was timed again, and the dense row has the old time."""
    runs = [made("dense", "dense", PROMPTS[0], 5.14),
            made("method", "radial", PROMPTS[0], 3.86, 30.0, dense=3.2)]  # fmt: skip
    summary = write(tmp_path, runs, {})
    shown = describe(summary).splitlines()
    dense, radial = (line.split() for line in shown[2:4])
    assert "5.14" in dense and "0.83×" in radial and radial.count("3.20") == 1


def test_a_card_shows_the_pick_and_heads_the_page(folder: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    root = Path(shutil.copytree(folder, tmp_path / "copy"))
    summary = summarize(root)
    assert sweep_card(summary, root) == []  # without frames there is nothing to show
    for result in summary.results:
        frames = torch.rand(3, 3, 16, 24, generator=generator)
        save_frames(frames, root / "runs" / result["name"] / "frames.npz")
    files = write_reports(summary, root)
    assert {"card.png", "card.webp"} <= {path.name for path in files}
    with Image.open(root / "card.png") as still, Image.open(root / "card.webp") as moving:
        assert still.size == moving.size == (1200, 630)
        assert getattr(moving, "n_frames", 1) > 8
    page = (root / "report.html").read_text(encoding="utf-8")
    assert page.index('class="card"') < page.index('class="verdict"')
    write_reports(write(root, list(summary.results), {"psnr": 99.0}), root)
    assert not (root / "card.png").exists()  # of a verdict that holds no more


def test_marks_do_not_cover_each_other() -> None:
    places = [(300.0, 200.0)] * 5 + [(305.0, 203.0), (70.0, 25.0), (68.0, 24.0), (600.0, 300.0)]
    found = report_plot.apart(places)
    nearest = min(math.dist(a, b) for a, b in itertools.combinations(found, 2))
    assert nearest > 2 * report_plot.RADIUS - 1
    assert found[-1] == places[-1]  # what is alone stays
    assert all(0 < x < report_plot.WIDTH and 0 < y < report_plot.HEIGHT for x, y in found)


def test_differences_of_methods_have_paired_intervals(summary: Summary) -> None:
    rows = {row.label: row for row in summary.rows}
    best = max((r for r in summary.rows if r.kind == "method"), key=lambda r: r.quality["psnr"])
    assert best.label == "radial" and best.behind is None and rows["dense"].behind is None
    for label in ("window", "linear"):
        pairs = zip(METHODS[label][1], METHODS["radial"][1], strict=True)
        differences = [own - other for own, other in pairs]
        found = rows[label].behind
        assert found is not None
        assert found["mean"] == pytest.approx(sum(differences) / 4)
        assert (
            min(differences) <= found["low"] <= found["mean"] <= found["high"] <= max(differences)
        )
        assert found["low"] < found["high"]
    assert paired_interval([1.0] * 5) == {"mean": 1.0, "low": 1.0, "high": 1.0}


def test_an_interval_of_many_prompts_is_that_of_the_normal_distribution() -> None:
    random = np.random.default_rng(0)
    values = random.normal(0.5, 2.0, 400)
    found = paired_interval(values.tolist())
    error = 1.96 * values.std() / 400**0.5
    assert found["low"] == pytest.approx(values.mean() - error, abs=0.1 * error)
    assert found["high"] == pytest.approx(values.mean() + error, abs=0.1 * error)


def test_a_long_name_leaves_the_picture_and_the_other_name_alone(tmp_path: Path) -> None:
    """Both names stand on the clip, dense at its left edge; a long one is made to fit."""
    grey, white = torch.full((1, 3, 64, 64), 0.5), torch.ones(1, 3, 64, 64)
    said = ("line", "prompt", "machine")
    stills = []
    for label in ("a", "dynamic rest=drop rule=subblock at 25% dense_steps=2 dense_layers=0"):
        card.write_card(tmp_path, grey, white, card.CardText(label, 2.0, 27.0, 0.3, *said), None, 8)
        with Image.open(tmp_path / "card.png") as still:
            stills.append(torch.from_numpy(np.array(still.convert("L"))))
    left, top, width, height = card.STAGE
    clip = left + (width - height) // 2  # a square one, as wide as it is high
    for a, b in ((left, clip), (clip, clip + 85)):  # beside the clip, and where "dense" stands
        assert torch.equal(stills[0][top : top + height, a:b], stills[1][top : top + height, a:b])
    assert not torch.equal(*stills)


def test_a_prompt_of_several_lines_stands_on_one(tmp_path: Path) -> None:
    grey = torch.full((1, 3, 64, 64), 0.5)
    cards = []
    for prompt in ("a cat\nruns\n", "a cat runs"):
        said = card.CardText("a", 2.0, 27.0, 0.3, "line", prompt, "machine")
        card.write_card(tmp_path, grey, grey, said, None, 8)
        cards.append(np.array(Image.open(tmp_path / "card.png")))
    assert np.array_equal(cards[0], cards[1])


@pytest.mark.parametrize("speedup", [0.7, 1.0, 2.0, 12.3, 123.4])
def test_figures_end_before_the_card_does(tmp_path: Path, speedup: float) -> None:
    grey = torch.full((1, 3, 64, 64), 0.5)
    said = card.CardText("a", speedup, 100.0, 1.0, "line", "prompt", "machine")
    card.write_card(tmp_path, grey, grey, said, None, 8)
    with Image.open(tmp_path / "card.png") as still:
        margin = still.convert("RGB").crop((card.WIDTH - 30, 0, card.WIDTH, card.HEIGHT))
    assert margin.getcolors() == [(30 * card.HEIGHT, ImageColor.getrgb(card.PAPER))]
