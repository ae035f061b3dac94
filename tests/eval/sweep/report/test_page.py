"""The report's page: it needs nothing else, and is used with a mouse."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffpatch.eval.media import save_clip
from diffpatch.eval.sweep.pictures import DIFFERENCE, PATTERN
from diffpatch.eval.sweep.report import plot as report_plot
from diffpatch.eval.sweep.report.files import write_reports
from diffpatch.eval.sweep.report.summary import summarize
from tests.eval.sweep.report.tiny_report import (
    HOSTILE,
    Reader,
)


def test_the_page_needs_nothing_else_and_escapes_what_it_shows(page: str) -> None:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert reader.addresses and all(a.startswith("data:") for a in reader.addresses)
    assert reader.tags.count("figure") == reader.tags.count("video") == 16
    assert len(reader.addresses) == 16 + 3  # a map a method
    assert reader.tags.count("script") == 1 and "i" not in reader.tags
    assert HOSTILE in reader.text and "OutOfMemoryError: <b>much</b>" in reader.text
    assert "default-src 'none'" in page and "Pick linear" in reader.text
    assert not re.search(r"""(src|href)=["']?https?:|url\(|@import""", page)


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
        capture_output=True, text=True, timeout=280,
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
