"""Reports: the method to pick, what the files say, and a page that works in a real browser."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffpatch.eval.files import write_json
from diffpatch.eval.media import save_clip, save_frames
from diffpatch.eval.medians import paired_interval
from diffpatch.eval.quality.distances import compare
from diffpatch.eval.sweep.pictures import DIFFERENCE, PATTERN
from diffpatch.eval.sweep.report import plot as report_plot
from diffpatch.eval.sweep.report.card import sweep_card
from diffpatch.eval.sweep.report.files import describe, write_reports
from diffpatch.eval.sweep.report.rows import Row
from diffpatch.eval.sweep.report.summary import Summary, summarize
from diffpatch.eval.sweep.report.verdict import verdict
from diffpatch.eval.sweep.scores import FEATURES

HOSTILE = '<script>alert("x")</script> & a "cat" | dog'
ENVIRONMENT = {
    "device": "a processor", "threads": 2, "commit": "abc",
    "versions": {"torch": "2.13", "diffusers": "0.42", "diffpatch": "0.1"},
}  # fmt: skip
PROMPTS = ("a cat", HOSTILE, "a bird", "a tree")
DENSE = 20.0  # seconds, as timed beside every run
# Seconds, PSNR, dense first steps by prompt: first, median, mean and least are all different.
METHODS: dict[str, tuple[tuple[float, ...], tuple[float, ...], tuple[int, ...]]] = {
    "radial": ((8.0, 10.0, 12.5, 10.0), (29.0, 31.0, 28.0, 32.0), (2, 1, 2, 2)),
    "window": ((4.0, 5.0, 6.25, 5.0), (21.0, 19.0, 18.0, 22.0), (2, 1, 2, 2)),
    "linear": ((2.5, 4.0, 8.0, 4.0), (25.5, 26.5, 25.2, 26.8), (2, 1, 3, 2)),
}


def clock(seconds: float, cpu: float = 1.0) -> dict[str, Any]:
    """The times of a run."""
    return {
        "total": seconds, "denoising": seconds, "step_median": seconds / 4, "peak_gib": None,
        "load": {"cpu": cpu},
    }  # fmt: skip


def made(
    kind: str, label: str, prompt: str, seconds: float = DENSE, psnr: float | None = None,
    steps: int = 1, setting: str = "toy, 64×64", dense: float = DENSE, cpu: float = 1.0,
) -> dict[str, Any]:  # fmt: skip
    """A run.json."""
    number = PROMPTS.index(prompt)
    result: dict[str, Any] = {
        "name": f"{len(setting)}-{kind}-{label[:8]}-{number}".replace("/", "-"), "kind": kind,
        "label": label, "setting": setting, "model": "toy",
        "pipeline": "Toy", "dtype": "float32", "offload": "none", "vae_tiling": False,
        "prompt": prompt, "seed": 0, "settings": {}, "parameters": {}, "options": {},
        "method": label if kind == "method" else None, "wanted": None,
        "seconds": clock(seconds, cpu), "clip": {"frames": 8, "fps": 8.0},
        "shared": False, "kept": 0.25 if psnr else 1.0, "quality": {"caption_accuracy": 1.0},
        "environment": ENVIRONMENT,
    }  # fmt: skip
    if psnr is not None:
        beside = {"name": f"{len(setting)}-dense-dense-{number}", "seconds": clock(dense)}
        gains = {"total": dense / seconds, "denoising": dense / seconds}
        result |= {"dense": beside, "speedup": gains, "patch": {"kept": 0.25, "dense_steps": 2}}
        result["quality"] |= {"psnr": psnr, "ssim": psnr / 40, "lpips": 0.1}
        layers = {f"transformer.{number}": 0.25 for number in range(30)}
        by_step = [1.0] * steps + [0.25] * (4 - steps)
        result["report"] = {
            "kept_per_layer": layers, "kept_per_step": by_step,
            "kept_map": [[kept] * 30 for kept in by_step],
        }  # fmt: skip
    return result


def write(root: Path, found: list[dict[str, Any]], bar: dict[str, float]) -> Summary:
    """A folder of a sweep from its results, and what it comes to."""
    for result in found:
        (root / "runs" / result["name"]).mkdir(parents=True, exist_ok=True)
        write_json(root / "runs" / result["name"] / "run.json", result)
    about = {"title": "A & <b>B</b>", "bar": bar, "networks": {}}
    write_json(root / "sweep.json", about | {"runs": [result["name"] for result in found]})
    return summarize(root)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep of four prompts, with a clip a run; one more run has failed."""
    root = tmp_path_factory.mktemp("swept")
    (root / "failed").mkdir()
    generator = torch.Generator().manual_seed(0)
    names = []
    for number, prompt in enumerate(PROMPTS):
        found = [made("dense", "dense", prompt)]
        for name, (seconds, psnr, steps) in METHODS.items():
            values = seconds[number], psnr[number], steps[number]
            found.append(made("method", name, prompt, *values))
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
    reader = _Reader()
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
    assert reader.tags.count("figure") == reader.tags.count("video") == 16
    assert len(reader.addresses) == 16 + 3  # a map a method
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


@pytest.fixture(scope="module")
def full(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of that sweep with patterns and differences."""
    root = Path(shutil.copytree(folder, tmp_path_factory.mktemp("full") / "swept"))
    generator = torch.Generator().manual_seed(2)
    summary = summarize(root)
    for result in summary.results:
        run = root / "runs" / result["name"]
        if result["kind"] == "method":
            save_clip(torch.rand(8, 3, 32, 64, generator=generator), run, 8, DIFFERENCE)
            Image.new("RGB", (76, 76), "teal").save(run / PATTERN)
    write_reports(summary, root)
    return root / "report.html"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (390, "dark")])
def test_the_page_is_used_with_a_mouse(full: Path, width: int, scheme: Any) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--no-first-run"]  # fmt: skip
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=CHROMIUM, args=flags)
        view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        view.set_default_timeout(20_000)
        wrong: list[str] = []
        view.on("pageerror", lambda error: wrong.append(str(error)))
        view.goto(full.as_uri())
        _sort(view)
        _copy(view)
        _watch(view)
        _wipe(view)
        across = view.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        browser.close()
    assert across[0] <= across[1], "the page scrolls sideways"
    assert wrong == []


def _until(view: Any, true: Callable[[], bool]) -> None:
    """Wait for something on the page, whose policy keeps Playwright's own waiting out."""
    for _ in range(200):
        if true():
            return
        view.wait_for_timeout(100)
    raise AssertionError("it did not happen in 20 seconds")


def _sort(view: Any) -> None:
    """Headings sort; the names stay in sight while the numbers scroll."""
    first = view.locator("table.results tbody tr").first
    heading = view.locator("thead th").filter(has_text=re.compile(r"^\s*PSNR"))
    heading.locator("button").click()
    assert first.locator("th").inner_text().startswith("1") and "radial" in first.inner_text()
    heading.locator("button").click()
    assert "window" in first.inner_text()  # and dense, which has none, is last
    assert "dense" in view.locator("table.results tbody tr").last.inner_text()
    box, name = view.locator(".scroll").first, first.locator("th")
    box.evaluate("box => { box.scrollLeft = 200; }")
    assert abs(name.bounding_box()["x"] - box.bounding_box()["x"]) <= 2


def _copy(view: Any) -> None:
    assert view.locator(".verdict code").inner_text().startswith("diffpatch.patch(pipe, ")
    view.locator(".copy").click()
    _until(view, lambda: view.locator(".copy").inner_text() == "Copied")


def _watch(view: Any) -> None:
    """Clips start in the middle, play slowly in step with their differences, and enlarge."""
    group = view.locator(".clips").first
    ready = "g => [...g.querySelectorAll('video')].every(video => video.duration)"
    _until(view, lambda: bool(group.evaluate(ready)))
    counter, player = view.locator(".player output").first, view.locator(".player").first
    assert counter.inner_text() == "frame 5 of 8"
    assert group.locator("video").count() == 4 + 3
    player.locator("select").select_option("0.25")
    assert group.evaluate("g => g.querySelector('.difference').playbackRate") == 0.25
    player.locator("button").click()
    _until(view, lambda: counter.inner_text() != "frame 5 of 8")
    player.locator("button").click()
    assert player.locator("button").inner_text() == "Play all"
    figure = group.locator("figure").nth(1)
    before = figure.bounding_box()["width"]
    figure.locator(".clip").click()
    assert figure.bounding_box()["width"] > before
    figure.locator(".clip").click()


def _wipe(view: Any) -> None:
    """The line follows the mouse; the pick is chosen, and another method can be."""
    stage, box = view.locator(".wipe canvas").first, view.locator(".wipe").first
    chosen = box.locator("select")
    assert chosen.evaluate("s => s.selectedOptions[0].textContent") == "linear"
    stage.scroll_into_view_if_needed()
    place = stage.bounding_box()
    stage.click(position={"x": place["width"] * 0.25, "y": place["height"] / 2})
    assert float(box.locator("input").input_value()) == pytest.approx(0.25, abs=0.02)

    def seen() -> list[int]:
        pixels = "c => [...c.getContext('2d').getImageData(c.width - 8, 8, 4, 4).data]"
        return list(stage.evaluate(pixels))

    _until(view, lambda: sum(seen()) > 0)
    linear = seen()
    chosen.select_option("0")
    _until(view, lambda: seen() != linear)


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
