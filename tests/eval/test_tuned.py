"""What people see of tuned settings: the table, the page, the picture; hostile texts in them."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from diffpatch import BadParameter, Settings
from diffpatch.eval.tuned.page import error_at, heat_maps, page
from diffpatch.eval.tuned.plot import Labelled, front_svg, picture
from diffpatch.eval.tuned.table import STEP, answer, describe, gains, summary_of
from diffpatch.targets.curves import Point
from diffpatch.targets.settings import Checked
from tests.targets.test_choice import error_of
from tests.targets.test_choice import settings as curves
from tests.targets.test_front import runs


def made(**changes: Any) -> Settings:
    return curves().model_copy(update={"front": runs(), **changes})


def fresh(prompt: str, psnr: float, predicted: float | None = 31.0) -> Checked:
    return Checked(
        prompt=prompt, target="28 dB", predicted=predicted, psnr=psnr, predicted_speedup=2.0,
        seconds=5.0, dense_seconds=11.0,
    )  # fmt: skip


def test_the_table_marks_the_front_and_the_choice() -> None:
    settings = made()
    found = answer(settings, "27 dB")
    assert found.point is not None and found.point.low >= 27
    told = describe(settings, found)
    chosen = [line for line in told.splitlines() if "chosen" in line]
    assert len(chosen) == 1 and found.point.applied.label in chosen[0]
    cache = next(line for line in told.splitlines() if line.lstrip().startswith("cache 0.2"))
    assert "front" not in cache, "attention with a cache is faster and better"
    assert "2 prompts" in told and "target 27 dB" in told
    assert "next      2 dB less would gain nothing" in told
    finer = answer(settings, "30 dB")
    assert finer.point is not None
    (line,) = [x for x in describe(settings, finer).splitlines() if x.startswith("next")]
    gain, lost = map(float, re.findall(r"([0-9.]+)(?:×| dB)", line))
    assert gain > 1 / finer.point.time and 0 < lost <= STEP and "attention" in line


def test_one_prompt_is_one() -> None:
    told = describe(made(front=runs(only=0.0)))
    assert "tuned on 1 prompt," in told and "over 1 prompt: others are taken" in told


def test_gains_compare_at_equal_quality() -> None:
    settings = made(front=runs(only=0.0))
    by_level = {level: (alone, best) for level, alone, best in gains(settings)}
    alone, best = by_level[30]
    assert alone == pytest.approx(1 / (0.45 + 3 / 8 * 0.15)) and best == pytest.approx(1 / 0.4)
    assert by_level[36][0] is None and by_level[36][1] == pytest.approx(1 / 0.8)


def test_what_cannot_be_reached_is_answered_and_what_is_no_target_refused() -> None:
    found = answer(made(), "60 dB")
    assert found.chosen is None and "the best that is faster than dense" in found.refused
    assert found.refused in describe(made(), found)
    with pytest.raises(BadParameter):
        answer(made(), "soon")


def test_checks_are_counted() -> None:
    told = summary_of([fresh("a", 31.4), fresh("b", 27.1), fresh("c", 26.0)])
    assert told == "within ±1.5 dB of the prediction: 1 of 3; target reached within 1 dB: 2 of 3"
    assert summary_of([fresh("a", 82.0, predicted=49.0)]).startswith(
        "within ±1.5 dB of the prediction: 1"
    )
    assert summary_of([fresh("a", 30.0, predicted=None)]).startswith("target reached")


def box_of(mark: Labelled) -> tuple[float, float, float]:
    """Where a label begins and ends, and its line."""
    wide = 6.2 * len(mark.label)
    left = mark.at[0] - (wide if mark.anchor == "end" else 0.0)
    return left, left + wide, mark.at[1]


def test_the_picture_is_well_formed_and_shows_everything() -> None:
    settings = made(checked=[fresh("a", 31.4)])
    found = answer(settings, "28 dB")
    drawn = picture(settings, found)
    assert [series.name for series in drawn.series] == [
        "caches alone",
        "attention alone",
        "attention and steps",
    ]
    assert drawn.chosen is not None and drawn.target is not None and len(drawn.checked) == 1
    for series in drawn.series:
        for mark in series.marks:
            assert drawn.left <= mark.x <= drawn.right and drawn.top <= mark.y <= drawn.bottom
    x, mean, low, about = drawn.chosen
    assert mean < low <= drawn.bottom and drawn.left <= x <= drawn.right and "chosen" in about
    both = [mark.label for mark in drawn.series[2].marks]
    assert both == ["25% after 20% + 0.1", "50% after 20% + 0.1"]
    ET.fromstring(front_svg(settings, found))
    labels = [mark for series in drawn.series for mark in series.marks]
    for one, other in itertools.combinations(map(box_of, labels), 2):
        aside = one[1] <= other[0] or other[1] <= one[0]
        assert aside or abs(one[2] - other[2]) >= 11, "labels cover each other"
    slow = [run.model_copy(update={"seconds": 25.0}) for run in runs()]
    ET.fromstring(front_svg(made(front=slow)))  # where nothing gains


def test_the_page_escapes_what_a_file_says() -> None:
    evil = "</pre><script>alert(1)</script>"
    settings = made(checked=[fresh(evil, 31.4)])
    html = page(settings, answer(settings, "28 dB"))
    assert "<script" not in html and "&lt;script&gt;" in html


def test_the_table_says_nothing_to_the_terminal() -> None:
    settings = made(checked=[fresh("\x1b[2J\x07evil", 31.4)])
    told = describe(settings, answer(settings, "28 dB"))
    assert "?[2J?evil" in told and "\x1b" not in told


def test_heat_maps_show_every_head_of_the_choice() -> None:
    settings = made()
    kept, error = heat_maps(settings, answer(settings, "kept 0.4"))
    assert [len(row) for row in kept.rows] == [3, 3] and [len(row) for row in error.rows] == [3, 3]


def test_where_nothing_is_sparse_the_map_shows_what_heads_would_lose() -> None:
    for found in (None, answer(made(), "60 dB")):
        (lost,) = heat_maps(made(), found)
        assert "where 25% is kept" in lost.title and [len(row) for row in lost.rows] == [3, 3]
        assert f"bright {error_of(0.2, 0.6):.2g}" in lost.title, "the hardest head"


def test_the_error_of_a_head_is_that_of_the_nearest_size() -> None:
    curve = [Point(0.1, 0.5, "drop"), Point(0.4, 0.2, "drop"), Point(1.0, 0.0, "dense")]
    assert error_at(curve, "drop", 0.39) == 0.2 and error_at(curve, "drop", 0.9) == 0.0
