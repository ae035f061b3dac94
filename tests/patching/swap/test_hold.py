"""Held steps: which they are, what they give, whose they are, and how they go."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path as File
from typing import Any
from unittest import mock

import pytest
import torch

import diffpatch
from diffpatch import BadParameter
from diffpatch.patching.run.path import Path
from diffpatch.patching.run.tracker import Tracker
from tests.tiny import Tiny, images, videos, wan

STEPS, LAYERS = 8, 2
ALWAYS = 1e9  # a tolerance within which everything is


@pytest.fixture
def tiny() -> Tiny:
    return wan(layers=LAYERS)


def forwards(tiny: Tiny, **call: Any) -> tuple[torch.Tensor, list[tuple[float, torch.Tensor]]]:
    """The frames, and the timestep and result of every forward that was made."""
    made: list[tuple[float, torch.Tensor]] = []
    cls = type(tiny.pipe.transformer)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = plain(self, *args, **kwargs)
        made.append((float(kwargs["timestep"].flatten()[0]), out[0].clone()))
        return out

    plain, cls.forward = cls.forward, forward
    try:
        return tiny.run(num_inference_steps=STEPS, **call), made
    finally:
        cls.forward = plain


def astray(times: list[float], node: int, step: int) -> float:
    """The sum of the rule, by hand."""
    total = 0.0
    for held in range(node + 1, step + 1):
        total += (times[held + 1] - times[held]) * (times[held] - times[node])
    return total


def test_the_rule_by_hand() -> None:
    times = [0.0, 0.1, 0.2, 0.35, 0.5, 0.8, 1.0]
    path = Path(times)
    given = path.given(0, {})
    path.begin_step(0, 0, given, 1.0)
    assert not path.holding, "nothing is known yet"
    path.made(0, 0, path.given(0, {}), (torch.tensor([3.0, 4.0]),), first=True)
    path.begin_step(1, 0, given, 1.0)
    assert not path.holding, "one result does not tell how fast it changes"
    path.made(1, 0, path.given(0, {}), (torch.tensor([3.0, 5.0]),), first=True)
    rate = 1 / math.sqrt(34) / 0.1
    for step in (2, 3, 4, 5):
        limit = rate * astray(times, 1, step)
        path.begin_step(step, 0, given, limit * 1.0001)
        assert path.holding
        path.begin_step(step, 0, given, limit * 0.9999)
        assert not path.holding
    path.made(4, 0, path.given(0, {}), (torch.tensor([float("nan"), 0.0]),), first=True)
    path.begin_step(5, 0, given, ALWAYS)
    assert not path.holding, "NaN is within no tolerance"


@pytest.mark.parametrize(
    ("timesteps", "times"),
    [
        ([1000.0, 750.0, 250.0, 0.0], [0.0, 0.25, 0.75, 1.0, 1.0]),
        ([800.0], [0.0, 1.0]),
        ([1.0, 0.5], [0.0, 0.5, 1.0]),  # counted to 1
        ([0.5, 0.25], [0.0, 0.5, 1.0]),
        ([1000.0, 1000.0, 0.0], None),  # twice the same
        ([1000.0, 250.0, 500.0], None),  # back
        ([1000.0, 500.0, 600.0, 0.0], None),
        ([1000.0, -1.0], None),  # beyond the end
        ([0.0, 0.0], None),
        ([-5.0, -7.0], None),
    ],
)
def test_times_are_known_where_timesteps_fall_to_the_end(
    timesteps: list[float], times: list[float] | None
) -> None:
    scheduler, tracker = mock.Mock(timesteps=torch.tensor(timesteps)), Tracker()
    tracker.add(scheduler)
    assert tracker.times() is None, "of how many steps is not known"
    tracker.total = len(timesteps)
    assert tracker.times() == (None if times is None else pytest.approx(times))
    scheduler.timesteps = torch.tensor([9999.0, *timesteps])  # those of a run that begins late
    assert tracker.times() == (None if times is None else pytest.approx(times))
    tracker.total += 2
    assert tracker.times() is None
    tracker.total, tracker.evaluations = len(timesteps), 2
    assert tracker.times() is None


def test_a_held_step_gives_the_last_result_of_its_branch(tiny: Tiny) -> None:
    plain, all_made = forwards(tiny)
    assert len(all_made) == 2 * STEPS
    diffpatch.patch(tiny.pipe, "dense", hold=ALWAYS)
    held, made = forwards(tiny)
    assert len(made) == 2 * 2, "two steps tell how fast it changes, the others are held"
    for mine, theirs in zip(made, all_made, strict=False):
        assert torch.equal(mine[1], theirs[1])
    report = diffpatch.report(tiny.pipe)
    assert report.held_steps == STEPS - 2 and report.steps == 2 and report.calls == 4 * LAYERS
    assert f"held      {STEPS - 2} more steps" in str(report)
    assert not torch.equal(held, plain)
    diffpatch.unpatch(tiny.pipe)
    assert torch.equal(tiny.run(num_inference_steps=STEPS), plain)
    assert "forward" not in vars(tiny.pipe.transformer)


def test_a_small_tolerance_holds_nothing(tiny: Tiny) -> None:
    plain = tiny.run(num_inference_steps=STEPS)
    diffpatch.patch(tiny.pipe, "dense", hold=1e-12)
    assert torch.equal(tiny.run(num_inference_steps=STEPS), plain)
    assert diffpatch.report(tiny.pipe).held_steps == 0


@pytest.mark.parametrize("build", [videos.cogvideox, videos.latte, images.pixart])
def test_a_last_step_at_the_end_of_time_moves_and_is_made(build: Any) -> None:
    model = build()
    plain = model.run(num_inference_steps=4)
    assert model.pipe.scheduler.timesteps[-1] == 0
    diffpatch.patch(model.pipe, "dense", hold=1e-12)
    assert torch.equal(model.run(num_inference_steps=4), plain)
    diffpatch.patch(model.pipe, "dense", hold=ALWAYS)
    assert not torch.equal(model.run(num_inference_steps=4), plain)
    assert diffpatch.report(model.pipe).held_steps == 1, "the third"


@pytest.mark.parametrize("tolerance", [0.003, 0.01, 0.03, 0.1])
def test_steps_are_held_by_the_rule(tiny: Tiny, tolerance: float) -> None:
    diffpatch.patch(tiny.pipe, "dense", hold=tolerance)
    _, made = forwards(tiny)
    timesteps = [float(t) for t in tiny.pipe.scheduler.timesteps]
    times = [1 - t / timesteps[0] for t in timesteps] + [1.0]
    firsts = [(timesteps.index(t), out) for t, out in made[::2]]
    steps = [step for step, _ in firsts]
    expected = [0, 1]
    for step in range(2, STEPS):
        (before, old), (last, new) = firsts[len(expected) - 2], firsts[len(expected) - 1]
        rate = float((new - old).norm() / new.norm()) / (times[last] - times[before])
        if rate * astray(times, last, step) > tolerance:
            expected.append(step)
    assert steps == expected


def test_pipelines_may_write_into_what_they_are_given(tiny: Tiny) -> None:
    diffpatch.patch(tiny.pipe, "dense", hold=ALWAYS)
    clean = tiny.run(num_inference_steps=STEPS)
    step = type(tiny.pipe.scheduler).step

    def writing(self: Any, model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = step(self, model_output, *args, **kwargs)
        model_output.fill_(float("nan"))
        return result

    cls = type(tiny.pipe.scheduler)
    cls.step = writing
    try:
        assert torch.equal(tiny.run(num_inference_steps=STEPS, guidance_scale=1.0),
                           tiny.run(num_inference_steps=STEPS, guidance_scale=1.0))  # fmt: skip
        assert tiny.run(num_inference_steps=STEPS).isfinite().all()
    finally:
        cls.step = step
    assert torch.equal(tiny.run(num_inference_steps=STEPS), clean)


def test_a_text_that_is_exchanged_is_not_answered_with_another(tiny: Tiny) -> None:
    diffpatch.patch(tiny.pipe, "dense", hold=ALWAYS)

    def exchange(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        if step == 3:
            tensors["prompt_embeds"] = tensors["prompt_embeds"] + 1
        return tensors

    _, made = forwards(
        tiny, callback_on_step_end=exchange,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"], guidance_scale=1.0,
    )  # fmt: skip
    timesteps = [float(t) for t in tiny.pipe.scheduler.timesteps]
    assert [timesteps.index(t) for t, _ in made] == [0, 1, 4]


def test_runs_of_two_sizes_in_turns_are_what_they_are_alone(tiny: Tiny) -> None:
    other = type(tiny.pipe)(**tiny.pipe.components)
    other.scheduler = copy.deepcopy(tiny.pipe.scheduler)
    other.set_progress_bar_config(disable=True)
    diffpatch.patch(tiny.pipe, "window", window=2, dense_steps=0, dense_layers=0, hold=0.05)
    small = {**tiny.call, "num_inference_steps": 3, "height": 32, "prompt": "another"}
    alone = tiny.run(num_inference_steps=STEPS), other(**small).frames
    inner = []

    def between(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        if step == 2:
            inner.append(other(**small | {"generator": torch.Generator().manual_seed(0)}).frames)
        return tensors

    del alone
    first = other(**small | {"generator": torch.Generator().manual_seed(0)}).frames
    plain = tiny.run(num_inference_steps=STEPS)
    mixed = tiny.run(num_inference_steps=STEPS, callback_on_step_end=between)
    assert torch.equal(mixed, plain)
    assert torch.equal(torch.as_tensor(inner[0]), torch.as_tensor(first))


@torch.no_grad()
def test_a_loop_that_skips_timesteps_is_held_by_those_it_takes(tiny: Tiny) -> None:
    pipe, skipped = tiny.pipe, 5
    diffpatch.patch(pipe, "dense", hold=ALWAYS)
    scheduler, x, text = pipe.scheduler, torch.randn(1, 16, 3, 4, 8), torch.randn(1, 7, 32)
    scheduler.set_timesteps(STEPS)
    times = [1 - float(t / scheduler.timesteps[skipped]) for t in scheduler.timesteps[skipped:]]
    for t in scheduler.timesteps[skipped:]:
        out = pipe.transformer(x, t[None], text, return_dict=False)[0]
        [path] = pipe.transformer._diffpatch.patch.runs.last.paths.values()
        x = scheduler.step(out, t, x, return_dict=False)[0]
    assert path.times == pytest.approx([*times, 1.0])


def test_an_interrupted_run_leaves_nothing_to_the_next(tiny: Tiny) -> None:
    diffpatch.patch(tiny.pipe, "dense", hold=ALWAYS)
    clean = tiny.run(num_inference_steps=STEPS)

    def stop(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return tensors

    with pytest.raises(KeyboardInterrupt):
        tiny.run(num_inference_steps=STEPS, prompt="another", callback_on_step_end=stop)
    assert not diffpatch.patching.api.owners(tiny.pipe)[0].patch.runs.last.paths
    assert torch.equal(tiny.run(num_inference_steps=STEPS), clean)


def test_copies_and_pickles_hold_nothing(tiny: Tiny) -> None:
    model = tiny.pipe.transformer
    diffpatch.patch(tiny.pipe, "dense", hold=ALWAYS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for weight in twin.parameters():
                weight.zero_()
        assert twin.forward.__self__ is twin
    diffpatch.unpatch(tiny.pipe)
    assert model.forward.__self__ is model


def test_a_forward_that_somebody_put_there_before_is_kept(tiny: Tiny) -> None:
    model = tiny.pipe.transformer
    calls = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return type(model).forward(model, *args, **kwargs)

    model.forward = forward
    diffpatch.patch(tiny.pipe, "dense", hold=ALWAYS)
    tiny.run(num_inference_steps=STEPS)
    assert len(calls) == 4
    diffpatch.unpatch(tiny.pipe)
    assert model.forward is forward


@pytest.mark.parametrize("hold", [0, -0.1, float("nan"), float("inf"), True, "0.1"])
def test_tolerances_are_numbers_above_zero(tiny: Tiny, hold: Any) -> None:
    with pytest.raises(BadParameter, match=r"hold=.* must be a (finite )?number"):
        diffpatch.patch(tiny.pipe, "window", hold=hold)


def test_a_bare_transformer_knows_no_steps(tiny: Tiny) -> None:
    with pytest.raises(BadParameter, match="patch the pipeline"):
        diffpatch.patch(tiny.pipe.transformer, "window", hold=0.1)


def test_no_step_is_held_where_nothing_tells_the_steps(
    tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    diffpatch.patch(tiny.pipe, "dense", hold=ALWAYS)
    seen = []
    hook = tiny.pipe.transformer.register_forward_pre_hook(
        lambda *given: seen.append(given), with_kwargs=True
    )
    tiny.run(num_inference_steps=1)
    hook.remove()
    _, args, kwargs = seen[0]
    with torch.no_grad():
        first = tiny.pipe.transformer(*args, **kwargs)[0]
        twice = tiny.pipe.transformer(*args, **{**kwargs, "timestep": kwargs["timestep"] / 2})[0]
    assert not torch.equal(first, twice)
    assert "no step is held: no denoising loop is seen" in caplog.text


def test_schedulers_that_run_the_model_twice_a_step_hold_nothing(
    tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    from diffusers import FlowMatchHeunDiscreteScheduler

    tiny.pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    plain = tiny.run(num_inference_steps=4)
    diffpatch.patch(tiny.pipe, "dense", hold=ALWAYS)
    assert torch.equal(tiny.run(num_inference_steps=4), plain)
    assert "runs the model twice a step" in caplog.text
    assert "no step is held" in str(diffpatch.report(tiny.pipe))


def test_a_transformer_that_is_compiled_as_a_whole_holds_nothing_and_says_so(
    tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    plain = tiny.run(num_inference_steps=STEPS)
    diffpatch.patch(tiny.pipe, "window", window=2, dense_steps=0, dense_layers=0, hold=ALWAYS)
    tiny.pipe.transformer.compile(backend="eager")
    compiled = tiny.run(num_inference_steps=STEPS)
    assert compiled.isfinite().all() and compiled.shape == plain.shape
    assert "compiled as a whole" in caplog.text


def test_blocks_that_are_compiled_are_held(tiny: Tiny) -> None:
    diffpatch.patch(tiny.pipe, "window", window=2, dense_steps=0, dense_layers=0, hold=ALWAYS)
    eager = tiny.run(num_inference_steps=STEPS)
    tiny.pipe.transformer.compile_repeated_blocks(backend="eager")
    _, made = forwards(tiny)
    assert len(made) == 4
    torch.testing.assert_close(tiny.run(num_inference_steps=STEPS), eager)


def test_models_that_are_cut_over_processes_are_refused(tiny: Tiny, tmp_path: File) -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    meeting = f"file://{tmp_path}/meeting"
    distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = tiny.pipe.transformer
        diffpatch.patch(tiny.pipe, "dense", hold=ALWAYS)
        clean = tiny.run(num_inference_steps=STEPS)
        assert clean.isfinite().all(), "processes alone are no reason"
        weight = torch.nn.Parameter(distribute_tensor(model.proj_out.weight, mesh, [Replicate()]))
        model.proj_out.weight = weight
        with pytest.raises(diffpatch.DiffpatchError, match="cut over several processes"):
            tiny.run(num_inference_steps=STEPS)
    finally:
        distributed.destroy_process_group()
