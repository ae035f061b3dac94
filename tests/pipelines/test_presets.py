"""Published settings by family, and quality levels: what they choose and what they leave alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import diffpatch
from diffpatch import BadParameter, Dynamic, Neighborhood, Radial, TokenGrid, Window
from diffpatch.cli import main
from diffpatch.patching.options.settle import QUALITIES, settle
from diffpatch.pipelines.families.table import list_families
from tests.tiny import Tiny, flux, wan, wan22

FAMILIES = {family.transformer: family for family in list_families()}
SIZES: dict[str, dict[str, Any]] = {
    "wan-1.3b": {"height": 480, "width": 832, "num_frames": 81},
    "hunyuan-video": {"height": 544, "width": 960, "num_frames": 61},
    "flux": {"height": 1024, "width": 1024},
}


@pytest.mark.parametrize(
    ("family", "experts", "decay", "steps", "layers"),
    [
        ("WanTransformer3DModel", False, 0.2, 12 / 50, 1),
        ("WanTransformer3DModel", True, 0.8, 11 / 40, 1),
        ("HunyuanVideoTransformer3DModel", False, 0.95, 12 / 50, 0),
        ("MochiTransformer3DModel", False, 1.0, 2, 2),
    ],
)
def test_radial_is_set_as_published(
    family: str, experts: bool, decay: float, steps: float, layers: int
) -> None:
    method, schedule = settle("radial", {}, FAMILIES[family], "video", experts=experts)
    assert method == Radial(decay=decay)
    assert schedule.dense_steps == pytest.approx(steps) and schedule.dense_layers == layers


@pytest.mark.parametrize(
    ("family", "kind", "steps", "layers"),
    [
        ("WanTransformer3DModel", "video", 0.2, 1),
        ("HunyuanVideoTransformer3DModel", "video", 0.2, 1),
        ("FluxTransformer2DModel", "image", 0.15, 4),
        ("MochiTransformer3DModel", "video", 0.15, 0),
    ],
)
def test_dynamic_leaves_alone_what_was_published(
    family: str, kind: str, steps: float, layers: int
) -> None:
    method, schedule = settle("dynamic", {}, FAMILIES[family], kind)
    assert method == Dynamic()
    assert schedule.dense_steps == pytest.approx(steps) and schedule.dense_layers == layers
    assert settle("dynamic", {}, FAMILIES[family], kind, quality="fast")[0] == Dynamic(kept=0.125)


def test_the_pipeline_tells_wan_2_2_from_wan_2_1() -> None:
    for tiny, decay in ((wan(), 0.2), (wan22(), 0.8)):
        diffpatch.patch(tiny.pipe, "radial")
        assert f"decay={decay}" in diffpatch.report(tiny.pipe).method
        options: dict[str, Any] = {"height": 32, "width": 64, "num_frames": 9}
        assert f"decay={decay}" in diffpatch.plan(tiny.pipe, **options).method
    alone = wan22().pipe
    alone.register_modules(transformer=None)  # only the low-noise expert is loaded
    diffpatch.patch(alone, "radial")
    assert "decay=0.8" in diffpatch.report(alone).method
    alone = wan22().pipe
    alone.register_modules(transformer_2=None)  # only the high-noise expert is loaded
    assert alone.config.boundary_ratio is not None
    diffpatch.patch(alone, "radial")
    assert "decay=0.8" in diffpatch.report(alone).method
    unbounded = wan22().pipe
    unbounded.register_to_config(boundary_ratio=None)  # two experts, but nothing says who is when
    diffpatch.patch(unbounded, "radial")
    assert "decay=0.8" in diffpatch.report(unbounded).method


COARSE = (("hunyuan-video", "sliding_tile"), ("flux", "linear"))  # no whole tiles are nearer
METHODS = ["radial", "neighborhood", "window", "sliding_tile", "disc", "linear", "dynamic"]


@pytest.mark.parametrize("method", [*METHODS, "window+temporal"])
@pytest.mark.parametrize("model", list(SIZES))
def test_quality_levels_keep_what_they_promise(model: str, method: str) -> None:
    if model == "flux" and method in ("radial", "window+temporal"):
        return  # there is nothing between the frames of an image
    plans = [diffpatch.plan(model, method, quality=q, **SIZES[model]) for q in QUALITIES]
    for plan, target in zip(plans, QUALITIES.values(), strict=True):
        coarse = (model, method) in COARSE
        assert plan.kept_visual == pytest.approx(target, rel=0.15 if coarse else 0.1), plan
        assert coarse or plan.missed_quality is None
        if "+" not in method:  # no refreshes, and levels are about visual tokens
            visual = (plan.grid.visual_tokens / plan.tokens) ** 2
            kept = (plan.kept_sparse - (1 - visual)) / visual
            assert kept == pytest.approx(plan.kept_visual)
    default = diffpatch.plan(model, method, **SIZES[model])
    assert {p.dense_steps for p in plans} == {default.dense_steps}
    assert {p.dense_layers for p in plans} == {default.dense_layers}


def test_a_level_replaces_the_published_size_and_leaves_the_published_schedule() -> None:
    family = FAMILIES["HunyuanVideoTransformer3DModel"]
    published, schedule = settle("neighborhood", {}, family, "video")
    assert published == Neighborhood(window=(0.6, 0.5, 0.3))
    fast, same = settle("neighborhood", {}, family, "video", quality="fast")
    grid = TokenGrid(30, 48, 80)
    assert fast.pattern(grid).kept == pytest.approx(0.125, rel=0.02)
    assert published.pattern(grid).kept == pytest.approx(0.09, rel=0.02)
    assert schedule == same and same.dense_steps == 0.3


def test_what_the_caller_gives_wins() -> None:
    family = FAMILIES["WanTransformer3DModel"]

    def chosen(method: str, **params: Any) -> diffpatch.Method:
        return settle(method, params, family, "video", quality="fast")[0]

    assert chosen("radial", decay=0.7) == Radial(decay=0.7)
    assert chosen("radial", sink=False) == Radial(decay=0.2, sink=False, kept=0.125)
    assert chosen("window", window=(1, 2, 3), shift="step") == Window((1, 2, 3), "step")
    assert chosen("window", shift="none") == Window(shift="none", kept=0.125)
    combined = chosen("window+temporal", refresh=3)
    assert combined == diffpatch.Temporal(over=Window(kept=0.125), refresh=3)


def test_a_level_without_effect_is_said() -> None:
    tiny = wan()
    said = "quality='fast' has no effect beside decay=0.9, which sets how much is kept"
    with diffpatch.patched(tiny.pipe, "radial", quality="fast", decay=0.9):
        assert diffpatch.report(tiny.pipe).notes == (said,)
        tiny.run()
        assert str(diffpatch.report(tiny.pipe)).count(said) == 1
    two = {"kept": 0.2, "decay": 0.9}
    with diffpatch.patched(tiny.pipe, "radial+temporal", quality="high", **two):
        [note] = diffpatch.report(tiny.pipe).notes
        assert note.endswith("beside kept=0.2 and decay=0.9, which set how much is kept")
    for options in ({"quality": "fast"}, {"decay": 0.9}, {"quality": "fast", "sink": False}):
        with diffpatch.patched(tiny.pipe, "radial", **options):
            assert diffpatch.report(tiny.pipe).notes == ()


def test_a_plan_says_that_a_level_has_no_effect() -> None:
    made = diffpatch.plan("wan-1.3b", "radial", quality="fast", decay=0.9, **SIZES["wan-1.3b"])
    assert made.missed_quality is None
    assert "quality    quality='fast' has no effect beside decay=0.9" in str(made)


def test_impossible_levels_say_what_to_do() -> None:
    pipe = wan().pipe
    with pytest.raises(BadParameter, match="unknown quality 'hihg': did you mean 'high'"):
        diffpatch.patch(pipe, "window", quality="hihg")
    with pytest.raises(BadParameter, match="give the name 'window', or leave quality out"):
        diffpatch.patch(pipe, Window(), quality="high")


@pytest.mark.parametrize(("make", "kind"), [(wan, "video"), (flux, "image")])
def test_a_patch_reports_what_a_level_chose(make: Any, kind: str) -> None:
    tiny: Tiny = make()
    with diffpatch.patched(tiny.pipe, "neighborhood", quality="balanced", dense_steps=0):
        tiny.run()
        report = diffpatch.report(tiny.pipe)
    assert report.method == str(Neighborhood().with_kept(0.25, kind))
    assert report.kept < 0.62  # of the image a quarter, of the text everything


def test_the_command_takes_levels(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no earlier rendering is in the way
    size = ["--height", "480", "--width", "832", "--num-frames", "81"]
    plan = ["plan", "-m", "wan-1.3b", *size, "--method", "radial"]
    assert main([*plan, "--quality", "fast"]) == 0
    assert "kept=0.125" in capsys.readouterr().out
    assert main([*plan, "--quality", "fast", "--set", "decay=0.9"]) == 0
    assert "decay=0.9" in capsys.readouterr().out
    assert main([*plan, "--quality", "best"]) == 2
    assert "'best': known: balanced, fast, high" in capsys.readouterr().err
    render = ["render", "-p", "a red circle", "--method", "window", "--quality", "high"]
    assert main([*render, "--dry-run"]) == 0
    assert "quality=high" in capsys.readouterr().out
    assert main([*render, "--method", "dense", "--dry-run"]) == 2
