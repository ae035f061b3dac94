"""A step cache as a part of a patch: what it leaves out, whose it is, and how it goes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig

import diffpatch
from diffpatch import BadParameter
from tests.tiny import Tiny, wan
from tests.tiny.images import sd3

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
