"""Many runs over one patched transformer: each is what it would be alone."""

from __future__ import annotations

import copy
import gc
import logging
import threading
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

import diffpatch
from diffpatch import BadParameter, NotPatched, Window
from tests.tiny import Tiny, flux, wan, wan_transformer

LOCAL = Window(window=(-1, 1, 2), shift="none")
TEMPORAL = diffpatch.Temporal(over=LOCAL, refresh=3)
# Landscape and portrait hold the same number of tokens. No decoding: Wan's VAE is not for threads.
LATENT: dict[str, Any] = {"output_type": "latent"}
REQUESTS: list[dict[str, Any]] = [
    LATENT | {"height": 32, "width": 64, "num_inference_steps": 4},
    LATENT | {"height": 64, "width": 32, "num_inference_steps": 5},
    LATENT | {"height": 64, "width": 64, "num_inference_steps": 3, "guidance_scale": 1.0},
]

# Not for threads: padding is a setting of theirs, which every call sets anew.
TOKENIZERS = ("tokenizer", "tokenizer_2")


def clone(tiny: Tiny, how: str = "copy") -> Tiny:
    """A pipeline for one request: the same models, a scheduler and tokenizers of its own."""
    base, config = tiny.pipe, tiny.pipe.scheduler.config
    if how == "copy":
        pipe = copy.copy(base)
        pipe.scheduler = copy.deepcopy(base.scheduler)
    elif how == "config":
        fresh = type(base.scheduler).from_config(config)
        pipe = type(base)(**dict(base.components, scheduler=fresh))
    else:
        pipe = type(base).from_pipe(base)
        pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(config, flow_shift=3.0)
    for name in TOKENIZERS:
        if getattr(pipe, name, None) is not None:
            setattr(pipe, name, copy.deepcopy(getattr(pipe, name)))
    pipe.set_progress_bar_config(disable=True)
    return Tiny(pipe, tiny.call)


def alone(method: Any, requests: list[dict[str, Any]], **options: Any) -> list[torch.Tensor]:
    """Each request on a fresh pipeline."""
    out = []
    for request in requests:
        tiny = wan()
        diffpatch.patch(tiny.pipe, method, **options)
        out.append(tiny.run(**request))
    return out


def together(work: list[Any]) -> list[Any]:
    """The results of functions that run in threads of their own."""
    out: list[Any] = [None] * len(work)

    def run(i: int) -> None:
        try:
            out[i] = work[i]()
        except Exception as error:
            out[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out


class Turns:
    """Callbacks that let several runs take a step in turn."""

    def __init__(self, count: int) -> None:
        self.left, self.turn = list(range(count)), 0
        self.changed = threading.Condition()

    def wait(self, i: int) -> None:
        with self.changed:
            self.turn += 1
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.left[self.turn % len(self.left)] == i, 60)

    def leave(self, i: int) -> None:
        with self.changed:
            self.left.remove(i)
            self.changed.notify_all()

    def run(self, tiny: Tiny, i: int, request: dict[str, Any]) -> torch.Tensor:
        def callback(*_: Any) -> dict[str, Any]:
            self.wait(i)
            return {}

        try:
            return tiny.run(callback_on_step_end=callback, **request)
        finally:
            self.leave(i)


@pytest.mark.parametrize("how", ["copy", "config", "from_pipe"])
def test_requests_in_threads_share_no_tokenizer(how: str) -> None:
    """Or one request's prompt would be as long as another's asks for."""
    tiny = flux()
    one = clone(tiny, how)
    for name in TOKENIZERS:
        assert getattr(one.pipe, name) is not getattr(tiny.pipe, name)


@pytest.mark.parametrize("method", [LOCAL, TEMPORAL], ids=["window", "temporal"])
def test_requests_of_other_sizes_take_their_steps_in_turn(method: Any) -> None:
    tiny = wan()
    early = clone(tiny, "config")
    diffpatch.patch(tiny.pipe, method, dense_steps=1)
    pipes = [early, clone(tiny, "copy"), clone(tiny, "config")]
    turns = Turns(len(pipes))
    out = together([lambda i=i: turns.run(pipes[i], i, REQUESTS[i]) for i in range(len(pipes))])
    for found, expected in zip(out, alone(method, REQUESTS, dense_steps=1), strict=True):
        assert torch.equal(found, expected)
    for one, request in zip(pipes, REQUESTS, strict=True):
        report = diffpatch.report(one.pipe)
        assert report.steps == request["num_inference_steps"]
        assert [kept == 1 for kept in report.kept_per_step[:2]] == [True, method is TEMPORAL]
    assert owner(tiny).patch.state_bytes() == 0


def owner(tiny: Tiny) -> Any:
    return tiny.pipe.transformer._diffpatch


@pytest.mark.parametrize("how", ["copy", "config", "from_pipe"])
def test_clones_of_a_patched_pipeline_follow_their_own_run(how: str) -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=2)
    for seed in range(3):
        one = clone(tiny, how)
        one.run(seed=seed, num_inference_steps=5)
        for target in (one.pipe, tiny.pipe):  # which never ran itself
            kept = diffpatch.report(target).kept_per_step
            assert [k == 1 for k in kept] == [True, True, False, False, False]
    diffpatch.unpatch(tiny.pipe)
    assert "_diffpatch_tracker" not in vars(one.pipe.scheduler)
    with pytest.raises(NotPatched):
        diffpatch.report(one.pipe)


def test_a_report_is_about_the_pipelines_own_run() -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=1)
    tiny.run(num_inference_steps=3)
    other = Tiny(type(tiny.pipe).from_pipe(tiny.pipe), tiny.call)  # the same scheduler
    other.pipe.set_progress_bar_config(disable=True)
    other.run(num_inference_steps=5)
    assert diffpatch.report(tiny.pipe).steps == 3
    assert diffpatch.report(other.pipe).steps == diffpatch.report(tiny.pipe.transformer).steps == 5
    diffpatch.reset(other.pipe)
    assert diffpatch.report(other.pipe).calls == 0 and diffpatch.report(tiny.pipe).calls > 0


def test_image_to_image_after_text_to_image_counts_its_own_steps() -> None:
    tiny = flux()
    diffpatch.patch(tiny.pipe, "neighborhood", window=0.5, dense_steps=0.25)

    def edit() -> torch.Tensor:
        pipe = diffusers.AutoPipelineForImage2Image.from_pipe(tiny.pipe)
        pipe.set_progress_bar_config(disable=True)
        changes: dict[str, Any] = {"image": Image.new("RGB", (32, 16), "teal"), "strength": 1.0}
        out = Tiny(pipe, tiny.call).run(num_inference_steps=8, **changes)
        kept = diffpatch.report(pipe).kept_per_step
        assert [k == 1 for k in kept] == [True] * 2 + [False] * 6
        return out

    first = edit()
    tiny.run(num_inference_steps=4)
    assert torch.equal(edit(), first)


def test_state_is_freed_with_the_last_step_or_when_the_run_is_left() -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, TEMPORAL, dense_steps=0)
    held = owner(tiny).patch.state_bytes
    seen: list[int] = []
    decode = tiny.pipe.vae.decode

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(held())
        return decode(*args, **kwargs)

    tiny.pipe.vae.decode = watched
    expected = tiny.run(num_inference_steps=4)
    report = diffpatch.report(tiny.pipe)
    assert seen == [0] and held() == 0 and report.state_bytes > 0 and report.calls == 16

    def stop(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 1:
            raise KeyboardInterrupt
        return {}

    one = clone(tiny)
    with pytest.raises(KeyboardInterrupt):
        one.run(num_inference_steps=4, callback_on_step_end=stop)
    assert held() == 0  # test_leaving has all ways
    with pytest.raises(KeyboardInterrupt):
        tiny.run(num_inference_steps=4, callback_on_step_end=stop)
    assert torch.equal(tiny.run(num_inference_steps=4), expected) and held() == 0


def test_what_is_remembered_of_finished_runs_is_bounded() -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=1)
    for seed in range(6):
        clone(tiny).run(seed=seed)
    gc.collect()
    assert len(owner(tiny).patch.runs.all()) == 1


@pytest.mark.parametrize("exchange", ["transformer", "scheduler", "both"])
def test_unpatch_undoes_what_was_patched_whatever_the_target_holds_now(exchange: str) -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=0)
    old, scheduler = tiny.pipe.transformer, tiny.pipe.scheduler
    if exchange != "scheduler":
        tiny.pipe.transformer = wan_transformer(seed=3)
    if exchange != "transformer":
        tiny.pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=7.0)
    tiny.run()
    report = diffpatch.report(tiny.pipe)
    assert bool(report.notes) == (exchange != "scheduler")
    assert ("exchanged after patching" in str(report)) == (exchange != "scheduler")
    diffpatch.unpatch(tiny.pipe)
    assert type(scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    assert "_diffpatch_original" not in vars(type(tiny.pipe.scheduler))
    assert not hasattr(old, "_diffpatch") and "cache_context" not in vars(old)
    assert not old._forward_pre_hooks and not old._forward_hooks
    assert all(not type(p).__name__.startswith("DiffPatch") for p in old.attn_processors.values())
    with pytest.raises(NotPatched):
        diffpatch.report(tiny.pipe)


def test_guidance_branches_go_by_their_names() -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, TEMPORAL, dense_steps=0)
    seen: list[tuple[int, int]] = []
    owner(tiny).patch.observers.append(lambda call: seen.append(call.place[2:]))
    scheduler, model = tiny.pipe.scheduler, tiny.pipe.transformer
    x, text = torch.zeros(1, 16, 3, 4, 8), torch.zeros(1, 8, 32)
    scheduler.set_timesteps(3)
    for step, t in enumerate(scheduler.timesteps):
        for name in (("a", "b"), ("b", "c"), ("c", "a"))[step]:
            with torch.no_grad(), model.cache_context(name):
                out = model(x, t[None], text, return_dict=False)[0]
        scheduler.step(out, t, x)
    assert list(dict.fromkeys(seen)) == [(0, 0), (0, 1), (1, 1), (1, 2), (2, 2), (2, 0)]
    copied = copy.deepcopy(model)
    assert copied.cache_context.__self__ is copied


class Windows(diffusers.WanPipeline):
    """Denoises a long video window by window, as LTX and Wan Animate do."""

    windows = 3
    scheduler: Any
    transformer: Any

    @torch.no_grad()
    def __call__(self, steps: int) -> torch.Tensor:
        latents = torch.zeros(1, 16, 3, 4, 8)
        for _ in range(self.windows):
            self.scheduler.set_timesteps(steps)
            for t in self.scheduler.timesteps:
                noise_pred = self.transformer(latents, t[None], torch.zeros(1, 8, 32))[0]
                latents = self.scheduler.step(noise_pred, t, latents, return_dict=False)[0]
        return latents


def test_long_videos_report_all_their_windows() -> None:
    tiny = wan()
    pipe = Windows(**tiny.pipe.components)
    diffpatch.patch(pipe, LOCAL, dense_steps=1)
    for _ in range(2):  # the second call is a run of its own
        pipe(3)
        kept = diffpatch.report(pipe).kept_per_step
        assert [k == 1 for k in kept] == [True, False, False] * Windows.windows
    # A choice by content says later how much it kept, and held steps have no calls.
    diffpatch.patch(pipe, "dynamic", dense_steps=0, dense_layers=0)
    pipe(3)
    assert diffpatch.report(pipe).steps == 3 * Windows.windows
    diffpatch.patch(pipe, "dense", hold=1e9)
    pipe(5)
    report = diffpatch.report(pipe)
    assert (report.steps, report.held_steps) == (2 * Windows.windows, 3 * Windows.windows)


@pytest.mark.parametrize("compiled", ["whole", "blocks"])
def test_compiled_models_serve_two_runs_at_once(compiled: str) -> None:
    torch._dynamo.reset()
    tiny, requests = wan(), REQUESTS[:2]
    expected = alone(TEMPORAL, requests, dense_steps=1)
    diffpatch.patch(tiny.pipe, TEMPORAL, dense_steps=1)
    if compiled == "whole":
        tiny.pipe.transformer = torch.compile(tiny.pipe.transformer, backend="eager")
    else:
        tiny.pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    for request in requests:
        tiny.run(**request)
    pipes, turns = [clone(tiny), clone(tiny)], Turns(2)
    out = together([lambda i=i: turns.run(pipes[i], i, requests[i]) for i in range(2)])
    torch._dynamo.reset()
    for found, one in zip(out, expected, strict=True):
        assert torch.allclose(found, one, atol=1e-5)


def test_a_patch_in_the_middle_of_a_run_counts_from_its_beginning() -> None:
    tiny = wan()

    def late(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 1:
            diffpatch.patch(pipe, LOCAL, dense_steps=3)
        return {}

    tiny.run(num_inference_steps=5, callback_on_step_end=late)
    assert [k == 1 for k in diffpatch.report(tiny.pipe).kept_per_step] == [True, False, False]


def test_bare_transformers_and_copies_say_what_they_are(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "diffpatch")
    model = wan_transformer()
    for options in ({"dense_steps": 1}, {"dense_last_steps": 0.5}):
        with pytest.raises(BadParameter, match="a bare transformer has no scheduler"):
            diffpatch.patch(model, LOCAL, **options)
    diffpatch.patch(model, Window(shift="step"))
    assert not caplog.records
    copies = [copy.deepcopy(model) for _ in range(2)]
    assert caplog.text.count("is not patched") == 1
    for one in copies:
        with pytest.raises(NotPatched):
            diffpatch.report(one)
    model(torch.zeros(1, 16, 3, 4, 8), torch.tensor([5]), torch.zeros(1, 8, 32))
    assert "takes every forward for the first of a run" in diffpatch.report(model).notes[0]


def test_many_sizes_at_once_keep_what_they_decided() -> None:
    """More grids than a patch remembers: a run must not see its pattern made anew."""
    sizes = [(32, 64), (64, 32), (64, 64), (32, 96), (96, 32), (96, 96)]
    requests = [LATENT | {"height": h, "width": w, "num_inference_steps": 3} for h, w in sizes]
    tiny = wan(layers=1)
    diffpatch.patch(tiny.pipe, diffpatch.Temporal(over=LOCAL, refresh=9), dense_steps=0)
    expected = [clone(tiny).run(**request) for request in requests]
    turns, pipes = Turns(len(requests)), [clone(tiny) for _ in requests]
    out = together([lambda i=i: turns.run(pipes[i], i, requests[i]) for i in range(len(requests))])
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
