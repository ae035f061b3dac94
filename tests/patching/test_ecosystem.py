"""What people combine a patch with: LoRA, offloading, casting, diffusers' own caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig

import diffpatch
from diffpatch import Window
from tests.tiny import Tiny, flux, wan

LOCAL = Window(window=(-1, 1, 2), shift="none")


def add_lora(tiny: Tiny) -> None:
    from peft import LoraConfig

    targets = ["to_q", "to_k", "to_v"]
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(0)
    tiny.pipe.transformer.add_adapter(config)


@pytest.mark.parametrize("maker", [wan, flux], ids=lambda f: f.__name__)
@pytest.mark.parametrize("patched_first", [True, False])
def test_lora_comes_and_goes_under_a_patch(maker: Any, patched_first: bool) -> None:
    tiny = maker()
    plain = tiny.run()
    with diffpatch.patched(tiny.pipe, LOCAL, dense_steps=0):
        sparse = tiny.run()
    if patched_first:
        diffpatch.patch(tiny.pipe, LOCAL, dense_steps=0)
        add_lora(tiny)
    else:
        add_lora(tiny)
        diffpatch.patch(tiny.pipe, LOCAL, dense_steps=0)
    tuned = tiny.run()
    assert not torch.equal(tuned, sparse)
    tiny.pipe.transformer.disable_adapters()
    assert torch.equal(tiny.run(), sparse)
    tiny.pipe.transformer.enable_adapters()
    assert torch.equal(tiny.run(), tuned)
    tiny.pipe.unload_lora_weights()
    assert torch.equal(tiny.run(), sparse)
    diffpatch.unpatch(tiny.pipe)
    assert torch.equal(tiny.run(), plain)


@pytest.mark.parametrize("maker", [wan, flux], ids=lambda f: f.__name__)
def test_lora_is_fused_under_a_patch(maker: Any) -> None:
    tiny = maker()
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=0)
    sparse = tiny.run()
    add_lora(tiny)
    tuned = tiny.run()
    assert float((tuned - sparse).abs().max()) > 1e-3
    tiny.pipe.transformer.fuse_lora()
    torch.testing.assert_close(tiny.run(), tuned, atol=1e-4, rtol=0)
    tiny.pipe.transformer.disable_adapters()  # fused weights no longer need them
    tiny.pipe.transformer.unfuse_lora()
    torch.testing.assert_close(tiny.run(), sparse, atol=1e-4, rtol=0)


@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
@pytest.mark.parametrize("patched_first", [True, False])
def test_group_offloading(patched_first: bool, level: str) -> None:
    tiny = wan()
    with diffpatch.patched(tiny.pipe, LOCAL, dense_steps=0):
        expected = tiny.run()
    if patched_first:
        diffpatch.patch(tiny.pipe, LOCAL, dense_steps=0)
    cpu = torch.device("cpu")
    tiny.pipe.transformer.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_type=level, num_blocks_per_group=1
    )
    if not patched_first:
        diffpatch.patch(tiny.pipe, LOCAL, dense_steps=0)
    assert torch.equal(tiny.run(), expected)


def test_layerwise_casting() -> None:
    outputs = []
    for patched_first in (True, False):
        tiny = wan()
        if patched_first:
            diffpatch.patch(tiny.pipe, LOCAL, dense_steps=0)
        tiny.pipe.transformer.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
        )
        diffpatch.patch(tiny.pipe, LOCAL, dense_steps=0)
        outputs.append(tiny.run())
    assert torch.equal(*outputs)


def test_first_block_cache_keeps_steps_and_branches_right() -> None:
    tiny = wan(layers=3)
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=1)
    plain = tiny.run(num_inference_steps=4)
    tiny.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    assert torch.equal(tiny.run(num_inference_steps=4), plain)
    tiny.pipe.transformer.disable_cache()
    tiny.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    tiny.run(num_inference_steps=4)
    report = diffpatch.report(tiny.pipe)
    assert report.steps == 4
    assert [k == 1.0 for k in report.kept_per_step] == [True, False, False, False]
    assert report.calls < 4 * 2 * 3  # blocks that the cache skipped made no calls


def test_pyramid_attention_broadcast_runs_over_a_patch() -> None:
    tiny = wan(layers=3)
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=0)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: int(tiny.pipe.current_timestep),
        spatial_attention_block_identifiers=("blocks",),
    )
    tiny.pipe.transformer.enable_cache(config)
    tiny.run(num_inference_steps=4)
    tiny.pipe.transformer.disable_cache()
    diffpatch.unpatch(tiny.pipe)
    assert torch.isfinite(tiny.run()).all()


def test_pipelines_made_from_a_patched_one_share_its_patch() -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=1)
    expected = tiny.run()
    other = Tiny(type(tiny.pipe).from_pipe(tiny.pipe), tiny.call)
    other.pipe.set_progress_bar_config(disable=True)
    assert torch.equal(other.run(), expected)
    assert diffpatch.report(other.pipe).kept_per_step[0] == 1.0
    diffpatch.unpatch(other.pipe)
    with pytest.raises(diffpatch.NotPatched):
        diffpatch.report(tiny.pipe)
