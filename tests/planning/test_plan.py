"""The plan: published bounds, exact agreement with reports, sizes that do not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import diffpatch
from diffpatch import BadParameter, Neighborhood, TokenGrid, UnknownFamily, Window
from diffpatch.cli import main
from diffpatch.patterns.drawing import KINDS, draw, kept_by_distance, seen_by
from diffpatch.pipelines.shapes.find import find_shape
from diffpatch.pipelines.shapes.table import MODELS
from diffpatch.planning.words import operations, runs
from tests.tiny import flux, wan

WAN_720P: dict[str, Any] = {"height": 720, "width": 1280, "num_frames": 81}


def test_perfectly_block_sparse_cases_reach_the_published_bounds() -> None:
    hunyuan = diffpatch.plan(
        "hunyuan-video", "neighborhood", height=768, width=1280, num_frames=117, text_tokens=0,
        dense_steps=0, window=(18, 24, 24), stride=(16, 8, 8),
    )  # fmt: skip
    assert hunyuan.grid == TokenGrid(30, 48, 80)
    assert hunyuan.attention_speedup == pytest.approx(11.1, rel=0.01)
    # No tile is visited in part, and none is smaller than a block of the kernel.
    assert hunyuan.visited == pytest.approx(hunyuan.kept_sparse)
    assert hunyuan.computed == pytest.approx(hunyuan.kept_sparse)
    flux_4k = diffpatch.plan(
        "flux", "neighborhood", height=4096, width=4096, text_tokens=0, dense_steps=0,
        window=(-1, 80, 80), stride=(1, 16, 16),
    )  # fmt: skip
    assert flux_4k.attention_speedup == pytest.approx(10.2, rel=0.01)


def test_published_presets_are_planned_with() -> None:
    plan = diffpatch.plan("wan-14b", "radial", **WAN_720P)
    assert plan.tokens == 75_600 and plan.grid == TokenGrid(21, 45, 80)
    assert (plan.dense_steps, plan.dense_layers, plan.steps, plan.layers) == (12, 1, 50, 40)
    expected = 1 - (1 - 12 / 50) * (1 - 1 / 40) * (1 - plan.kept_sparse)
    assert plan.kept == pytest.approx(expected)
    assert 1 < plan.step_speedup < plan.attention_speedup


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("window", {"window": (-1, 1, 2)}),
        ("neighborhood", {"window": (3, 1, 2), "stride": 1}),
        ("linear", {"kept": 0.3, "pool": 2}),
        ("window+temporal", {"window": (-1, 1, 2), "refresh": 2}),
        ("neighborhood", {"quality": "fast"}),
        ("radial+temporal", {"quality": "balanced", "refresh": 3}),
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
    assert plan.kept_per_step == pytest.approx(report.kept_per_step, abs=1e-9)
    assert plan.kept_per_layer == pytest.approx(list(report.kept_per_layer.values()), abs=1e-9)
    assert (plan.steps, plan.layers) == (report.steps, report.layers)
    assert plan.grid == TokenGrid(3, 2, 4)


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
    assert plan.state_bytes == 32_760 * 12 * 260 * 29 * 2 and plan.fits
    large = diffpatch.plan("wan-14b", "radial+temporal", **WAN_720P)
    assert not large.fits and "the run is refused" in str(large)


def test_a_choice_by_content_is_planned_with_its_state_and_scores() -> None:
    size: dict[str, Any] = {"height": 480, "width": 832, "num_frames": 81, "profile": "h100"}
    plan = diffpatch.plan("wan-1.3b", "dynamic", **size)
    method = diffpatch.Dynamic()
    pattern = method.pattern(TokenGrid(21, 30, 52))
    least, most = method.bounds(pattern, 0.25)
    assert plan.at_most and plan.kept_sparse == pytest.approx(most) and least < most < 0.27
    assert plan.predicted is not None and 1 < plan.predicted.call_speedup < 1 / least
    # A bit for each query tile and strip of 12 heads in 29 layers, for both branches at once.
    assert plan.state_bytes == 29 * method.state_size(pattern, 12, 128)
    alone = diffpatch.plan("wan-1.3b", "dynamic", per_branch=True, **size)
    assert alone.state_bytes == 2 * plan.state_bytes
    assert plan.scratch_bytes > 2**20 and "while a call chooses" in str(plan)
    cut = diffpatch.plan("wan-1.3b", "dynamic", rule="sol", threshold=1.0, **size)
    assert cut.predicted is None and cut.kept_sparse == 1.0 and cut.at_most
    small = diffpatch.plan("wan-1.3b", "dynamic", budget_gib=0.001, **size)
    assert not small.fits and "the run is refused" in str(small)


@pytest.mark.parametrize(
    ("model", "changes", "error", "message"),
    [
        ("wan-14b", {"height": 721}, BadParameter, "height=721 must be a multiple of 16"),
        ("wan-14b", {"num_frames": 80}, BadParameter, "such as 77 or 81"),
        ("wan-14b", {"num_frames": 1}, BadParameter, "makes videos: say how many frames"),
        ("wan-14B", {}, UnknownFamily, "did you mean 'wan-14b'"),
        ("flux", {"num_frames": 1}, BadParameter, "radial works on video models only"),
    ],
)
def test_what_does_not_fit_is_refused(
    model: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        diffpatch.plan(model, "radial", **(WAN_720P | changes))


@pytest.mark.parametrize("make", [wan, flux])
def test_configs_say_what_the_pipeline_says(make: Any, tmp_path: Path) -> None:
    tiny = make()
    loaded = find_shape(tiny.pipe)
    tiny.pipe.save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    assert replace(find_shape(tmp_path), name=loaded.name) == loaded
    config = tmp_path / "transformer" / "config.json"
    assert find_shape(config) == find_shape(tmp_path)
    (tmp_path / "model_index.json").unlink()  # the transformer alone: the family's usual VAE
    alone = find_shape(config)
    assert (alone.layers, alone.heads, alone.head_dim) == (
        loaded.layers, loaded.heads, loaded.head_dim
    )  # fmt: skip
    assert alone.space == 8


def test_a_hub_id_of_a_built_in_model_needs_no_network() -> None:
    assert find_shape("Wan-AI/Wan2.1-T2V-14B-Diffusers").name == "wan-14b"
    assert len({i for row in MODELS for i in row.ids}) == sum(len(row.ids) for row in MODELS)


GRIDS = [TokenGrid(4, 6, 7, 3, 5), TokenGrid(1, 9, 8, 0, 4)]
METHODS = [
    Neighborhood(window=(0.5, 3, 5), stride=1),
    Neighborhood(heads=((-1, 0.3, 0.3), (0.4, -1, -1))),
    Window(),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=["tokens", "heads", "window"])
def test_pictures_show_the_mask(method: diffpatch.Method, grid: TokenGrid) -> None:
    pattern = method.pattern(grid, method.variant(1, 0))
    masks = pattern.dense()  # (P, S, S)
    heads = pattern.blocks.head_pattern
    for token in (0, grid.text_before + 13, grid.num_tokens - 1):
        assert torch.equal(seen_by(pattern, token), masks[0, token])
    visual = slice(grid.text_before, grid.text_before + grid.visual_tokens)
    mean = (masks if heads is None else masks[heads.long()]).double().mean(0)[visual, visual]
    axis = grid.num_frames if grid.num_frames > 1 else grid.height
    at = torch.arange(grid.visual_tokens) // (grid.visual_tokens // axis)
    apart = (at[:, None] - at).abs()
    expected = torch.stack([mean[apart == d].mean() for d in range(axis)])
    assert torch.allclose(kept_by_distance(pattern), expected)
    pictures = [draw(pattern, kind, title=str(method)) for kind in KINDS]
    assert all(picture.width > 200 and picture.height > 200 for picture in pictures)
    query = pictures[1].convert("RGB")
    assert {(0, 98, 168), (214, 60, 20)} <= {c for _, c in query.getcolors(1 << 20) or ()}
    with pytest.raises(BadParameter, match=r"inside of"):
        draw(pattern, "query", query=(0, 99, 0))


def test_a_plan_does_not_depend_on_the_default_device() -> None:
    size: dict[str, Any] = {"height": 96, "width": 160, "num_frames": 9, "num_inference_steps": 3}
    with torch.device("meta"):
        plan = diffpatch.plan("wan-1.3b", "neighborhood", window=0.5, profile="h100", **size)
    again = diffpatch.plan("wan-1.3b", "neighborhood", window=0.5, profile="h100", **size)
    assert again.to_dict() == plan.to_dict() and plan.predicted is not None


def test_runs_of_equal_shares_are_counted() -> None:
    assert runs([1.0, 1.0, 0.25]) == "2 × 100.0%, 1 × 25.0%"
    assert runs([1.0, 1.0, *[0.2, 0.3] * 4]) == "2 × 100.0%, 8 × 20.0% to 30.0%"
    assert runs([0.1, *[0.2, 0.3] * 4]) == "9 × 10.0% to 30.0%"


def test_the_command_compares_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--height", "480", "--width", "832", "--num-frames", "81"]
    assert main(["plan", "--model", "wan-1.3b", *size]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("radial", "linear", "window", "neighborhood+temporal"))
    assert "which one? linear" in out and "diffpatch sweep" in out
    device = ["--device-profile", "h100", "--quality", "balanced"]
    assert main(["plan", "--model", "wan-1.3b", *size, *device]) == 0
    out = capsys.readouterr().out
    assert "UNCALIBRATED" in out and "at quality 'balanced'" in out
    folder = tmp_path / "pictures"
    one = ["plan", "-m", "wan-1.3b", *size, "--method", "radial"]
    assert main([*one, "--draw", str(folder), "--draw-query", "3,4,5"]) == 0
    assert sorted(p.name for p in folder.iterdir()) == ["distance.png", "query.png", "tiles.png"]
    picture = tmp_path / "map.png"
    assert (
        main(["plan", "-m", "wan-1.3b", *size, "--method", "radial", "--draw", str(picture)]) == 0
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert main(["plan", "-m", "wan-1.3b", *size, "--method", "radial", "--draw", "map.svg"]) == 2
    assert main(["plan", "-m", "wan-1.3b", *size, "--set", "decay=1"]) == 2
    assert main(["plan", "-m", "wan-9b", *size]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 3 and "map.svg cannot be written: give .png or" in error[0]
    assert "--set is about one method" in error[1] and "did you mean" in error[2]


def test_every_method_is_drawn_on_one_sheet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ["--height", "96", "--width", "160", "--num-frames", "9"]
    sheet = tmp_path / "new" / "folder" / "sheet.png"
    assert main(["plan", "-m", "wan-1.3b", *size, "--draw", str(sheet)]) == 0
    shown = capsys.readouterr()
    assert shown.err == f"wrote {sheet}\n" and "attention ≤" in shown.out
    with Image.open(sheet) as picture:
        assert picture.width > 3 * 400 and picture.height > 2 * 400


def test_the_command_plans_the_steps_and_the_backend_that_will_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wan().pipe.save_pretrained(tmp_path / "wan")
    capsys.readouterr()
    size = ["--height", "32", "--width", "64", "--num-frames", "17", "--method", "window"]
    assert main(["plan", "-m", str(tmp_path / "wan"), *size, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["steps"] == 50 and made["backend"] == "torch"  # WanPipeline's own; no GPU here
    assert main(["plan", "-m", "demo", *size, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 10  # of the demo's preset


def test_methods_are_ranked_by_what_is_computed() -> None:
    plan = diffpatch.plan("wan-1.3b", "disc", height=480, width=832, num_frames=81)
    assert plan.computed is not None and plan.computed > plan.kept_sparse
    assert plan.computed_speedup < plan.step_speedup
    more = replace(plan, computed=1.03)  # filled up to blocks until nothing is left out
    assert more.computed_speedup < 1
    assert replace(plan, computed=None).computed_speedup == plan.step_speedup
    assert operations(1.304e16) == "13.04 PFLOP"


def test_calls_that_keep_everything_are_planned_dense() -> None:
    """As they run: 21 latent frames of 30×52 tokens are what the model was trained at."""
    found = diffpatch.plan(
        "wan-1.3b", "longer", height=480, width=832, num_frames=81, profile="h100"
    )
    assert found.kept_sparse == 1 and found.computed is None
    assert found.predicted is not None and found.predicted.step_speedup == 1


def test_a_level_of_quality_that_is_missed_is_said() -> None:
    size: dict[str, Any] = {"height": 480, "width": 832, "num_frames": 81}
    near = diffpatch.plan("wan-1.3b", "window", quality="fast", **size)
    assert near.missed_quality is None and "quality " not in str(near)
    size |= {"height": 96, "width": 160, "num_frames": 9}  # one tile of 6×8×8 and a bit
    far = diffpatch.plan("wan-1.3b", "sliding_tile", quality="fast", **size)
    assert far.missed_quality == f"{far.kept_visual:.1%} instead of 12.5%"
    assert f"quality    {far.missed_quality} of the visual pairs; nothing is nearer" in str(far)
    assert diffpatch.plan("wan-1.3b", "sliding_tile", **size).missed_quality is None


def test_the_command_takes_the_size_of_the_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-m", "demo-long", "--method", "window", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["grid"]["num_frames"], made["grid"]["height"], made["steps"]) == (33, 16, 10)
    assert main(["plan", "-m", "demo-long", "--method", "window", "--num-frames", "17"]) == 0
    assert "17×16×16" in capsys.readouterr().out
    assert main(["plan", "-m", "wan-14b", "--width", "832"]) == 2
    assert "give --height: wan-14b has no size of its own" in capsys.readouterr().err


@pytest.mark.parametrize("side", [20_000, 10**6])
def test_a_size_beyond_what_patterns_hold_is_refused_before_it_is_tried(side: int) -> None:
    for name in (
        "radial",
        "window",
        "disc",
        "sliding_tile",
        "linear",
        "dynamic",
        "radial+temporal",
    ):
        with pytest.raises(BadParameter, match="tokens and patterns hold at most 2,097,152"):
            diffpatch.plan("wan-1.3b", name, height=side, width=2 * side, num_frames=81)
