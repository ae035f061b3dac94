"""Reports: the method to pick, what the files say, and a page that works in a real browser."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffpatch.eval.files import write_json
from diffpatch.eval.media import save_clip
from diffpatch.eval.quality.distances import compare
from diffpatch.eval.sweep.report import plot as report_plot
from diffpatch.eval.sweep.report.files import write_reports
from diffpatch.eval.sweep.report.summary import Row, Summary, summarize, verdict
from diffpatch.eval.sweep.scores import FEATURES

HOSTILE = '<script>alert("x")</script> & a "cat" | dog'
ENVIRONMENT = {
    "device": "a processor", "threads": 2, "commit": "abc",
    "versions": {"torch": "2.13", "diffusers": "0.42", "diffpatch": "0.1"},
}  # fmt: skip
METHODS = {"radial": (10.0, 30.0), "window": (5.0, 20.0), "linear": (4.0, 26.0)}  # seconds, PSNR


def made(kind: str, label: str, prompt: str, seconds: float, psnr: float | None) -> dict[str, Any]:
    """A run.json."""
    name = f"{label}-{abs(hash(prompt))}".replace(" ", "-")
    clock = {"total": seconds, "denoising": seconds, "step_median": seconds / 4, "peak_gib": None}
    result: dict[str, Any] = {
        "name": name, "kind": kind, "label": label, "setting": "toy, 64×64", "model": "toy",
        "pipeline": "Toy", "dtype": "float32", "offload": "none", "vae_tiling": False,
        "prompt": prompt, "seed": 0, "settings": {}, "parameters": {}, "options": {},
        "method": label if kind == "method" else None, "wanted": None, "seconds": clock,
        "shared": False, "kept": 0.25 if psnr else 1.0, "quality": {"caption_accuracy": 1.0},
        "environment": ENVIRONMENT,
    }  # fmt: skip
    if psnr is not None:
        dense = {"name": f"dense-{abs(hash(prompt))}"}
        result |= {"dense": dense, "speedup": {"total": 20 / seconds, "denoising": 20 / seconds}}
        result["quality"] |= {"psnr": psnr, "ssim": psnr / 40, "lpips": 0.1}
        layers = {f"transformer.{number}": 0.25 for number in range(30)}
        result["report"] = {"kept_per_layer": layers, "kept_per_step": [1, 0.25, 0.25, 0.25]}
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep of four prompts, with a clip a run; one more run has failed."""
    root = tmp_path_factory.mktemp("swept")
    (root / "failed").mkdir()
    generator = torch.Generator().manual_seed(0)
    names = []
    for prompt in ("a cat", HOSTILE, "a bird", "a tree"):
        found = [made("dense", "dense", prompt, 20.0, None)]
        found += [made("method", name, prompt, *values) for name, values in METHODS.items()]
        for result in found:
            run = root / "runs" / result["name"]
            run.mkdir(parents=True)
            write_json(run / "run.json", result)
            save_clip(torch.rand(8, 3, 32, 64, generator=generator), run, fps=8)
            np.save(run / FEATURES, torch.randn(1, 3, generator=generator).numpy())
            names.append(result["name"])
    failed = made("method", "disc", HOSTILE, 1.0, 1.0)
    failed |= {"error": "OutOfMemoryError: <b>much</b>", "traceback": "Traceback\n  <i>x</i>"}
    write_json(root / "failed" / f"{failed['name']}.json", failed)
    about = {"title": "A & <b>B</b>", "bar": {"psnr": 25.0}, "networks": {}}
    write_json(root / "sweep.json", about | {"runs": [*names, failed["name"], "missing"]})
    write_reports(summarize(root), root)
    return root


@pytest.fixture(scope="module")
def summary(folder: Path) -> Summary:
    return summarize(folder)


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


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


class _Reader(HTMLParser):
    """Collects addresses and text, and checks that tags match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href")]
        assert not [key for key, _ in attrs if key.startswith("on")]
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data


def test_the_page_needs_nothing_else_and_escapes_what_it_shows(page: str) -> None:
    reader = _Reader()
    reader.feed(page)
    assert reader.open == []
    assert reader.addresses and all(a.startswith("data:") for a in reader.addresses)
    assert len(reader.addresses) == 16 == reader.tags.count("figure")
    assert reader.tags.count("script") == 1 and "i" not in reader.tags
    assert HOSTILE in reader.text and "OutOfMemoryError: <b>much</b>" in reader.text
    assert "default-src 'none'" in page and "Pick linear" in reader.text
    assert not re.search(r"""(src|href)=["']?https?:|url\(|@import""", page)


def test_marks_do_not_cover_each_other() -> None:
    places = [(300.0, 200.0)] * 5 + [(305.0, 203.0), (70.0, 25.0), (68.0, 24.0), (600.0, 300.0)]
    found = report_plot.apart(places)
    nearest = min(math.dist(a, b) for a, b in itertools.combinations(found, 2))
    assert nearest > 2 * report_plot.RADIUS - 1
    assert found[-1] == places[-1]  # what is alone stays
    assert all(0 < x < report_plot.WIDTH and 0 < y < report_plot.HEIGHT for x, y in found)


NODE = shutil.which("node")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ACT = """<script>
addEventListener("load", () => setTimeout(async () => {
  const group = document.querySelector(".clips"), videos = [...group.querySelectorAll("video")];
  const slider = document.querySelector(".player input");
  slider.value = 0.5;
  slider.dispatchEvent(new Event("input"));
  await new Promise((done) => setTimeout(done, 1500));
  document.body.dataset.seen = JSON.stringify({
    players: document.querySelectorAll(".player button").length,
    errors: videos.filter((v) => v.error).length,
    times: videos.map((v) => v.currentTime), duration: videos.length ? videos[0].duration : 0,
    wide: document.documentElement.scrollWidth, window: innerWidth,
  });
}, 500));
</script></body>"""


@pytest.mark.skipif(NODE is None, reason="no node")
def test_the_script_parses() -> None:
    script = Path(report_plot.__file__).parent / "page.js"
    subprocess.run([str(NODE), "--check", str(script)], check=True, capture_output=True)


@pytest.mark.skipif(CHROMIUM is None, reason="no browser")
@pytest.mark.parametrize("width", [1300, 500])
def test_clips_move_together_in_a_browser(page: str, tmp_path: Path, width: int) -> None:
    path = tmp_path / "report.html"
    path.write_text(page.replace("</body>", ACT), encoding="utf-8")
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
        " --disable-background-networking --disable-component-update --virtual-time-budget=8000"
    )
    done = subprocess.run(
        [str(CHROMIUM), *options.split(), f"--user-data-dir={tmp_path / 'profile'}",
         f"--window-size={width},900", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found, done.stderr[-500:]
    seen = json.loads(found[1].replace("&quot;", '"'))
    assert seen["wide"] <= seen["window"], "the page scrolls sideways"
    assert seen["errors"] == 0 and seen["duration"] == pytest.approx(1.0, abs=0.1)
    assert seen["players"] == 4 and len(seen["times"]) == 4
    assert all(time == pytest.approx(0.5, abs=0.05) for time in seen["times"])
