"""The plan: published bounds, exact agreement with reports, sizes that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import diffpatch
from diffpatch import BadParameter, UnknownFamily
from diffpatch.cli import main
from tests.tiny import flux, wan

WAN_720P = {"height": 720, "width": 1280, "num_frames": 81}


def test_perfectly_block_sparse_cases_reach_the_published_bounds() -> None:
    hunyuan = diffpatch.plan(
        "hunyuan-video", "neighborhood", height=768, width=1280, num_frames=117, text_tokens=0,
        dense_steps=0, window=(18, 24, 24), stride=(16, 8, 8),
    )  # fmt: skip
    assert hunyuan.grid.shape == (30, 48, 80)
    assert hunyuan.attention_speedup == pytest.approx(11.1, rel=0.01)
    flux_4k = diffpatch.plan(
        "flux", "neighborhood", height=4096, width=4096, text_tokens=0, dense_steps=0,
        window=(-1, 80, 80), stride=(1, 16, 16),
    )  # fmt: skip
    assert flux_4k.attention_speedup == pytest.approx(10.2, rel=0.01)


def test_published_presets_are_planned_with() -> None:
    plan = diffpatch.plan("wan-14b", "radial", **WAN_720P)
    assert plan.tokens == 75_600 and plan.grid.shape == (21, 45, 80)
    assert (plan.dense_steps, plan.dense_layers, plan.steps, plan.layers) == (12, 1, 50, 40)
    expected = 1 - (1 - 12 / 50) * (1 - 1 / 40) * (1 - plan.kept_sparse)
    assert plan.kept == pytest.approx(expected)
    assert 1 < plan.step_speedup < plan.attention_speedup


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("window", {"window": (-1, 1, 2)}),
        ("neighborhood", {"window": (3, 1, 2), "stride": 1}),
        ("linear", {"density": 0.3, "pool": 2}),
        ("window+temporal", {"window": (-1, 1, 2), "refresh": 2}),
    ],
)
def test_the_plan_is_what_the_run_reports(method: str, params: dict[str, Any]) -> None:
    tiny = wan()
    plan = diffpatch.plan(
        tiny.pipe, method, height=32, width=64, num_frames=9, num_inference_steps=4,
        dense_steps=1, **params,
    )  # fmt: skip
    diffpatch.patch(tiny.pipe, method, dense_steps=1, **params)
    tiny.run(num_inference_steps=4)
    report = diffpatch.report(tiny.pipe)
    assert plan.kept == pytest.approx(report.kept, abs=1e-9)
    assert (plan.steps, plan.layers) == (report.steps, report.layers)
    assert plan.grid.shape == (3, 2, 4)


def test_a_packed_image_pipeline_is_read_right() -> None:
    tiny = flux()
    options: dict[str, Any] = {"height": 16, "width": 32, "num_inference_steps": 2}
    plan = diffpatch.plan(tiny.pipe, "window", text_tokens=48, dense_steps=0, **options)
    diffpatch.patch(tiny.pipe, "window", dense_steps=0)
    tiny.run()
    assert plan.kept == pytest.approx(diffpatch.report(tiny.pipe).kept, abs=1e-9)


def test_temporal_state_is_planned() -> None:
    plan = diffpatch.plan("wan-1.3b", "radial+temporal", height=480, width=832, num_frames=81)
    # 32,760 tokens × 12 heads × (128 bf16 + one fp32) × 29 sparse layers × 2 branches
    assert plan.state_bytes == 32_760 * 12 * 260 * 29 * 2


@pytest.mark.parametrize(
    ("model", "changes", "error", "message"),
    [
        ("wan-14b", {"height": 721}, BadParameter, "height=721 must be a multiple of 16"),
        ("wan-14b", {"num_frames": 80}, BadParameter, "such as 77 or 81"),
        ("wan-14B", {}, UnknownFamily, "did you mean 'wan-14b'"),
        ("flux", {"num_frames": 1}, BadParameter, "radial works on video models only"),
    ],
)
def test_what_does_not_fit_is_refused(
    model: str, changes: dict[str, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        diffpatch.plan(model, "radial", **(WAN_720P | changes))


def test_the_command_compares_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--height", "480", "--width", "832", "--num-frames", "81"]
    assert main(["plan", "--model", "wan-1.3b", *size]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("radial", "linear", "window", "neighborhood+temporal"))
    picture = tmp_path / "map.png"
    assert (
        main(["plan", "-m", "wan-1.3b", *size, "--method", "radial", "--draw", str(picture)]) == 0
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["plan", "-m", "wan-1.3b", *size, "--draw", str(picture)]) == 2
    assert main(["plan", "-m", "wan-9b", *size]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 2 and "did you mean" in error[1]
