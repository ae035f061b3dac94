"""Who calls: loops, generators, tasks and callbacks, each with the run of its own scheduler."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import logging
import threading
import weakref
from collections.abc import Generator
from typing import Any

import pytest
import torch

import diffpatch
from diffpatch import BadParameter, DiffpatchError
from diffpatch.patching.run import callers
from diffpatch.patching.run.callers import TRACKER
from tests.patching.run.test_runs import (
    LATENT,
    LOCAL,
    REQUESTS,
    TEMPORAL,
    Turns,
    alone,
    clone,
    together,
)
from tests.tiny import Tiny, wan


class Standing:
    """A scheduler behind a stand-in, as servers have it."""

    def __init__(self, scheduler: Any) -> None:
        self.inner = scheduler

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)


def test_a_scheduler_behind_a_stand_in_is_found() -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=1)
    expected = tiny.run()
    one = clone(tiny)
    one.pipe.__dict__["scheduler"] = Standing(one.pipe.scheduler)
    assert torch.equal(one.run(), expected)
    assert diffpatch.report(one.pipe).kept_per_step[0] == 1


def loop(
    pipe: Any, scheduler: Any, shape: tuple[int, int], steps: int, seed: int = 0
) -> Generator[torch.Tensor, None, None]:
    """A denoising loop of somebody's own, with two branches; gives its latents after every step."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 16, 3, *shape, generator=random)
    texts = torch.randn(2, 1, 8, 32, generator=random)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        with torch.no_grad():
            a, b = (pipe.transformer(x, t[None], text, return_dict=False)[0] for text in texts)
        x = scheduler.step(b + 5 * (a - b), t, x, return_dict=False)[0]
        yield x


LOOPS: list[tuple[tuple[int, int], int]] = [((4, 8), 5), ((8, 4), 4), ((4, 8), 6)]


def loops_alone(method: Any) -> list[torch.Tensor]:
    out = []
    for shape, steps in LOOPS:
        tiny = wan()
        diffpatch.patch(tiny.pipe, method, dense_steps=2)
        out.append(list(loop(tiny.pipe, tiny.pipe.scheduler, shape, steps))[-1])
    return out


@pytest.mark.parametrize("method", [LOCAL, TEMPORAL], ids=["window", "temporal"])
def test_generators_of_one_thread_take_turns(method: Any) -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, method, dense_steps=2)
    first = tiny.pipe.scheduler  # the others are copies of one that runs
    running = [loop(tiny.pipe, first, *LOOPS[0])]
    out: list[Any] = [next(running[0])]
    for one in LOOPS[1:]:
        running.append(loop(tiny.pipe, copy.deepcopy(first), *one))
        out.append(None)
    left = list(range(len(running)))
    while left:
        for i in list(left):
            with contextlib.suppress(StopIteration):
                out[i] = next(running[i])
                continue
            left.remove(i)
    for found, expected in zip(out, loops_alone(method), strict=True):
        assert torch.equal(found, expected)


def test_tasks_of_an_event_loop_take_turns() -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, TEMPORAL, dense_steps=2)

    async def serve(shape: tuple[int, int], steps: int) -> torch.Tensor:
        scheduler = type(tiny.pipe.scheduler).from_config(tiny.pipe.scheduler.config)
        latents = []
        for x in loop(tiny.pipe, scheduler, shape, steps):
            latents.append(x)
            await asyncio.sleep(0)
        return latents[-1]

    async def main() -> list[torch.Tensor]:
        return await asyncio.gather(*(serve(*one) for one in LOOPS))

    for found, expected in zip(asyncio.run(main()), loops_alone(TEMPORAL), strict=True):
        assert torch.equal(found, expected)


def test_a_pipeline_run_from_the_callback_of_another() -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, TEMPORAL, dense_steps=1)
    inner: list[torch.Tensor] = []

    def callback(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 1:
            inner.append(clone(tiny).run(**REQUESTS[1]))
        return {}

    outer = tiny.run(callback_on_step_end=callback, **REQUESTS[0])
    expected = alone(TEMPORAL, REQUESTS[:2], dense_steps=1)
    assert torch.equal(outer, expected[0]) and torch.equal(inner[0], expected[1])


def test_one_function_that_steps_several_schedulers_is_not_guessed_at(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def drive(tiny: Tiny) -> None:
        a, b = (copy.deepcopy(tiny.pipe.scheduler) for _ in range(2))
        a.set_timesteps(3)
        b.set_timesteps(3)
        for t in a.timesteps[:2]:
            for one in (a, b):
                x = torch.zeros(1, 16, 3, 4, 8)
                with torch.no_grad():
                    out = tiny.pipe.transformer(x, t[None], torch.zeros(1, 8, 32))[0]
                one.step(out, t, x)

    tiny = wan()
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=1)
    with pytest.raises(BadParameter, match="one function drives several schedulers"):
        drive(tiny)
    diffpatch.patch(tiny.pipe, TEMPORAL, dense_steps=0)
    caplog.set_level(logging.WARNING, "diffpatch")
    drive(tiny)
    report = diffpatch.report(tiny.pipe)
    assert report.kept == 1 and "takes every forward for the first" in report.notes[0]
    assert str(report).count("note ") == 1
    assert caplog.text.count("drives several schedulers") == 1
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=0)  # nothing depends on steps
    drive(tiny)
    assert not diffpatch.report(tiny.pipe).notes


def by_hand(pipe: Any, given: Any, forwards: int = 1) -> torch.Tensor:
    """A loop that takes its steps without the scheduler.

    Args:
        pipe: the pipeline.
        given: what the transformer gets of a timestep, 0-d.
        forwards: how many it makes in a step.
    """
    scheduler = copy.deepcopy(pipe.scheduler)
    x = torch.randn(1, 16, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(6)
    for t, now, then in zip(
        scheduler.timesteps, scheduler.sigmas[:-1], scheduler.sigmas[1:], strict=True
    ):
        with torch.no_grad():
            outs = [
                pipe.transformer(x, given(t), torch.zeros(1, 8, 32), return_dict=False)[0]
                for _ in range(forwards)
            ]
        x = x + (then - now) * outs[-1]
    return x


@pytest.mark.parametrize("forwards", [1, 2, 6])
def test_steps_that_a_loop_takes_by_hand_are_counted(forwards: int) -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, TEMPORAL, dense_steps=1, dense_last_steps=1)
    by_hand(tiny.pipe, lambda t: t[None], forwards)
    kept = diffpatch.report(tiny.pipe).kept_per_step
    assert [k == 1 for k in kept] == [True, True, False, False, True, True]
    tiny.run(num_inference_steps=3)
    assert diffpatch.report(tiny.pipe).steps == 3


def test_steps_taken_by_hand_that_cannot_be_counted_are_refused() -> None:
    """Timesteps that are no views of the scheduler's: each is one, after a few forwards."""
    tiny = wan()
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=1)
    with pytest.raises(BadParameter, match=r"never calls scheduler\.step: give the transformer"):
        by_hand(tiny.pipe, lambda t: t[None] * 1)
    diffpatch.patch(tiny.pipe, TEMPORAL, dense_steps=0)
    by_hand(tiny.pipe, lambda t: t[None] * 1)
    assert "never calls scheduler.step" in diffpatch.report(tiny.pipe).notes[0]
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=0)
    by_hand(tiny.pipe, lambda t: t[None] * 1)
    assert diffpatch.report(tiny.pipe).notes == () and diffpatch.report(tiny.pipe).kept < 1


def test_many_forwards_at_one_timestep_are_one_step() -> None:
    """As pipelines make that denoise large pictures by windows, whatever they do to the number."""
    tiny = wan()
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=1)
    scheduler, text = tiny.pipe.scheduler, torch.zeros(1, 8, 32)

    def windows() -> None:
        x = torch.zeros(1, 16, 3, 4, 8)
        scheduler.set_timesteps(3)
        for t in scheduler.timesteps:
            with torch.no_grad():
                outs = [tiny.pipe.transformer(x, t[None] * 1, text)[0] for _ in range(7)]
            x = scheduler.step(sum(outs), t, x, return_dict=False)[0]

    windows()
    assert [k == 1 for k in diffpatch.report(tiny.pipe).kept_per_step] == [True, False, False]


def test_threads_that_share_a_scheduler_are_refused() -> None:
    tiny = wan()
    tiny.run()
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=1)
    both = threading.Barrier(2, timeout=240)
    turns = Turns(2)

    def run(i: int) -> torch.Tensor:
        both.wait()
        return turns.run(tiny, i, REQUESTS[0])

    out = together([lambda i=i: run(i) for i in range(2)])
    refused = [x for x in out if isinstance(x, DiffpatchError)]
    assert refused and "share one scheduler" in str(refused[0])


def test_a_step_may_be_of_forwards_at_two_timesteps() -> None:
    """As loops make that look ahead and then call step."""
    tiny = wan()
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=1)
    scheduler, text = tiny.pipe.scheduler, torch.zeros(1, 8, 32)

    def look_ahead() -> None:
        x = torch.zeros(1, 16, 3, 4, 8)
        scheduler.set_timesteps(3)
        for t in scheduler.timesteps:
            with torch.no_grad():
                now, then = (tiny.pipe.transformer(x, t[None] * f, text)[0] for f in (1.0, 0.9))
            x = scheduler.step(now + then, t, x, return_dict=False)[0]

    look_ahead()
    assert [k == 1 for k in diffpatch.report(tiny.pipe).kept_per_step] == [True, False, False]


@pytest.mark.parametrize("how", ["another pipeline, this thread", "this pipeline, another thread"])
def test_what_shares_a_scheduler_in_the_middle_of_a_run_is_refused(how: str) -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=1)
    other = Tiny(copy.copy(tiny.pipe), tiny.call) if "another pipeline" in how else tiny
    inner: list[int] = []

    def stop(*_: Any) -> dict[str, Any]:
        raise RuntimeError("stop")

    def leave() -> None:
        with contextlib.suppress(RuntimeError):
            other.run(**LATENT, callback_on_step_end=stop)

    def callback(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 1:
            inner.append(step)
            if "another thread" in how:
                together([leave])
            else:
                leave()
        return {}

    with pytest.raises(DiffpatchError, match="two runs share one scheduler"):
        tiny.run(**LATENT | {"num_inference_steps": 4}, callback_on_step_end=callback)
    assert inner == [1]


def test_looking_at_callers_keeps_nothing_alive() -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=0)
    scheduler = tiny.pipe.scheduler
    scheduler.set_timesteps(2)
    with torch.no_grad():
        x = torch.zeros(1, 16, 3, 4, 8)
        tiny.pipe.transformer(x, scheduler.timesteps[:1], torch.zeros(1, 8, 32))
    assert diffpatch.report(tiny.pipe).calls == 2
    gone = weakref.ref(tiny.pipe.transformer.blocks[0].attn1.to_q.weight)
    diffpatch.unpatch(tiny.pipe)
    del tiny
    gc.collect()
    assert gone() is None


def test_calls_are_counted_by_module_however_deep() -> None:
    class Asks(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module | None) -> None:
            super().__init__()
            self.inner = inner

        def forward(self) -> tuple[int, int, int]:
            if self.inner is not None:
                found: tuple[int, int, int] = self.inner()
                return found
            return callers.calls_of([self]), callers.calls_of([outer]), callers.calls_of([])

    inner = Asks(None)
    outer = Asks(Asks(inner))
    assert outer() == (1, 1, 0) and inner() == (1, 0, 0)
    assert callers.calls_of([outer, inner]) == 0


def test_a_pipeline_in_hand_has_to_agree_with_whoever_is_outside() -> None:
    one, other = wan().pipe, wan().pipe

    def running(scheduler: Any) -> bool:
        return scheduler is one.scheduler or scheduler is other.scheduler

    def inner(pipe: Any) -> callers.Caller | None:
        return callers.find(running)

    def outer(scheduler: Any) -> callers.Caller | None:
        return inner(one)

    def around(scheduler: Any) -> callers.Caller | None:
        def within(pipe: Any) -> callers.Caller | None:
            return callers.find(running)

        return within(one)

    agreed = outer(one.scheduler)
    assert agreed is not None and agreed.pipeline is one and not agreed.is_call
    assert agreed.schedulers == [one.scheduler]
    torn = outer(other.scheduler)
    assert torn is not None and torn.pipeline is None and not torn.is_call
    assert torn.schedulers == [one.scheduler, other.scheduler] and torn.values == {}
    own = around(other.scheduler)  # the loop is that of the function around
    assert own is not None and own.pipeline is None and own.schedulers == [other.scheduler]


def test_a_copy_of_a_scheduler_that_is_made_beside_a_run_is_nobodys() -> None:
    tiny = wan()
    plain = type(tiny.pipe.scheduler)
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=0)
    tracker = vars(tiny.pipe.scheduler)[TRACKER]
    for _ in range(2):  # before a run, and after one
        duplicate = copy.deepcopy(tiny.pipe.scheduler)
        assert type(duplicate) is plain and TRACKER not in vars(duplicate)
        assert [*tracker.schedulers.values()] == [tiny.pipe.scheduler] and not tracker._copied
        tiny.run()
