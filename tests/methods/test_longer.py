"""The frames that `longer` lets a query see, against its rule in words, on odd lengths."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from diffpatch import BadParameter, Longer, TokenGrid
from diffpatch.methods.longer import keyframe_interval, keyframes
from tests.brute import Position, brute_force, check

LENGTHS = [1, 2, 5, 9, 13, 14, 21, 22, 33, 47, 63, 84]


def frames_by_hand(method: Longer, num_frames: int, step: int) -> list[set[int]]:
    """The frames that each frame sees, from the text of the rule."""
    assert method.trained is not None
    most = method.trained * method.scale
    if num_frames <= most:
        return [set(range(num_frames))] * num_frames
    wanted = max(method.first, math.floor(most) - 2 * method.window - 1)
    heads = set(range(method.first))
    interval = 1
    for k in range(1, num_frames + 1):  # the largest that gives enough
        keys = {i * k % num_frames for i in range(-(-num_frames // k))}
        if len(keys | heads) >= wanted:
            interval = k
    keys = {(step + i * interval) % num_frames for i in range(-(-num_frames // interval))} | heads
    seen = []
    for frame in range(num_frames):
        window: set[int] = set()
        for distance in range(num_frames):
            for near in (frame - distance, frame + distance):
                fits = 0 <= near < num_frames and near not in keys
                if fits and len(window) < 2 * method.window + 1:
                    window.add(near)
        seen.append(keys | window | {frame})
    return seen


@pytest.mark.parametrize("num_frames", LENGTHS)
@pytest.mark.parametrize(
    "method",
    [
        Longer(trained=13),
        Longer(trained=13, window=2, first=3),
        Longer(trained=5, window=0, first=0),
        Longer(trained=21, scale=0.5, window=1),
        Longer(trained=9, window=8),
    ],
    ids=str,
)
def test_frames_are_those_of_the_rule(method: Longer, num_frames: int) -> None:
    if method.first > num_frames:
        return  # refused; see below
    for step in (0, 1, 7, 40):
        seen = method.visible_frames(num_frames, step)
        expected = frames_by_hand(method, num_frames, step)
        assert [set(row.nonzero()[:, 0].tolist()) for row in seen] == expected


@pytest.mark.parametrize("step", [0, 3])
def test_a_pattern_is_whole_frames(step: int) -> None:
    method = Longer(trained=3, window=1)
    grid = TokenGrid(7, 3, 5, text_before=2, text_after=3)
    frames = method.visible_frames(7, step)
    assert not frames.all()

    def rule(q: Position, k: Position) -> bool:
        return bool(frames[q[0], k[0]])

    check(method.pattern(grid, method.variant(5, step)), brute_force(grid, rule))


def test_what_is_seen_does_not_grow_with_the_clip_and_all_frames_meet() -> None:
    method = Longer(trained=21)
    for num_frames in (22, 42, 84, 168):
        met = torch.zeros(num_frames, num_frames, dtype=torch.bool)
        for step in range(num_frames):
            seen = method.visible_frames(num_frames, step)
            assert seen.sum(1).max() <= 21 + 11  # rounding of the keyframes' distance, no more
            met |= seen
        assert met.all()


def test_clips_as_long_as_the_training_stay_dense() -> None:
    assert Longer(trained=21).pattern(TokenGrid(21, 2, 3)).kept == 1.0
    assert Longer(trained=21).pattern(TokenGrid(24, 2, 3)).kept < 1.0
    assert Longer(trained=21, scale=2.0).pattern(TokenGrid(42, 2, 3)).kept == 1.0


def test_keyframes_go_around_the_end() -> None:
    assert keyframes(7, 3, 0) == {0, 3, 6}
    assert keyframes(7, 3, 2) == {2, 5, 1}
    assert keyframe_interval(12, 4, 1) == 3
    assert keyframe_interval(12, 5, 1) == 2
    assert keyframe_interval(5, 100, 0) == 1


def test_what_cannot_work_is_said() -> None:
    with pytest.raises(BadParameter, match="trained=None"):
        Longer().pattern(TokenGrid(5, 2, 2))
    with pytest.raises(BadParameter, match="first=9 frames, but the clip has 5"):
        Longer(trained=3, first=9).pattern(TokenGrid(5, 2, 2))
    wrongs: tuple[dict[str, Any], ...] = (
        {"trained": 0}, {"window": -1}, {"first": -1}, {"scale": 0.0}
    )  # fmt: skip
    for wrong in wrongs:
        with pytest.raises(BadParameter, match=f"longer: {next(iter(wrong))}="):
            Longer(**{"trained": 4, **wrong})
