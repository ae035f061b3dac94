"""Runs that end early, begin late or are changed in the middle."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from tqdm.auto import tqdm

import diffpatch
from diffpatch import Temporal, Window
from tests.patching.run.test_callers import loop
from tests.patching.run.test_runs import LATENT, LOCAL, TEMPORAL, clone, owner
from tests.tiny import Tiny, wan

FOUR: dict[str, Any] = LATENT | {"num_inference_steps": 4}


def held(tiny: Tiny) -> int:
    """Bytes of state."""
    return int(owner(tiny).patch.state_bytes())


def dense(tiny: Tiny) -> str:
    """The steps of the last run: d where they were dense, s where they were not."""
    kept = diffpatch.report(tiny.pipe).kept_per_step
    return "".join("d" if k == 1 else "s" for k in kept)


@contextlib.contextmanager
def stopping(tiny: Tiny, how: str) -> Iterator[dict[str, Any]]:
    """Arguments of a call that is left in its second step."""
    error = KeyboardInterrupt if "ctrl-c" in how else RuntimeError
    calls = 0

    def callback(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if how == "interrupt" and step == 1:
            pipe._interrupt = True
        elif "callback" in how and step == 1:
            raise error("stop")
        return {}

    def hook(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if "layer" in how and calls == 4:  # two branches a step
            raise error("stop")

    handle = tiny.pipe.transformer.blocks[1].register_forward_pre_hook(hook)
    try:
        with pytest.raises(error) if how != "interrupt" else contextlib.nullcontext():
            yield FOUR | {"callback_on_step_end": callback}
    finally:
        handle.remove()


WAYS = ["callback", "callback, ctrl-c", "interrupt", "layer", "layer, ctrl-c"]


@pytest.mark.parametrize("how", WAYS)
def test_state_is_freed_when_a_pipeline_is_left(how: str) -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, TEMPORAL, dense_steps=0)
    expected = tiny.run(**FOUR)
    with stopping(tiny, how) as call:
        tiny.run(**call)
    assert held(tiny) == 0 and diffpatch.report(tiny.pipe).state_bytes > 0
    assert len(diffpatch.report(tiny.pipe).kept_per_step) == 2
    assert torch.equal(tiny.run(**FOUR), expected)
    other = clone(tiny)  # which has not run before
    with stopping(other, how) as call:
        other.run(**call)
    assert held(tiny) == 0


def test_a_patch_from_a_callback_is_let_go_with_the_one_before_it() -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, TEMPORAL, dense_steps=0)
    first = owner(tiny).patch

    def again(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 0:
            diffpatch.patch(pipe, TEMPORAL, dense_steps=0)
        elif step == 2:
            raise RuntimeError("stop")
        return {}

    with pytest.raises(RuntimeError, match="stop"):
        tiny.run(**FOUR, callback_on_step_end=again)
    assert held(tiny) == first.state_bytes() == 0 and owner(tiny).patch is not first


@pytest.mark.parametrize("bar", [False, True])
def test_a_loop_of_somebodys_own_is_left_with_its_bar_or_its_function(bar: bool) -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, TEMPORAL, dense_steps=0)

    def denoise(scheduler: Any) -> None:
        steps = loop(tiny.pipe, scheduler, (4, 8), 4)
        with contextlib.closing(steps):
            for _ in range(2):
                next(steps)

    def with_a_bar(scheduler: Any) -> None:
        x, text = torch.randn(1, 16, 3, 4, 8), torch.zeros(1, 8, 32)
        scheduler.set_timesteps(4)
        with tqdm(total=4, disable=True) as progress:
            for t in scheduler.timesteps[:2]:
                with torch.no_grad():
                    out = tiny.pipe.transformer(x, t[None], text, return_dict=False)[0]
                x = scheduler.step(out, t, x, return_dict=False)[0]
                progress.update()
            assert held(tiny) > 0

    scheduler = copy.deepcopy(tiny.pipe.scheduler)
    (with_a_bar if bar else denoise)(scheduler)
    assert held(tiny) == 0
    tiny.run(**FOUR)  # of another scheduler
    assert held(tiny) == 0


class Steps:
    """One denoising loop whose steps anybody may take, one at a time; its scheduler is kept."""

    def __init__(self, tiny: Tiny) -> None:
        self.tiny, self.scheduler = tiny, copy.deepcopy(tiny.pipe.scheduler)
        self.x = torch.randn(1, 16, 3, 4, 8, generator=torch.Generator().manual_seed(0))
        self.text = torch.zeros(1, 8, 32)
        self.scheduler.set_timesteps(6)

    def take(self, i: int) -> None:
        """Step number i."""
        t = self.scheduler.timesteps[i]
        with torch.no_grad():
            out = self.tiny.pipe.transformer(self.x, t[None], self.text, return_dict=False)[0]
        self.x = self.scheduler.step(out, t, self.x, return_dict=False)[0]

    def range(self, *numbers: int) -> None:
        """Some of the steps."""
        for i in range(*numbers):
            self.take(i)
        assert held(self.tiny) > 0 or numbers[-1] == 6

    def generator(self) -> Iterator[None]:
        """All of the steps."""
        for i in range(6):
            self.take(i)
            yield


@pytest.mark.parametrize("how", ["return", "raise", "generator", "ctrl-c in a forward"])
def test_a_loop_by_hand_is_let_go_though_its_scheduler_is_kept(how: str) -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, TEMPORAL, dense_steps=0)
    kept = Steps(tiny)

    def denoise() -> None:
        kept.range(3)
        if how == "raise":
            raise RuntimeError("stop")

    def interrupt(*_: Any) -> None:
        if len(diffpatch.report(tiny.pipe).kept_per_step) == 3:
            raise KeyboardInterrupt

    if how == "generator":
        steps = kept.generator()
        for _ in range(3):
            next(steps)
        assert held(tiny) > 0
        del steps
    elif how == "ctrl-c in a forward":
        tiny.pipe.transformer.blocks[1].register_forward_pre_hook(interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            kept.range(6)
    else:
        with contextlib.suppress(RuntimeError):
            denoise()
    gc.collect()
    assert held(tiny) == 0
    assert dense(tiny)[:3] == "dss" and diffpatch.report(tiny.pipe).state_bytes > 0


def test_steps_that_a_server_takes_one_by_one_are_one_run() -> None:
    """Functions that take one step each, the first of them with the beginning, are not its loop."""
    tiny = wan()
    diffpatch.patch(tiny.pipe, TEMPORAL, dense_steps=0)
    whole = Steps(tiny)
    whole.range(6)
    expected = dense(tiny)

    def admit() -> Steps:
        one = Steps(tiny)
        one.take(0)
        return one

    one, other = admit(), admit()
    for i in range(1, 6):
        one.take(i)
        other.take(i)
    assert dense(tiny) == expected == "dssdss"
    assert torch.equal(one.x, whole.x) and torch.equal(other.x, whole.x)
    assert not diffpatch.report(tiny.pipe).notes


def test_a_loop_that_is_taken_up_elsewhere_says_what_it_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, TEMPORAL, dense_steps=0)
    one = Steps(tiny)
    one.range(0, 2)
    assert held(tiny) == 0
    with caplog.at_level("WARNING"):
        one.range(2, 6)
    assert dense(tiny) == "dsdssd"  # refreshed where it was taken up
    assert "began anew in the middle" in caplog.text
    assert any("another one went on" in note for note in diffpatch.report(tiny.pipe).notes)


def test_a_function_under_way_keeps_its_own_variables_to_itself() -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, TEMPORAL, dense_steps=0)
    one = Steps(tiny)

    def denoise() -> set[str]:
        gone = torch.zeros(3)
        reference = weakref.ref(gone)
        one.range(2)
        del gone
        assert reference() is None
        return {name for name in locals() if name[0] not in "@_"}

    assert denoise() == {"reference", "one"}


@pytest.mark.parametrize("how", ["dropped", "raises"])
def test_the_last_run_of_all_is_let_go_with_its_scheduler(how: str) -> None:
    """Nothing runs after it, and no bar was closed."""
    tiny = wan()
    diffpatch.patch(tiny.pipe, TEMPORAL, dense_steps=0)

    def denoise() -> None:
        steps = loop(tiny.pipe, copy.deepcopy(tiny.pipe.scheduler), (4, 8), 4)
        next(steps), next(steps)
        assert held(tiny) > 0
        if how == "raises":
            raise RuntimeError("stop")

    with contextlib.suppress(RuntimeError):
        denoise()
    gc.collect()
    assert held(tiny) == 0
    assert len(diffpatch.report(tiny.pipe).kept_per_step) == 2
    assert diffpatch.report(tiny.pipe).state_bytes > 0


@pytest.mark.parametrize("kind", ["FlowMatchEuler", "FlowMatchHeun"])
def test_loops_that_skip_the_first_timesteps_have_fewer(kind: str) -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, TEMPORAL, dense_steps=0, dense_last_steps=1)
    scheduler = getattr(diffusers, f"{kind}DiscreteScheduler")()

    def image_to_image() -> None:
        x, text = torch.randn(1, 16, 3, 4, 8), torch.zeros(1, 8, 32)
        driver = scheduler
        driver.set_timesteps(6)
        for t in driver.timesteps[-3:]:
            with torch.no_grad():
                out = tiny.pipe.transformer(x, t[None], text, return_dict=False)[0]
            x = driver.step(out, t, x, return_dict=False)[0]

    image_to_image()
    assert dense(tiny) == "dsd"  # temporal refreshes in its first
    assert held(tiny) == 0


def test_timesteps_that_are_set_anew_in_the_middle_are_the_same_run() -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=1, dense_last_steps=1)
    expected = tiny.run(**FOUR)

    def again(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 1:
            index = pipe.scheduler.step_index
            pipe.scheduler.set_timesteps(4)
            pipe.scheduler._step_index = index
        return {}

    assert torch.equal(tiny.run(**FOUR, callback_on_step_end=again), expected)
    assert dense(tiny) == "dssd"


def test_a_scheduler_exchanged_for_its_copy_goes_on() -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, TEMPORAL, dense_steps=1)
    expected = tiny.run(**FOUR)

    def exchange(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 1:
            pipe.scheduler = copy.deepcopy(pipe.scheduler)
        return {}

    assert torch.equal(tiny.run(**FOUR, callback_on_step_end=exchange), expected)
    assert diffpatch.report(tiny.pipe).steps == 4 and held(tiny) == 0


LATENTS = {
    "grow": lambda x: torch.cat([x, x], dim=-1),
    "turn": lambda x: x.transpose(-1, -2).contiguous(),  # as many tokens, another grid
}


@pytest.mark.parametrize("change", sorted(LATENTS))
@pytest.mark.parametrize("method", ["all", "tail", "skip", "mask"])
def test_latents_may_change_their_size_in_the_middle(method: str, change: str) -> None:
    tiny = wan()
    modes: Any = {"mode": method, "threshold": -0.1} if method == "skip" else {"mode": method}
    chosen = Window(window=-1) if method == "all" else Temporal(over=LOCAL, refresh=9, **modes)

    def callback(
        pipe: Any, step: int, t: Any, values: dict[str, Any], fresh: bool
    ) -> dict[str, Any]:
        if step != 1:
            return {}
        if fresh:
            diffpatch.reset(pipe)
        return {"latents": LATENTS[change](values["latents"])}

    def run(fresh: bool = False) -> torch.Tensor:
        return tiny.run(**FOUR, callback_on_step_end=functools.partial(callback, fresh=fresh))

    plain = run()
    diffpatch.patch(tiny.pipe, chosen, dense_steps=0)
    found = run()
    assert torch.equal(found, run(fresh=True))
    assert torch.allclose(found, plain, atol=1e-5) == (method == "all")
