"""What people combine a patch with, each right or refused. Where each is tested:

batched, sequential and distilled guidance      test_families (every pipeline of the matrix)
PAG, SLG, IP-Adapter, ControlNet                here
Kontext, edit and other reference tokens        test_families, test_parallel
padded and ragged prompts                       test_families, test_family_limits
LoRA: load, unload, fuse; diffusers' caches     test_ecosystem, test_composition
fuse_qkv_projections, load_ip_adapter, slicing  here
offload: model, sequential, group               here, test_ecosystem
layerwise casting, quantised linears            test_ecosystem, here
torch.compile, whole and by blocks              test_compile, test_family_limits
checkpointing and training                      here
save_pretrained, deepcopy, pickle               test_patch
from_pipe; patches within patches               test_ecosystem, here
context parallelism, rendering in processes     test_parallel
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from PIL import Image

import diffpatch
from diffpatch import Neighborhood, Window
from diffpatch.errors import DiffpatchError
from tests.pipelines.test_families import Subject, error, masked
from tests.tiny import Tiny, images, videos, wan, wan22, wan_transformer
from tests.tiny.families import CASES
from tests.tiny.parts import make, noise

LOCAL = Neighborhood(window=(1, 3, 3), stride=1)
ROWS = Window(window=(-1, 1, 2), shift="none")


def subject(model: Tiny, case: str) -> Subject:
    """A model of a family whose self-attention `masked` is to find."""
    return Subject(CASES[case], model, model.pipe.transformer, torch.empty(0), {})


def check(model: Tiny, case: str, **call: Any) -> diffpatch.Report:
    """A run under a patch equals the same run under a dense mask, and is undone to the bit."""
    model = dataclasses.replace(model, call=model.call | call)
    dense = model.run()
    with masked(subject(model, case), LOCAL):
        expected = model.run()
    with diffpatch.patched(model.pipe, LOCAL, dense_steps=0):
        out, report = model.run(), diffpatch.report(model.pipe)
    assert error(dense, expected) > 1e-4
    assert error(out, expected) < 5e-5
    assert torch.equal(model.run(), dense)
    return report


def test_skip_layer_guidance_is_a_branch_of_some_steps() -> None:
    model = images.sd3()
    report = check(
        model, "sd3", num_inference_steps=4, guidance_scale=3.0, skip_guidance_layers=[1],
        skip_layer_guidance_start=0.2, skip_layer_guidance_stop=0.8,
    )  # fmt: skip
    assert report.steps == 4 and not report.reasons
    assert report.calls > 4 * 3  # three attention layers; a guided step has two calls of some


def test_perturbed_attention_guidance_comes_and_goes_under_a_patch() -> None:
    plain = images.pixart()
    pipe: Any = diffusers.PixArtSigmaPAGPipeline(**plain.pipe.components, pag_applied_layers=["1"])
    pipe.set_progress_bar_config(disable=True)
    model = Tiny(pipe, plain.call | {"pag_scale": 2.0})
    before = [block.attn1.processor for block in pipe.transformer.transformer_blocks]
    check(model, "pixart")
    after = [block.attn1.processor for block in pipe.transformer.transformer_blocks]
    assert all(a is b for a, b in zip(before, after, strict=True))


def add_ip_adapter(model: Tiny) -> None:
    """An adapter with random weights, as its file would hold them."""
    transformer = model.pipe.transformer
    torch.manual_seed(0)
    weights = {}
    for i in range(2):
        for name in ("k", "v"):
            weights[f"{i}.to_{name}_ip.weight"] = torch.randn(32, 32)
            weights[f"{i}.to_{name}_ip.bias"] = torch.randn(32)
    projection = {
        "proj.weight": torch.randn(4 * 32, 16), "proj.bias": torch.randn(4 * 32),
        "norm.weight": torch.ones(32), "norm.bias": torch.zeros(32),
    }  # fmt: skip
    transformer._load_ip_adapter_weights([{"ip_adapter": weights, "image_proj": projection}])


@pytest.mark.parametrize("patched_first", [True, False])
def test_ip_adapters_under_a_patch(patched_first: bool, caplog: pytest.LogCaptureFixture) -> None:
    call = {f"{sign}ip_adapter_image_embeds": [noise(1, 1, 16)] for sign in ("", "negative_")}
    plain = images.flux()
    without = plain.run()
    add_ip_adapter(plain)
    model = Tiny(plain.pipe, plain.call | call)
    dense = model.run()
    assert not torch.equal(dense, without)
    with masked(subject(model, "flux"), LOCAL):
        expected = model.run()
    other = images.flux()
    if patched_first:
        diffpatch.patch(other.pipe, LOCAL, dense_steps=0)
        sparse_without = other.run()
    add_ip_adapter(other)
    if not patched_first:
        diffpatch.patch(other.pipe, LOCAL, dense_steps=0)
    other = Tiny(other.pipe, other.call | call)
    with caplog.at_level(logging.WARNING):
        sparse = other.run()
        assert torch.equal(other.run(), sparse)
    assert sum("replaced after" in r.message for r in caplog.records) == patched_first
    assert error(sparse, expected) < 5e-5 < error(sparse, dense)
    copied = Tiny(copy.deepcopy(other.pipe), other.call)
    assert torch.equal(copied.run(), dense)
    other.pipe.unload_ip_adapter()
    if patched_first:
        assert torch.equal(Tiny(other.pipe, plain.call).run(), sparse_without)
    diffpatch.unpatch(other.pipe)
    assert torch.equal(Tiny(other.pipe, plain.call).run(), without)


def flux_controlnet() -> Tiny:
    plain = images.flux_kontext()
    config = {k: plain.pipe.transformer.config[k] for k in _SHARED}
    net = make("FluxControlNetModel", **config)
    parts = plain.pipe.components | {"controlnet": net}
    del parts["image_encoder"], parts["feature_extractor"]
    pipe: Any = diffusers.FluxControlNetPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    names = ("prompt_embeds", "pooled_prompt_embeds", "height", "width", "num_inference_steps")
    call = {name: plain.call[name] for name in (*names, "output_type")}
    return Tiny(pipe, call | {"control_image": Image.new("RGB", (12, 8), "teal")})


_SHARED = (
    "in_channels", "num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads",
    "joint_attention_dim", "pooled_projection_dim", "axes_dims_rope",
)  # fmt: skip


class Seeded(Tiny):
    """For pipelines that draw the latents of the control image from the global generator."""

    def run(self, seed: int = 0, **changes: Any) -> torch.Tensor:
        torch.manual_seed(seed)
        return super().run(seed, **changes)


def sd3_controlnet() -> Tiny:
    plain = images.sd3()
    config = plain.pipe.transformer.config
    net = make("SD3ControlNetModel", **{k: v for k, v in config.items() if k in _SD3_SHARED})
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "block_out_channels": (4,) * 4}
    blocks["up_block_types"] = ("UpDecoderBlock2D",) * 4
    vae = make("AutoencoderKL", **blocks, latent_channels=4, norm_num_groups=1, shift_factor=0.1)
    parts = plain.pipe.components | {"controlnet": net, "vae": vae}
    parts = {k: v for k, v in parts.items() if k not in ("image_encoder", "feature_extractor")}
    pipe: Any = diffusers.StableDiffusion3ControlNetPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return Seeded(pipe, plain.call | {"control_image": Image.new("RGB", (96, 64), "teal")})


_SD3_SHARED = (
    "sample_size", "in_channels", "out_channels", "num_layers", "attention_head_dim",
    "num_attention_heads", "joint_attention_dim", "caption_projection_dim",
    "pooled_projection_dim", "dual_attention_layers", "qk_norm", "pos_embed_max_size",
)  # fmt: skip


@pytest.mark.parametrize(("build", "case"), [(flux_controlnet, "flux"), (sd3_controlnet, "sd3")])
def test_controlnets(build: Callable[[], Tiny], case: str) -> None:
    model = build()
    without = model.run(controlnet_conditioning_scale=0.0)
    assert error(model.run(controlnet_conditioning_scale=1.0), without) > 1e-3
    check(model, case, controlnet_conditioning_scale=1.0)


def test_a_patch_within_a_patch_gives_way_to_it_again() -> None:
    model = wan()
    plain = model.run()
    diffpatch.patch(model.pipe, ROWS, dense_steps=1)
    outer = model.run()
    with diffpatch.patched(model.pipe, "window", window=-1, dense_steps=0):
        assert torch.equal(model.run(), plain)
    assert torch.equal(model.run(), outer)
    assert diffpatch.report(model.pipe).kept_per_step[0] == 1.0
    diffpatch.unpatch(model.pipe)
    assert torch.equal(model.run(), plain)


def test_an_inner_patch_of_one_expert_leaves_the_other_its_own() -> None:
    model = wan22()
    diffpatch.patch(model.pipe, ROWS, dense_steps=1)
    outer = model.run()
    with diffpatch.patched(model.pipe.transformer, "window", window=-1):
        assert not torch.equal(model.run(), outer)
    assert torch.equal(model.run(), outer)


def test_transformers_patched_one_by_one_are_reported_together() -> None:
    model = wan22()
    diffpatch.patch(model.pipe.transformer, ROWS)
    diffpatch.patch(model.pipe.transformer_2, "window", window=-1)
    model.run()
    report = diffpatch.report(model.pipe)
    kept = {name: report.kept_per_layer[f"{name}.0"] for name in ("transformer", "transformer_2")}
    assert kept["transformer"] < kept["transformer_2"] == 1
    assert report.layers == 4 and report.calls == 4  # the last forward of each
    assert report.reasons == {"pattern keeps everything": 2}
    assert report.method.count(";") == 1


def fused(model: Tiny) -> None:
    model.pipe.transformer.fuse_qkv_projections()


def sliced(model: Tiny) -> None:
    model.pipe.enable_attention_slicing()


def quantized(model: Tiny) -> None:
    blocks = model.pipe.transformer.transformer_blocks
    torch.ao.quantization.quantize_dynamic(blocks, {torch.nn.Linear}, inplace=True)


def offloaded_by_parts(model: Tiny) -> None:
    accelerate.cpu_offload(model.pipe.transformer, execution_device=torch.device("cpu"))


def offloaded_whole(model: Tiny) -> None:
    cpu = torch.device("cpu")
    accelerate.cpu_offload_with_hook(model.pipe.transformer, execution_device=cpu)


def on_another_backend(model: Tiny) -> None:
    for module in model.pipe.transformer.modules():
        if hasattr(getattr(module, "processor", None), "_attention_backend"):
            module.processor._attention_backend = "_native_math"


Change = Callable[[Tiny], None]
CHANGES: list[tuple[Callable[[], Tiny], Change]] = [
    (images.auraflow, fused),
    (videos.cogvideox, fused),
    (images.flux, fused),
    (images.flux, sliced),
    (images.sd3, sliced),
    (images.sd3, quantized),
    (videos.wan, offloaded_by_parts),
    (images.sd3, offloaded_by_parts),
    (videos.wan, offloaded_whole),
    (images.flux, on_another_backend),
]


@pytest.mark.parametrize(("build", "change"), CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("patched_first", [True, False])
def test_changes_around_a_patch(
    build: Callable[[], Tiny], change: Change, patched_first: bool
) -> None:
    """The patched model equals the unpatched one under a dense mask, both changed."""
    plain, model = build(), build()
    change(plain)
    with masked(subject(plain, build.__name__), LOCAL):
        expected = plain.run()
    if patched_first:
        diffpatch.patch(model.pipe, LOCAL, dense_steps=0)
        model.run()
    change(model)
    if not patched_first:
        diffpatch.patch(model.pipe, LOCAL, dense_steps=0)
    assert error(model.run(), expected) < 5e-5
    assert not diffpatch.report(model.pipe).reasons
    diffpatch.unpatch(model.pipe)
    assert torch.equal(model.run(), plain.run())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["wan", "flux"])
def test_gradients_are_those_of_attention_under_a_mask(name: str, checkpointing: bool) -> None:
    case = CASES[name]
    model = case.build()
    transformer = model.pipe.transformer
    transformer.requires_grad_(True)
    arguments = first_arguments(model)

    def gradients() -> list[torch.Tensor]:
        transformer.zero_grad()
        for seed in (0, 1):  # accumulated
            out = transformer(**arguments, return_dict=False)[0]
            out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)))
        return [p.grad.clone() for p in transformer.parameters() if p.grad is not None]

    dense = gradients()
    with masked(subject(model, name), LOCAL):
        expected = gradients()
    if checkpointing:
        transformer.train().enable_gradient_checkpointing()
    with diffpatch.patched(transformer, LOCAL):
        found = gradients()
        report = diffpatch.report(transformer)
    assert report.calls == len(case.layers) and not report.reasons
    worst = max(error(a, b) for a, b in zip(found, expected, strict=True))
    far = max(error(a, b) for a, b in zip(dense, expected, strict=True))
    assert worst < 1e-4 < 1e-2 < far


def test_recomputing_one_of_several_forwards_is_refused() -> None:
    transformer = wan_transformer().train()
    transformer.enable_gradient_checkpointing()
    diffpatch.patch(transformer, ROWS)
    outs = [
        transformer(noise(1, 16, 3, height, 8), torch.tensor([5]), noise(1, 7, 32))[0].mean()
        for height in (4, 6)
    ]
    with pytest.raises(DiffpatchError, match="backward after every forward"):
        sum(outs).backward()


def first_arguments(model: Tiny) -> dict[str, Any]:
    """Those of the first forward of a run."""
    seen: list[dict[str, Any]] = []

    def record(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs)

    hook = model.pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
    model.run()
    hook.remove()
    seen[0].pop("return_dict")
    return seen[0]
