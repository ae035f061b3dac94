"""A step cache as a part of a patch: what it leaves out, whose it is, and how it goes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, WanVideoToVideoPipeline
from PIL import Image

import diffpatch
from diffpatch import BadParameter
from diffpatch.errors import DiffpatchError
from tests.patching.run.test_runs import Windows
from tests.tiny import Tiny, images, packed, videos, wan, whole
from tests.tiny.images import flux_kontext, sd3
from tests.tiny.parts import noise

STEPS, LAYERS = 5, 3
ALWAYS = 1e9  # a change of the first block that no step reaches


@pytest.fixture
def tiny() -> Tiny:
    return wan(layers=LAYERS)


def hooks(model: Any) -> list[str]:
    return [name for module in model.modules()
            for name in getattr(getattr(module, "_diffusers_hook", None), "hooks", {})]  # fmt: skip


def threshold(model: Any) -> float | None:
    """Of the cache that is on."""
    config: Any = model._cache_config
    return None if config is None else float(config.threshold)


def test_steps_leave_out_all_blocks_but_the_first(tiny: Tiny) -> None:
    plain = tiny.run(num_inference_steps=STEPS)
    diffpatch.patch(tiny.pipe, "dense", cache=ALWAYS)
    cached = tiny.run(num_inference_steps=STEPS)
    branches = 2
    assert diffpatch.report(tiny.pipe).calls == branches * (LAYERS + STEPS - 1)
    diffpatch.unpatch(tiny.pipe)
    tiny.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=ALWAYS))
    assert torch.equal(tiny.run(num_inference_steps=STEPS), cached), "diffusers' own is the same"
    tiny.pipe.transformer.disable_cache()
    assert not torch.equal(cached, plain)
    assert torch.equal(tiny.run(num_inference_steps=STEPS), plain)
    assert not hooks(tiny.pipe.transformer)


def test_a_later_patch_replaces_the_cache_and_a_former_one_comes_back(tiny: Tiny) -> None:
    model = tiny.pipe.transformer
    diffpatch.patch(tiny.pipe, "window", cache=0.1)
    diffpatch.patch(tiny.pipe, "window", cache=0.2)
    assert threshold(model) == 0.2
    with diffpatch.patched(tiny.pipe, "window"):
        assert threshold(model) is None
    assert threshold(model) == 0.2
    diffpatch.patch(tiny.pipe, "window")
    assert threshold(model) is None and not hooks(model)


def test_a_failed_run_leaves_nothing_to_the_next(tiny: Tiny) -> None:
    diffpatch.patch(tiny.pipe, "dense", cache=ALWAYS)
    clean = tiny.run(num_inference_steps=STEPS)

    def stop(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        if step == 2:
            raise KeyboardInterrupt
        return tensors

    with pytest.raises(KeyboardInterrupt):
        tiny.run(num_inference_steps=STEPS, prompt="another", callback_on_step_end=stop)
    assert torch.equal(tiny.run(num_inference_steps=STEPS), clean)


def test_a_window_of_a_long_video_leaves_nothing_to_the_next(tiny: Tiny) -> None:
    pipe = Windows(**tiny.pipe.components)
    diffpatch.patch(pipe, "dense", cache=ALWAYS)
    pipe(STEPS)
    assert diffpatch.report(pipe).calls == Windows.windows * (LAYERS + STEPS - 1)


def test_runs_that_take_turns_rob_each_other_and_are_told(
    tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    plain = tiny.run(num_inference_steps=STEPS)
    other = type(tiny.pipe)(**tiny.pipe.components)
    other.scheduler = copy.deepcopy(tiny.pipe.scheduler)
    other.set_progress_bar_config(disable=True)
    diffpatch.patch(tiny.pipe, "dense", cache=ALWAYS)

    def between(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        if step < STEPS - 1:
            other(**tiny.call | {"num_inference_steps": 1, "prompt": "another"})
        return tensors

    found = tiny.run(num_inference_steps=STEPS, callback_on_step_end=between)
    assert torch.equal(found, plain), "every step was computed anew"
    assert "take turns" in caplog.text


def test_forwards_without_a_loop_are_whole_and_that_is_said(
    tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny.pipe.transformer
    inputs = noise(1, 16, 3, 4, 6), torch.tensor([500]), noise(1, 7, 32)
    plain = model(*inputs)[0]
    diffpatch.patch(tiny.pipe, "dense", cache=ALWAYS)
    for _ in range(2):
        assert torch.equal(model(*inputs)[0], plain)
    assert "no step leaves blocks out: no denoising loop is seen" in caplog.text
    assert "take turns" not in caplog.text


@pytest.mark.parametrize("threshold", [0, -0.1, float("nan"), True, "0.1"])
def test_thresholds_are_numbers_above_zero(tiny: Tiny, threshold: Any) -> None:
    with pytest.raises(BadParameter, match=r"cache=.* must be a (finite )?number"):
        diffpatch.patch(tiny.pipe, "window", cache=threshold)


def test_what_cannot_be_cached_is_refused_and_left_alone(tiny: Tiny) -> None:
    with pytest.raises(BadParameter, match="patch the pipeline"):
        diffpatch.patch(tiny.pipe.transformer, "window", cache=0.1)
    tiny.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.3))
    with pytest.raises(BadParameter, match="FirstBlockCache is enabled on WanTransformer3DModel"):
        diffpatch.patch(tiny.pipe, "window", cache=0.1)
    diffpatch.patch(tiny.pipe, "window")
    diffpatch.unpatch(tiny.pipe)
    assert tiny.pipe.transformer._cache_config.threshold == 0.3, "it is the user's"
    unknown = sd3()
    plain = unknown.run()
    with pytest.raises(BadParameter, match=r"SD3Transformer2DModel.*leave cache out"):
        diffpatch.patch(unknown.pipe, "neighborhood", cache=0.1)
    assert torch.equal(unknown.run(), plain) and not hooks(unknown.pipe.transformer)


def video_to_video(tiny: Tiny) -> Tiny:
    names = "tokenizer", "text_encoder", "transformer", "vae", "scheduler"
    pipe: Any = WanVideoToVideoPipeline(**{name: getattr(tiny.pipe, name) for name in names})
    pipe.set_progress_bar_config(disable=True)
    call = {k: v for k, v in tiny.call.items() if k not in ("num_frames", "num_inference_steps")}
    return Tiny(pipe, call | {"video": [Image.new("RGB", (64, 64), "teal")] * 9})


@pytest.mark.parametrize("build", [lambda: video_to_video(wan(layers=LAYERS)), flux_kontext])
def test_branches_that_a_pipeline_does_not_name_go_by_their_numbers(build: Any) -> None:
    tiny = build()
    model = tiny.pipe.transformer
    plain = tiny.run(num_inference_steps=STEPS)
    diffpatch.patch(tiny.pipe, "dense", cache=1e-12, hold=1e-12)
    assert torch.equal(tiny.run(num_inference_steps=STEPS), plain)
    diffpatch.patch(tiny.pipe, "dense", cache=ALWAYS)
    cached = tiny.run(num_inference_steps=STEPS)
    assert not torch.equal(cached, plain)
    diffpatch.unpatch(tiny.pipe)
    assert "forward" not in vars(model)
    forward = model.forward  # the same, by hand: forwards of a step are named as they come
    steps: list[float] = []

    def named(*args: Any, **kwargs: Any) -> Any:
        time = float(kwargs["timestep"].flatten()[0])
        steps.append(time)
        with model.cache_context(str(steps.count(time))):
            return forward(*args, **kwargs)

    model.enable_cache(FirstBlockCacheConfig(threshold=ALWAYS))
    model.forward = named
    assert torch.equal(tiny.run(num_inference_steps=STEPS), cached)
    del model.forward
    model.disable_cache()
    assert torch.equal(tiny.run(num_inference_steps=STEPS), plain)


FAILING = [images.flux2, videos.kandinsky, videos.latte, packed.cosmos3_pipeline, whole.motif_video]


@pytest.mark.parametrize("build", FAILING)
def test_models_on_which_diffusers_fails_are_refused(build: Callable[[], Tiny]) -> None:
    model = build()
    with pytest.raises(BadParameter, match=r"fails on .*; leave cache out"):
        diffpatch.patch(model.pipe, "dense", cache=0.1)
    model.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with (
        pytest.raises((TypeError, ValueError, RuntimeError)),
        model.pipe.transformer.cache_context("as its pipelines do not"),
    ):
        model.run()


def test_no_other_model_is_refused_for_that() -> None:
    failing = {type(build().pipe.transformer).__name__ for build in FAILING}
    assert {row.transformer for row in diffpatch.list_families() if not row.cacheable} == failing


def test_a_copy_would_run_the_blocks_of_the_original(tiny: Tiny) -> None:
    plain = tiny.run()
    diffpatch.patch(tiny.pipe, "dense", cache=0.1)
    with pytest.raises(DiffpatchError, match=r"cannot be copied.*unpatch, copy"):
        copy.deepcopy(tiny.pipe)
    tiny.pipe.transformer.disable_cache()
    assert torch.equal(Tiny(copy.deepcopy(tiny.pipe), tiny.call).run(), plain)
