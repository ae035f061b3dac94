"""Small decisions of targets, plans and tuning, each between two that differ."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pytest
import torch

import diffpatch
from diffpatch import BadParameter, Dense, Dynamic, Neighborhood, Temporal, TokenGrid, Window
from diffpatch.patching.options.schedule import Schedule
from diffpatch.patterns.pattern import BlockPattern
from diffpatch.pipelines.running.sampling import Sample
from diffpatch.pipelines.shapes.find import find_shape
from diffpatch.planning.run import PlannedRun, _visited, grid_of
from diffpatch.targets.choice import choose_for
from diffpatch.targets.front import fastest, measured_points, pareto
from diffpatch.targets.settings import Measured, Settings
from diffpatch.targets.target import Target
from diffpatch.tuning import front as fronts
from tests.targets.test_settings import made

tuned = importlib.import_module("diffpatch.tuning.tuned")  # not the function of that name
GRID = TokenGrid(2, 8, 12, text_before=3)


def one_head(**rules: list[tuple[float, float]]) -> Settings:
    data = made()
    data["measured_on"] |= {"transformers": {"transformer": ("A", 1, 1)}, "dense_steps": 0.0}
    data["curves"] = {"transformer.0.0": rules}
    return Settings.model_validate(data)


def test_of_two_rules_the_nearer_or_the_cheaper_is_taken() -> None:
    """Within a kept fraction the one of less error, within an error the one that keeps less."""
    settings = one_head(virtual=[(0.15, 0.5), (0.3, 0.4)], drop=[(0.15, 0.45), (0.32, 0.1)])
    chosen = choose_for(settings, Target.parse("kept 0.35"))
    assert chosen.rest == "drop" and chosen.error == pytest.approx(0.1)
    settings = one_head(virtual=[(0.15, 0.3), (0.5, 0.05)], drop=[(0.2, 0.29), (0.5, 0.1)])
    assert choose_for(settings, Target.parse("error 30%")).rest == "virtual"
    assert choose_for(settings, Target.parse("error 29.5%")).kept == pytest.approx(0.2)


def front_of(*ways: tuple[float, float, float]) -> list[Measured]:
    """One prompt in ways of (sparse, time of dense, PSNR)."""
    return [
        Measured(prompt="p", sparse=sparse, dense_steps=0.1, cache=None, kept=sparse, calls=1.0,
                 psnr=psnr, seconds=10 * time, dense_seconds=10.0)
        for sparse, time, psnr in ways
    ]  # fmt: skip


def test_what_is_slower_than_dense_meets_no_quality() -> None:
    slow = front_of((0.5, 1.5, 49.0))
    with pytest.raises(BadParameter, match="nothing that was measured is faster than dense"):
        fastest(slow, 30.0, "30 dB")
    found = fastest(front_of((0.5, 0.9, 49.0)), 30.0, "30 dB")
    assert found.time == pytest.approx(0.9)


def test_a_slower_point_of_equal_quality_is_not_on_the_front() -> None:
    points = measured_points(front_of((0.25, 0.5, 30.0), (0.5, 0.7, 30.0), (0.6, 0.8, 31.0)))
    assert [point.time for point in pareto(points)] == pytest.approx([0.5, 0.8])


@pytest.fixture
def clips(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Clips of a front that take no time; their prompts in the order of rendering."""
    seen: list[str] = []

    def sample(self: Any, prompt: str, chosen: Any, own: Any = None) -> Any:
        seen.append(prompt)
        frames = torch.full((2, 3, 4, 4), 0.5 if chosen is None else 0.4)
        return fronts._Clip(frames, 10, 0.5, 2.0)

    monkeypatch.setattr(fronts, "transformers", lambda *_: [])
    monkeypatch.setattr(fronts._Job, "_sample", sample)
    monkeypatch.setattr(Settings, "check_model", lambda *_: None)
    monkeypatch.setattr(fronts, "chosen_for", lambda _, applied: applied)
    return seen


def test_a_prompt_given_twice_is_rendered_once(clips: list[str]) -> None:
    settings = Settings.model_validate(made())
    found = fronts.measure_front(
        None, settings, ["a", "b", "a"], sparse=(0.5,), dense_steps=(0.2,), caches=(), holds=()
    )
    floor = ["a"]  # once, with the first prompt
    assert clips == ["a", *floor, "a", "b", "b"] and [run.prompt for run in found.front] == [
        "a",
        "b",
    ]


def test_checks_of_other_targets_stay(clips: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.model_validate(made())
    chosen = choose_for(settings, Target.parse("kept 0.4"))
    for target, prompt in (("kept 0.4", "x"), ("error 30%", "y"), ("kept 0.4", "z")):
        monkeypatch.setattr(fronts, "choose_for", lambda *_: chosen)
        settings = fronts.check_prompts(None, settings, target, [prompt])
    assert {(one.target, one.prompt) for one in settings.checked} == {
        (str(Target.parse("error 30%")), "y"), (str(Target.parse("kept 0.4")), "z")
    }  # fmt: skip


def test_seconds_are_those_of_the_denoising_and_on_a_cpu_its_share() -> None:
    clip = Sample(torch.zeros(1), 9.0, [1.0, 3.0], None, cpu_share=0.5)
    assert (fronts._seconds(clip, True), fronts._seconds(clip, False)) == (2.0, 4.0)
    plain = Sample(torch.zeros(1), 9.0, [], None, cpu_share=0.5)
    assert fronts._seconds(plain, False) == 9.0


def test_a_model_is_tuned_again_for_another_seed_dtype_or_call(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seeds: list[tuple[str, int]] = []
    model: Any = torch.nn.Linear(2, 2)
    model.dtype = torch.float32
    settings = Settings.model_validate(made())

    def tune(*_: Any, seed: int, path: Path, **__: Any) -> Settings:
        seeds.append(("tune", seed))
        settings.save(path)
        return settings

    def measure(*_: Any, seed: int, path: Path, **__: Any) -> Settings:
        seeds.append(("front", seed))
        settings.save(path)
        return settings

    monkeypatch.setattr(tuned, "transformers", lambda *_: [("transformer", model, None)])
    monkeypatch.setattr(tuned, "tune", tune)
    monkeypatch.setattr(tuned, "measure_front", measure)

    def run(**changes: Any) -> None:
        diffpatch.tuned(object(), ["a"], folder=tmp_path, **{"seed": 5} | changes)

    run()
    assert seeds == [("tune", 5), ("front", 5)] and len(list(tmp_path.iterdir())) == 1
    run()
    assert len(seeds) == 2, "what is known is read"
    run(seed=6)
    run(call={"height": 8})
    run(caches=(0.1,))
    model.dtype = torch.bfloat16
    run()
    assert len(seeds) == 10 and seeds[2:4] == [("tune", 6), ("front", 6)]
    assert len(list(tmp_path.iterdir())) == 5, "a file each, and no curves beside it"


def planned(
    method: diffpatch.Method, layers: int = 1, steps: int = 1, grid: TokenGrid = GRID, **dense: Any
) -> PlannedRun:
    bound = Schedule(**dense).bind(steps, layers)
    return PlannedRun(method, grid, bound, steps, layers, "torch")


def test_what_is_visited_is_a_mean_over_calls_and_heads() -> None:
    grid = TokenGrid(2, 32, 40, text_after=9)
    method = Neighborhood(layers=(0.2, 0.9), stride=1)
    run = planned(method, layers=3, grid=grid)
    few, many = (_visited(method.pattern(grid, n).blocks) for n in range(2))
    assert many > few + 0.1 and run.visited() == pytest.approx((2 * few + many) / 3)
    pattern = Neighborhood(heads=(0.2, 0.9), stride=1).pattern(grid)
    heads = torch.tensor([0, 0, 1], dtype=torch.int32)
    blocks = dataclasses.replace(pattern.blocks, head_pattern=heads)
    one, other = (
        _visited(dataclasses.replace(pattern.blocks, head_pattern=heads[n : n + 1])) for n in (0, 2)
    )
    assert one != other and _visited(blocks) == pytest.approx((2 * one + other) / 3)


def test_what_is_computed_is_a_mean_over_sparse_calls() -> None:
    method = Window(window=(1, 4, 4))
    found = [planned(method, steps=4, dense_steps=n).computed() for n in range(4)]
    assert found[0] is not None and found == pytest.approx([found[0]] * 4)
    assert planned(method, steps=4, dense_steps=4).computed() is None


def test_the_age_of_what_is_remembered_counts_from_the_first_sparse_step() -> None:
    method = Temporal(over=Window(window=(1, 4, 4)), refresh=3)
    kept = planned(method, steps=8, dense_steps=2).kept_table()[:, 0]
    whole = (kept == 1).tolist()
    assert whole == [True, True, True, False, False, True, False, False]


class Alternating(Dynamic):
    """Larger tiles in every other layer."""

    name = "alternating"

    def variant(self, layer: int, step: int) -> Hashable:
        return layer % 2

    def pattern(self, grid: Any, variant: Hashable = None) -> BlockPattern:
        return Dense(tile=32 if variant else 16).pattern(grid)


def test_what_is_held_is_summed_over_layers_and_scratch_is_the_most_of_one() -> None:
    method, shape = Alternating(tile=16, strip=16, pool=8), find_shape("wan-1.3b")
    run = planned(method, layers=4)
    size = shape.heads, shape.head_dim
    patterns = [method.pattern(GRID, n) for n in range(2)]
    scratch = [method.scratch_size(pattern, shape.heads) for pattern in patterns]
    held = [method.state_size(pattern, *size) for pattern in patterns]
    assert len(set(scratch)) == len(set(held)) == 2
    assert run.scratch_size(shape) == max(scratch)
    assert run.state_size(shape) == 2 * sum(held)


def test_text_of_a_plan_stands_where_the_model_has_it() -> None:
    shape = find_shape("flux")
    for before in (True, False):
        there = dataclasses.replace(shape, text_before=before)
        grid: Any = grid_of(there, (1, 64, 64), 7)
        assert (grid.text_before, grid.text_after) == ((7, 0) if before else (0, 7))


def test_units_of_a_front_are_told_apart_by_all_that_is_applied() -> None:
    ways = fronts._ways((0.25, 0.5), (0.1, 0.2), (0.05,), (0.1,))
    assert len({json.dumps(vars(way)) for way in ways}) == len(ways) == 14


def test_the_time_of_a_point_is_a_mean_over_prompts_that_differ() -> None:
    runs = [run for time in (0.5, 0.72) for run in front_of((0.25, time, 30.0 + 10 * time))]
    runs = [run.model_copy(update={"prompt": str(n)}) for n, run in enumerate(runs)]
    [point] = measured_points(runs)
    assert point.time == pytest.approx(0.6) and point.psnr == pytest.approx(36.1)
