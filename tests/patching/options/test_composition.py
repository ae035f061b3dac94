"""What combines with what: methods with methods, and with the caches of diffusers."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    LayerSkipConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
    apply_layer_skip,
)

import diffpatch
from diffpatch import BadParameter, Temporal, Window
from diffpatch.errors import DiffpatchError
from diffpatch.patching.options import composition
from tests.tiny import Tiny, wan
from tests.tiny.images import qwen
from tests.tiny.videos import cogvideox

STEPS, LAYERS = 6, 3
EVERY_STEP = (-1, 1001)  # timesteps between which a cache may act


def cache(name: str, pipe: Any) -> Any:
    """A cache that skips something on every other step, wherever it can act at all."""

    def now() -> Any:
        return pipe.current_timestep

    made: dict[str, Any] = {
        "PyramidAttentionBroadcast": PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=EVERY_STEP,
            current_timestep_callback=now,
        ),
        "FasterCache": FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=EVERY_STEP,
            unconditional_batch_skip_range=2,
            unconditional_batch_timestep_skip_range=EVERY_STEP,
            current_timestep_callback=now,
            attention_weight_callback=lambda module: 0.5,
            tensor_format="BFCHW",
        ),
        "FirstBlockCache": FirstBlockCacheConfig(threshold=0.5),
        "MagCache": MagCacheConfig(
            threshold=10.0, max_skip_steps=1, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS
        ),
        "SeaCache": SeaCacheConfig(),
        "TaylorSeerCache": TaylorSeerCacheConfig(
            cache_interval=2, disable_cache_before_step=1, cache_identifiers=[r"blocks\.\d+\.attn1"]
        ),
        "TextKVCache": TextKVCacheConfig(),
    }
    return made[name]


def tiny_for(name: str) -> Tiny:
    """FasterCache wants both guidance branches in one batch."""
    return cogvideox() if name == "FasterCache" else wan(LAYERS)


class Calls:
    """The (layer, step, branch) of every sparse attention call while it is entered."""

    def __init__(self, pipe: Any) -> None:
        self.target, self.seen = pipe, list[tuple[int, int, int]]()

    def __enter__(self) -> list[tuple[int, int, int]]:
        observers = self.target.transformer._diffpatch.patch.observers
        observers.append(lambda call: self.seen.append(call.place[1:]))
        return self.seen

    def __exit__(self, *error: object) -> None:
        self.target.transformer._diffpatch.patch.observers.clear()


def attention_calls(tiny: Tiny) -> int:
    """How often a run enters the self-attention processors of an unpatched pipeline."""
    count, model = 0, tiny.pipe.transformer
    modules = [m for path, m in model.named_modules() if path.endswith("attn1")]
    for module in modules:
        original = module.processor

        def counted(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            return original(*args, **kwargs)

        module.processor = counted
    tiny.run(num_inference_steps=STEPS)
    for module in modules:
        module.processor = module.processor.__kwdefaults__["original"]
    return count


@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("name", composition.CACHES)
def test_a_patched_model_under_a_cache_computes_what_it_says(name: str, patch_first: bool) -> None:
    tiny = tiny_for(name)
    model = tiny.pipe.transformer
    model.enable_cache(cache(name, tiny.pipe))
    cached, calls = tiny.run(num_inference_steps=STEPS), attention_calls(tiny)
    model.disable_cache()
    if not patch_first:
        model.enable_cache(cache(name, tiny.pipe))
    diffpatch.patch(tiny.pipe, "window", window=-1, dense_steps=0)  # keeps everything
    if patch_first:
        model.enable_cache(cache(name, tiny.pipe))
    assert torch.equal(tiny.run(num_inference_steps=STEPS), cached)
    assert diffpatch.report(tiny.pipe).calls == calls  # what the cache skips is not called
    diffpatch.patch(tiny.pipe, "window", window=(-1, 1, 2), dense_steps=0, shift="none")
    assert not torch.equal(tiny.run(num_inference_steps=STEPS), cached)
    diffpatch.unpatch(tiny.pipe)
    assert torch.equal(tiny.run(num_inference_steps=STEPS), cached)


def test_dense_steps_are_steps_of_the_run_however_many_calls_are_skipped() -> None:
    tiny = wan(LAYERS)
    tiny.pipe.transformer.enable_cache(cache("MagCache", tiny.pipe))
    diffpatch.patch(tiny.pipe, "window", window=(-1, 1, 2), dense_steps=3, dense_layers=0)
    with Calls(tiny.pipe) as calls:
        tiny.run(num_inference_steps=STEPS)
    assert {step for _, step, _ in calls} == {4}  # of 3, 4 and 5 the cache skips two whole steps
    assert {branch for _, _, branch in calls} == {0, 1}


def test_the_state_of_temporal_ages_by_steps_not_by_calls() -> None:
    tiny = wan(LAYERS)
    model = tiny.pipe.transformer
    model.enable_cache(cache("TaylorSeerCache", tiny.pipe))
    method: dict[str, Any] = {"window": (-1, 1, 2), "shift": "none", "refresh": 3, "dense_steps": 0}
    diffpatch.patch(tiny.pipe, ["window", "temporal"], **method)
    with Calls(tiny.pipe) as calls:
        tiny.run(num_inference_steps=8)
    steps = sorted({step for _, step, _ in calls})
    assert len(steps) < 8, "the cache skipped nothing"
    record = model._diffpatch.patch.runs.last.record
    kept = {step: round(value / pairs, 3) for step, (pairs, value) in record.by_step.items()}
    due = 0
    for step in steps:  # a refresh happens at the first call that is due by its step
        assert (kept[step] == 1.0) == (step == 0 or step - due >= 3), kept
        due = step if kept[step] == 1.0 else due


def test_errors_are_those_of_the_method_alone() -> None:
    """Under a cache that never skips, a patched model gives what it gives without one."""
    tiny = wan(LAYERS)
    diffpatch.patch(tiny.pipe, "window+temporal", window=(-1, 1, 2), refresh=2, dense_steps=0)
    alone = tiny.run(num_inference_steps=STEPS)
    tiny.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    assert torch.equal(tiny.run(num_inference_steps=STEPS), alone)


def test_a_cache_that_mixes_guidance_branches_is_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "diffpatch")
    tiny = wan(LAYERS)
    tiny.pipe.transformer.enable_cache(cache("PyramidAttentionBroadcast", tiny.pipe))
    diffpatch.patch(tiny.pipe, "window", dense_steps=0)
    tiny.run(guidance_scale=1.0)
    assert "guidance branches" not in caplog.text
    tiny.run()
    tiny.run()
    assert caplog.text.count("has several guidance branches") == 1


def test_what_cannot_be_combined_is_refused_before_it_computes_anything_wrong() -> None:
    tiny = cogvideox()
    tiny.pipe.transformer.enable_cache(cache("FasterCache", tiny.pipe))
    diffpatch.patch(tiny.pipe, "window+temporal", dense_steps=0)
    with pytest.raises(DiffpatchError, match="FasterCache drops rows of the batch"):
        tiny.run()
    tiny.pipe.transformer.disable_cache()
    tiny.pipe.transformer._cache_config = type("WonderCacheConfig", (), {})()
    with pytest.raises(DiffpatchError, match=r"WonderCache is enabled .* not known to work"):
        tiny.run()


def test_skipped_attention_scores_are_refused() -> None:
    tiny = qwen()
    skip = LayerSkipConfig(
        indices=[0], fqn="transformer_blocks", skip_attention=False, skip_ff=False,
        skip_attention_scores=True,
    )  # fmt: skip
    apply_layer_skip(tiny.pipe.transformer, skip)
    tiny.run()
    diffpatch.patch(tiny.pipe, "window", dense_steps=0)
    with pytest.raises(DiffpatchError, match="a hook skips attention scores"):
        tiny.run()


def test_combinations_are_written_as_names_or_lists() -> None:
    expected = Temporal(over=Window(shift="none"), refresh=3)
    for method in ("window+temporal", ["window", "temporal"], ("window", "temporal")):
        assert diffpatch.make_method(method, shift="none", refresh=3) == expected
    with pytest.raises(BadParameter, match="must be a list of names"):
        diffpatch.make_method([Window(), "temporal"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"method": "window+temporal", "shift": "step"}, "changes from step to step"),
        ({"method": "window+temporal", "shift": "random"}, "use shift='layer', 'count' or 'none'"),
        ({"method": "longer+temporal", "trained": 1}, "use it alone"),
        ({"method": "neighborhood+temporal", "sharpen": 1.1}, "give sharpen=1.0"),
        ({"method": "larger+temporal", "trained": (2, 2)}, "give sharpen=1.0"),
        ({"method": "linear+temporal"}, "nothing out"),
        ({"method": "window+radial"}, "does not combine"),
    ],
)
def test_methods_that_do_not_fit_together_say_why(params: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffpatchError, match=message):
        diffpatch.patch(wan().pipe, **params)


def test_the_table_names_every_cache_of_this_diffusers() -> None:
    import diffusers.hooks

    guidance = {"LayerSkip", "SmoothedEnergyGuidance"}
    names = {n.removesuffix("Config") for n in dir(diffusers.hooks) if n.endswith("Config")}
    assert names - guidance == set(composition.CACHES)
    documented = composition.__doc__ or ""
    assert all(name in documented for name in composition.CACHES)
