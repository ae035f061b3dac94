"""Objects and repetitions on clips that are drawn with a known number of both."""

from __future__ import annotations

import pytest
import torch

from diffpatch.eval.quality.details import details, objects, repetition
from diffpatch.eval.quality.scores import load_tools
from diffpatch.pipelines.demo import clips

RED, BLACK = clips.COLORS["red"], clips.BACKGROUNDS["black"]


def moving(places: list[list[tuple[int, int]]]) -> torch.Tensor:
    """Frames in which red squares of ten pixels stand at (row, column)."""
    frames = torch.tensor(BLACK).view(1, 3, 1, 1).repeat(len(places), 1, 64, 64)
    for frame, squares in zip(frames, places, strict=True):
        for row, column in squares:
            frame[:, row : row + 10, column : column + 10] = torch.tensor(RED).view(3, 1, 1)
    return frames


def test_objects_are_counted_frame_by_frame() -> None:
    one, two = [(5, 5)], [(5, 5), (30, 40)]
    assert objects(moving([one, one]), RED, BLACK) == 1
    assert objects(moving([two, two]), RED, BLACK) == 2
    assert objects(moving([one, two, [], two]), RED, BLACK) == pytest.approx(5 / 4)
    touching = [(5, 5), (15, 15)]  # by a corner
    assert objects(moving([touching]), RED, BLACK) == 1
    speck = moving([one])
    speck[0, :, 50, 50] = torch.tensor(RED)
    assert objects(speck, RED, BLACK) == 1
    larger = torch.nn.functional.interpolate(moving([two]), scale_factor=3)
    assert objects(larger, RED, BLACK) == 2


def test_a_clip_that_comes_back_repeats_itself() -> None:
    straight = moving([[(20, 3 * i)] for i in range(16)])
    twice = moving([[(20, 5 * (i % 8))] for i in range(16)])
    still = moving([[(20, 20)]] * 16)
    assert repetition(twice) == pytest.approx(1.0)
    assert repetition(straight) < 0.05
    assert repetition(still) == 0.0


def test_details_say_what_the_judge_reads() -> None:
    tools = load_tools()
    generator = torch.Generator().manual_seed(0)
    spec = clips.ClipSpec("large", "red", "square", "moves left", "plain", "black")
    scenes = clips.draw_scenes([spec], generator)
    frames = (clips.render(scenes, clips.frame_times(13)[None], 64)[0].transpose(0, 1) + 1) / 2
    found = details(frames, spec.caption(), tools)
    assert found["objects"] == 1 and found["repetition"] < 0.2
    assert found["caption_motion"] == found["caption_color"] == found["caption_shape"] == 1.0
    other = spec.caption().replace("left", "up").replace("red", "blue")
    wrong = details(frames, other, tools)
    assert wrong["caption_motion"] == wrong["caption_color"] == 0.0
    assert set(details(frames, "a fox", tools)) == {"repetition"}
    assert "caption_motion" not in details(frames[:4], spec.caption(), tools)
