"""What is said of sizes, times and settings, and small decisions, at their borders."""

from __future__ import annotations

import dataclasses
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import diffpatch
from diffpatch import Dynamic, Larger, Neighborhood, Temporal, TokenGrid, Window
from diffpatch.eval.quality import evaluate
from diffpatch.eval.sweep import drive
from diffpatch.eval.sweep.plan import Scene, plan_sweep
from diffpatch.eval.sweep.spec import Prompt, check_spec
from diffpatch.methods.base import AttentionCall
from diffpatch.methods.learned import files
from diffpatch.patching.attention.layout import layout, with_silent
from diffpatch.patching.attention.model_masks import read_mask
from diffpatch.patching.options.schedule import Schedule
from diffpatch.pipelines.families.grids import REST
from diffpatch.pipelines.shapes.find import find_shape
from diffpatch.planning.prediction import duration
from diffpatch.planning.run import PlannedRun


def test_progress_says_what_came_of_a_run_and_how_long_the_others_take() -> None:
    said: list[str] = []
    run: Any = SimpleNamespace(title="radial | “a cat” seed 0")
    progress = drive.Progress(total=12, done=1, say=said.append, workers=2)
    progress.failed(run, ValueError("no memory\nleft"))
    progress.done = 2
    clocks, gains = {"denoising": 1.5, "total": 3.0}, {"denoising": 2.0, "total": 1.0}
    progress.finished(run, {"quality": {"psnr": 30.25}, "seconds": clocks, "speedup": gains}, 60.0)
    progress.done = 12
    whole: dict[str, Any] = {"denoising": None, "total": 3.0}
    progress.finished(run, {"quality": {}, "seconds": whole, "speedup": whole}, 120.0)
    assert said == [
        "[ 1/12] radial | “a cat” seed 0: FAILED, ValueError: no memory",
        "[ 2/12] radial | “a cat” seed 0: 1.5 s, 2.00×, 30.2 dB | 5 min left",
        "[12/12] radial | “a cat” seed 0: 3.0 s, 3.00×",
    ]
    assert not progress.is_over
    progress.limit = time.monotonic() + 1000.0
    assert not progress.is_over
    progress.limit = time.monotonic() + 100.0  # the longest took 120 s
    assert progress.is_over


def test_times_change_their_unit_where_the_next_one_reads_better() -> None:
    found = {seconds: drive._duration(seconds) for seconds in (89.4, 90, 5369, 5400, 30000)}
    assert list(found.values()) == ["89 s", "2 min", "89 min", "1.5 h", "8.3 h"]
    assert [duration(x) for x in (0.0123, 0.5, 1.0, 73.2, 412.0)] == [
        "12.3 ms", "500 ms", "1.00 s", "73.2 s", "412 s"
    ]  # fmt: skip


def test_time_left_is_told_once_a_prompt_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 600.0)
    assert evaluate._left(0, 5, 0.0) == ""
    assert evaluate._left(2, 5, 0.0) == " (about 15 min left)"  # 5 min each
    assert evaluate._left(4, 5, 595.0) == " (about 1 min left)"


def test_a_setting_is_told_by_what_its_call_says() -> None:
    size = {"width": 64, "height": 32, "num_frames": 9, "guidance_scale": 3.0}
    scene = Scene("demo", "fp32", Prompt("a cat"), 0, 0, size, 7)
    assert scene.setting == "demo, 64×32, 9 frames, 7 steps"
    assert dataclasses.replace(scene, call={}, steps=None).setting == "demo"


def test_labels_name_the_schedule_only_where_there_are_several(tmp_path: Any) -> None:
    spec: dict[str, Any] = {"model": "demo", "prompts": ["a cat"], "steps": 2, "noise_floor": [],
                            "methods": ["window"]}  # fmt: skip

    def labels(schedules: list[dict[str, int]]) -> set[str]:
        planned = plan_sweep(check_spec(spec | {"schedules": schedules}, tmp_path))
        return {run.way.label for runs in planned.values() for run in runs}

    assert labels([{"dense_steps": 1}]) == {"dense", "window"}
    several = labels([{"dense_steps": 1}, {"dense_steps": 0}])
    assert several == {"dense", "window dense_steps=1", "window dense_steps=0"}


def test_a_mask_whose_rows_are_all_one_hides_keys() -> None:
    k, keys = torch.zeros(2, 5, 3, 4), torch.rand(2, 5) > 0.4
    expanded = keys[:, None, None].expand(2, 3, 5, 5)
    seen = read_mask(k, expanded, square=False)
    assert seen.reason is None and seen.keys is not None and torch.equal(seen.keys, keys)
    assert read_mask(k, expanded.contiguous(), square=False).reason is not None


@pytest.mark.parametrize("silent", [range(2), range(4, 6)], ids=["before", "after"])
def test_rows_for_silent_tokens_stand_where_the_tokens_do(silent: range) -> None:
    q = torch.randn(1, 4, 2, 3)
    padded, asking = with_silent(q, silent)
    assert padded.shape == (1, 6, 2, 3) and torch.equal(padded[:, asking], q)
    assert not padded[:, silent.start : silent.stop].any()
    assert with_silent(q, range(0))[0] is q


def test_weights_of_the_linear_path_are_known_by_their_shapes() -> None:
    good = {"gate": (2, 3), "phi_q": (2, 4, 4), "q_down": (2, 8), "out_up": (8, 2)}
    bad = {"gate": (3,), "phi_q": (2, 4, 5), "q_down": (2, 8, 1), "w_down": (2, 8)}
    assert all(files._is_shaped(name, torch.Size(shape)) for name, shape in good.items())
    assert not any(files._is_shaped(name, torch.Size(shape)) for name, shape in bad.items())
    assert not files._is_shaped("gate", torch.Size((2, 4)))


@pytest.mark.parametrize(("size", "pixels"), [(1, 1), (7, 3), (512, 256)])
def test_a_drawn_pattern_has_a_square_of_whole_pixels_a_tile(size: int, pixels: int) -> None:
    pattern = Neighborhood(window=(1, 1, 1)).pattern(TokenGrid(1, 1, 16))
    tiles = pattern.tile_map().shape[-1]
    assert tiles == 2
    assert pattern.draw(size).size == (pixels * tiles, pixels * tiles)


def test_what_dynamic_has_chosen_is_shown_for_every_row_of_tiles() -> None:
    grid = TokenGrid(2, 16, 16)
    method = Dynamic(kept=0.4)
    state: dict[str, Any] = {}
    q, k, v = torch.randn(3, 1, grid.num_tokens, 2, 16)
    pattern = method.pattern(grid)
    call = AttentionCall(pattern, None, None, "torch", 0, 2, state)
    done = method.attend(q, k, v, call)
    shown = method.selection_of(pattern, state)
    assert shown is not None
    flags, _ = shown
    assert flags.shape[:2] == (1, 2) and flags.shape[2] == len(pattern.tile_map()[0])
    # Tiles are of equal size here, so that the share of those shown is what was kept, but for
    # what virtual tokens add.
    assert float(flags.float().mean()) <= float(done.kept) <= float(flags.float().mean()) + 0.1


def test_the_guide_branch_is_counted_in_the_memory_of_a_run() -> None:
    """The cross-attention of every layer, 16-bit, for the branches that are guided."""
    shape, grid = find_shape("wan-1.3b"), TokenGrid(1, 8, 8)
    method = Larger(trained=(4, 4), guide=2)
    bound = Schedule(dense_steps=0, dense_layers=0).bind(4, shape.layers)
    one, half = (
        PlannedRun(method, grid, bound, 4, shape.layers, "torch", guided=share)
        for share in (1.0, 0.5)
    )
    wanted = 2 * grid.num_tokens * shape.heads * shape.head_dim * shape.layers
    assert one.state_size(shape) == wanted == 2 * half.state_size(shape)


@pytest.mark.parametrize("every", [2, 3, 5])
def test_levels_of_quality_are_about_steps_that_refresh_nothing(every: int) -> None:
    """And about pairs of visual tokens; the run as a whole has its refreshes."""
    grid, near = TokenGrid(2, 6, 8, text_after=7), Window(window=(-1, 0.5, 0.5), shift="none")
    bound = Schedule(dense_steps=0, dense_layers=0).bind(10, 2)
    run = PlannedRun(Temporal(over=near, refresh=every), grid, bound, 10, 2, "torch")
    visual = near.pattern(grid, 0).dense()[..., : 6 * 16, : 6 * 16].double().mean().item()
    assert run.kept_visual() == pytest.approx(visual)
    kept = near.pattern(grid, 0).kept
    refreshes = len(range(0, 10, every)) / 10
    assert run.kept_sparse() == pytest.approx(refreshes + (1 - refreshes) * kept)


def test_models_that_guide_by_calls_pay_for_a_guide_in_one_of_them() -> None:
    """Wan makes a forward for each guidance branch, and the first leads."""

    def guided(branches: int) -> float:
        found = diffpatch.plan(
            "wan-1.3b", Larger(trained=(8, 8), guide=2), height=256, width=256, num_frames=5,
            num_inference_steps=4, branches=branches, dense_steps=0, dense_layers=0,
        )  # fmt: skip
        first, second, *_ = found.kept_per_step  # with a guide forward, and without
        return first - second

    assert guided(1) == pytest.approx(2 * guided(2)) and guided(2) > 0


def test_what_a_forward_left_open_is_the_rest_of_the_sequence() -> None:
    assert layout((2, 3, 4, REST, 5), 31) == TokenGrid(2, 3, 4, text_before=2, text_after=5)
    assert layout((2, 3, 4, 5, REST), 31) == TokenGrid(2, 3, 4, text_before=5, text_after=2)
    assert isinstance(layout((2, 3, 4, REST, 8), 31), str)  # more than there is
    assert isinstance(layout((2, 3, 4, 1, 5), 31), str)  # less
