"""Dense steps and layers, and knowing where in the run a forward is."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import diffusers
import pytest
import torch

import diffpatch
from diffpatch.errors import BadParameter
from diffpatch.patching.options.schedule import Schedule
from diffpatch.patching.run.tracker import Tracker, track
from tests.tiny import wan


def dense_steps(schedule: Schedule, total: int, evaluations: int = 1) -> list[int]:
    bound = schedule.bind(total, 4, evaluations)
    return [step for step in range(total) if bound.reason(step, 3)]


@pytest.mark.parametrize(
    ("schedule", "total", "expected"),
    [
        (Schedule(), 4, []),
        (Schedule(dense_steps=2), 4, [0, 1]),
        (Schedule(dense_steps=0.25), 8, [0, 1]),
        (Schedule(dense_steps=0.24), 50, list(range(12))),
        (Schedule(dense_steps=0.34), 35, list(range(12))),  # Cosmos, as published
        (Schedule(dense_steps=0.29), 100, list(range(29))),
        (Schedule(dense_last_steps=0.29), 100, list(range(71, 100))),
        (Schedule(dense_last_steps=1), 4, [3]),
        (Schedule(dense_steps=1, dense_last_steps=0.5), 4, [0, 2, 3]),
        (Schedule(dense_steps=1.0), 3, [0, 1, 2]),
    ],
    ids=str,
)
def test_counts_and_fractions(schedule: Schedule, total: int, expected: list[int]) -> None:
    assert dense_steps(schedule, total) == expected


def test_counts_are_denoising_steps_for_two_stage_solvers() -> None:
    assert dense_steps(Schedule(dense_steps=2), 9, evaluations=2) == [0, 1, 2, 3]
    assert dense_steps(Schedule(dense_last_steps=2), 9, evaluations=2) == [6, 7, 8]
    assert dense_steps(Schedule(dense_steps=5), 9, evaluations=2) == list(range(9))


def test_dense_layers_by_count_fraction_and_number() -> None:
    for layers, expected in ((1, {0}), (0.5, {0, 1}), ([1, 3], {1, 3})):
        bound = Schedule(dense_layers=layers).bind(10, 4)
        assert {i for i in range(4) if bound.reason(5, i)} == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule(dense_steps=-1), "dense_steps=-1"),
        (lambda: Schedule(dense_steps=1.5), "dense_steps=1.5"),
        (lambda: Schedule(dense_steps=9).bind(8, 4), "only 8 steps"),
        (lambda: Schedule(dense_layers=5).bind(8, 4), "only 4 layers"),
        (lambda: Schedule(dense_layers=[4]).bind(8, 4), "beyond the last, 3"),
        (lambda: Schedule(dense_steps=1).bind(None, 4), "patch the pipeline"),
    ],
)
def test_impossible_schedules_say_what_to_do(make: Any, message: str) -> None:
    with pytest.raises(BadParameter, match=message):
        make()


def loop(scheduler: Any, tracker: Tracker, steps: int, branches: int = 2, begin: int = 0) -> Any:
    """A denoising loop like a pipeline's; returns the (step, branch) of every forward."""
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(begin)
    seen, x = [], torch.zeros(1, 4)
    for t in scheduler.timesteps[begin:]:
        for _ in range(branches):
            tracker.on_forward()
            seen.append((tracker.step, tracker.branch))
        x = scheduler.step(torch.zeros_like(x), t, x, return_dict=False)[0]
    return seen


def test_steps_and_branches_are_counted() -> None:
    scheduler, tracker = diffusers.FlowMatchEulerDiscreteScheduler(), Tracker()
    track(scheduler, tracker)
    expected = [(s, b) for s in range(3) for b in range(2)]
    assert loop(scheduler, tracker, 3) == expected
    assert tracker.total == 3 and tracker.run == 1
    assert loop(scheduler, tracker, 3) == expected  # a second run starts over
    assert tracker.run == 2


def test_image_to_image_counts_only_the_steps_it_takes() -> None:
    scheduler, tracker = diffusers.FlowMatchEulerDiscreteScheduler(), Tracker()
    track(scheduler, tracker)
    assert len(loop(scheduler, tracker, 10, branches=1, begin=6)) == 4
    assert tracker.total == 4


def test_two_stage_solvers_count_model_evaluations() -> None:
    scheduler, tracker = diffusers.FlowMatchHeunDiscreteScheduler(), Tracker()
    track(scheduler, tracker)
    seen = loop(scheduler, tracker, 4, branches=1)
    assert [s for s, _ in seen] == list(range(7))
    assert tracker.total == 7 and tracker.evaluations == 2


def test_a_tracked_scheduler_looks_and_saves_like_the_original(tmp_path: Any) -> None:
    scheduler: Any = diffusers.UniPCMultistepScheduler()
    original, config = type(scheduler), dict(scheduler.config)
    undo = track(scheduler, Tracker())
    assert type(scheduler).__name__ == original.__name__ and isinstance(scheduler, original)
    assert dict(scheduler.config) == config
    scheduler.save_pretrained(tmp_path)
    assert type(original.from_pretrained(tmp_path)) is original
    assert type(pickle.loads(pickle.dumps(scheduler))) is original
    undo()
    assert type(scheduler) is original and "_diffpatch_tracker" not in vars(scheduler)


def test_deep_copies_made_during_a_run_report_to_the_same_tracker() -> None:
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler()
    tracker = Tracker()
    track(scheduler, tracker)
    scheduler.set_timesteps(2)
    loop(copy.deepcopy(scheduler), tracker, 2)
    assert (tracker.run, tracker.step, tracker.branch) == (2, 1, 1)


def test_copies_made_between_runs_belong_to_somebody_else() -> None:
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler()
    tracker = Tracker()
    original = type(scheduler)
    track(scheduler, tracker)
    assert type(copy.deepcopy(scheduler)) is original
    loop(scheduler, tracker, 2)
    assert type(copy.deepcopy(scheduler)) is original


def test_pipelines_that_cut_their_timesteps_silently_are_believed() -> None:
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler()
    tracker = Tracker()
    track(scheduler, tracker)
    scheduler.set_timesteps(8)
    tracker.on_forward(announced=4)
    assert tracker.total == 4


def test_forwards_after_the_end_of_a_run_are_runs_of_their_own() -> None:
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler()
    tracker = Tracker()
    track(scheduler, tracker)
    loop(scheduler, tracker, 2)
    runs = []
    for _ in range(3):
        tracker.on_forward()
        runs.append((tracker.run, tracker.step, tracker.branch))
    assert runs == [(2, 0, 0), (3, 0, 0), (4, 0, 0)]


@pytest.mark.parametrize("kind", ["FlowMatchEulerDiscreteScheduler", "DDIMScheduler"])
def test_steps_after_forwards_of_an_unknown_model_count(kind: str) -> None:
    scheduler: Any = getattr(diffusers, kind)()
    tracker, x = Tracker(), torch.zeros(1, 4)
    track(scheduler, tracker)
    scheduler.set_timesteps(4)
    for step, t in enumerate(scheduler.timesteps):
        if step != 1 and step > 0:
            tracker.on_forward()
            assert (tracker.step, tracker.branch, tracker.total) == (step, 0, 4)
        scheduler.step(x, t, x)
    assert not tracker.running


def test_a_bare_transformer_chooses_in_every_call() -> None:
    transformer = wan().pipe.transformer
    with pytest.raises(BadParameter, match=r"knows no steps.* with refresh=1"):
        diffpatch.patch(transformer, "dynamic")
    with diffpatch.patched(transformer, "dynamic", refresh=1):
        pass


@pytest.mark.parametrize(("first", "last"), [(None, 2), (0, 0.5), (3, 0), (0.25, 1)])
def test_a_bare_transformer_has_no_first_or_last_steps(
    first: int | float | None, last: int | float
) -> None:
    model = wan().pipe.transformer
    message = f"dense_steps={first or 0}, dense_last_steps={last} need to know the denoising steps"
    with pytest.raises(BadParameter, match=re.escape(message)):
        diffpatch.patch(model, "window", dense_steps=first, dense_last_steps=last)
    assert not diffpatch.is_patched(model)
    diffpatch.patch(model, "window", dense_steps=0)


def test_a_layer_is_sparse_in_some_step_or_in_none() -> None:
    for total in range(4, 7):
        bound = Schedule(dense_steps=2, dense_last_steps=2, dense_layers=[1]).bind(total, 3)
        sparse = [not bound.reason(step, 0) for step in range(total)]
        assert bound.ever_sparse(0, total) == any(sparse) == (total > 4)
        assert not bound.ever_sparse(1, total)
    first = Schedule(dense_steps=3, dense_layers=0).bind(5, 3)
    assert [first.ever_sparse(0, total) for total in (2, 3, 4, None)] == [False, False, True, True]
