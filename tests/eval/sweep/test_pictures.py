"""The pictures that a sweep keeps of its runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import diffpatch
from diffpatch.eval.sweep.pictures import PATTERN, planned_pattern, save_pattern
from tests.tiny import wan


def test_a_pattern_is_drawn_where_it_says_which_pairs_are_kept(tmp_path: Path) -> None:
    tiny = wan()
    size: dict[str, Any] = {
        "height": 64,
        "width": 96,
        "num_frames": 9,
        "dense_steps": 0,
        "dense_layers": 0,
    }
    plan = diffpatch.plan(tiny.pipe, "window", window=(1, 0.5, 0.5), **size)
    picture = planned_pattern(plan)
    assert not plan.at_most and picture is not None
    shades = np.asarray(picture.convert("L"))
    assert shades.min() < 100 < shades.max()  # what is kept and what is not
    # Of what the data choose from, and of everything, it would say nothing.
    assert planned_pattern(replace(plan, at_most=True)) is None
    assert planned_pattern(replace(plan, patterns=())) is None
    assert planned_pattern(diffpatch.plan(tiny.pipe, "dense", **size)) is None
    save_pattern(None, tmp_path)
    assert not list(tmp_path.iterdir())
    save_pattern(picture, tmp_path)
    with Image.open(tmp_path / PATTERN) as stored:
        assert np.array_equal(np.asarray(stored), np.asarray(picture))
