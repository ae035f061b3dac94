"""Targets as users write them."""

from __future__ import annotations

import pytest

from diffpatch import BadParameter
from diffpatch.targets.target import Target


@pytest.mark.parametrize(
    ("text", "goal", "value"),
    [
        ("30 dB", "psnr", 30.0),
        ("27.5dB", "psnr", 27.5),
        (" 30 db ", "psnr", 30.0),
        ("kept 0.25", "kept", 0.25),
        ("kept=25%", "kept", 0.25),
        ("error 5%", "error", 0.05),
        ("error 0.1", "error", 0.1),
        ("2x", "speedup", 2.0),
        ("1.5 ×", "speedup", 1.5),
    ],
)
def test_targets_are_read_and_written_alike(text: str, goal: str, value: float) -> None:
    target = Target.parse(text)
    assert target.goal == goal and target.value == pytest.approx(value)
    assert Target.parse(str(target)) == target


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fast", "must be a text such as '30 dB'"),
        ("30", "must be a text such as '30 dB'"),
        ("", "must be a text such as '30 dB'"),
        (30, "target=30 must be a text"),
        (None, "target=None must be a text"),
        ("1.2.3 dB", "must be a text such as"),
        ("kept 25", "kept must be a fraction"),
        ("kept 0", "kept must be a fraction"),
        ("kept 101%", "kept must be a fraction"),
        ("error 100%", "error must be a fraction below 1"),
        ("0 dB", "psnr must be above 0"),
        ("900 dB", "at most 100 dB"),
        ("0.5x", "speedup must be at least 1"),
        ("-2x", "must be a text such as"),
    ],
)
def test_what_is_no_target_is_refused_with_what_is(text: object, message: str) -> None:
    with pytest.raises(BadParameter, match=message):
        Target.parse(text)
