"""Calibration of temporal attention: bounds kept, thresholds as loose as they allow."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch

import diffpatch
from diffpatch import BadParameter, Dense, Temporal, cli
from diffpatch.tuning.calibration import THRESHOLDS, Calibration
from tests.patching.run.test_temporal_state import aligned
from tests.tiny import wan

CALL: dict[str, Any] = {
    "height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 6, "output_type": "latent"
}  # fmt: skip
METHOD = Temporal(over=Dense(tile=16), mode="skip", refresh=3)


def calibrated(max_error: float, spread: float = 0.0, **options: Any) -> Calibration:
    tiny = aligned(wan())
    call = {k: v for k, v in (tiny.call | CALL).items() if k != "prompt"}
    return diffpatch.calibrate(
        tiny.pipe, METHOD, prompt="a cat", call=call, max_error=max_error, spread=spread,
        dense_steps=0, **options,
    )  # fmt: skip


def errors_of(threshold: tuple[float, ...]) -> list[float]:
    """What a run with these thresholds is off by in each third, measured from outside."""
    tiny = aligned(wan())
    method = Temporal(over=Dense(tile=16), mode="skip", refresh=3, threshold=threshold)
    diffpatch.patch(tiny.pipe, method, dense_steps=0)
    with diffpatch.attention_error(tiny.pipe) as errors:
        tiny.run(**CALL)
    per_step = list(errors.per_step.values())
    return [sum(per_step[i : i + 2]) / 2 for i in (0, 2, 4)]


def test_the_loosest_thresholds_within_the_bounds() -> None:
    strict, loose = calibrated(0.004, 0.001), calibrated(0.9)
    assert strict.bounds == pytest.approx((0.003, 0.004, 0.005))
    assert loose.threshold == (0.0, 0.0, 0.0) and min(strict.threshold) < 0
    for found in (strict, loose):
        assert found.errors == pytest.approx(errors_of(found.threshold), rel=1e-3, abs=1e-9)
        assert all(
            e is not None and e <= b for e, b in zip(found.errors, found.bounds, strict=True)
        )
    assert sum(k or 0 for k in loose.kept) < sum(k or 0 for k in strict.kept)
    third = strict.threshold.index(min(strict.threshold))  # one step looser would be off by more
    looser = THRESHOLDS[THRESHOLDS.index(strict.threshold[third]) + 1]
    beyond = tuple(looser if i == third else t for i, t in enumerate(strict.threshold))
    assert errors_of(beyond)[third] > strict.bounds[third]


def test_the_result_is_a_method_and_nothing_stays_behind() -> None:
    tiny = aligned(wan())
    before = tiny.run(**CALL)
    call = {k: v for k, v in (tiny.call | CALL).items() if k != "prompt"}
    found = diffpatch.calibrate(
        tiny.pipe, "window+temporal", prompt="a cat", call=call, max_error=0.9, dense_steps=4
    )
    assert torch.equal(tiny.run(**CALL), before)
    assert found.errors[:2] == (None, None) and found.kept[:2] == (1.0, 1.0)
    assert found.errors[2] is not None and found.method.over == diffpatch.Window()
    diffpatch.patch(tiny.pipe, found.method, dense_steps=4)
    tiny.run(**CALL)
    assert diffpatch.report(tiny.pipe).kept_per_step[4:] == pytest.approx([found.kept[2]] * 2, 0.5)
    shown = [["dense", "100.0%"]] * 2 + [[f"{found.errors[2]:.2%}", f"{found.kept[2]:.1%}"]]
    for line, threshold, bound, (error, kept) in zip(
        str(found).splitlines()[1:], found.threshold, ("89.00%", "90.00%", "91.00%"), shown,
        strict=True,
    ):  # fmt: skip
        assert line.split()[1:] == ["third", f"{threshold:.1f}", error, bound, kept]


def test_thresholds_that_are_tried_rise_from_near_nothing_in_small_steps() -> None:
    steps = [after - before for before, after in itertools.pairwise(THRESHOLDS)]
    assert all(0 < step <= 2 for step in steps)
    assert THRESHOLDS[0] == -12 and THRESHOLDS[-1] == 0


def test_what_cannot_be_calibrated_says_why() -> None:
    tiny = wan()
    with pytest.raises(BadParameter, match="has no thresholds"):
        diffpatch.calibrate(tiny.pipe, "radial", prompt="a cat")
    with pytest.raises(BadParameter, match="has no thresholds"):
        diffpatch.calibrate(tiny.pipe, "radial+temporal", prompt="a cat", mode="mask")
    with pytest.raises(BadParameter, match=r"above spread=0\.1"):
        diffpatch.calibrate(tiny.pipe, prompt="a cat", max_error=0.1, spread=0.1)
    message = r"Window.* and a threshold of -12\.0 are off by .*allow more with max_error"
    with pytest.raises(BadParameter, match=message):
        diffpatch.calibrate(
            tiny.pipe, "window+temporal", prompt="a cat", call=CALL | {"num_inference_steps": 2},
            window=(-1, 1, 1), max_error=1e-4, spread=0.0, dense_steps=0,
        )  # fmt: skip


def test_the_command_prints_options_that_other_commands_take(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["calibrate", "-p", "a red circle", "--method", "dense+temporal", "--max-error", "0.2"]
    words += ["--set", "tile=16", "--dense-steps", "1", "--steps", "3", "--num-frames", "2"]
    words += ["--height", "64", "--width", "64"]
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["options"].startswith("--method dense+temporal --set mode=skip --set threshold=")
    assert found["options"].endswith(" --set tile=16 --dense-steps 1")
    size = ["--model", "wan-1.3b", "--height", "480", "--width", "832", "--num-frames", "81"]
    again = found["options"].replace(" --set tile=16", "").split()
    assert cli.main(["plan", *size, *again]) == 0
    assert f"threshold={tuple(found['threshold'])}" in capsys.readouterr().out
    assert cli.main(["calibrate", "-p", "a", "--method", "radial", "--set", "mode=skip"]) == 2
