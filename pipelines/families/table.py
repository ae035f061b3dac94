"""What diffpatch knows about each diffusers transformer: one row a family.

A row says which modules are the self-attention over visual tokens, how the token grid follows from
the arguments of the forward, and where the visual tokens start. Nothing else differs between
families; everything behind these rows is shared. Classes are known by name, so that rows of models
that the installed diffusers lacks cost nothing.
"""

from __future__ import annotations

import re
from typing import Any

from diffpatch.pipelines.families import grids, presets
from diffpatch.pipelines.families.grids import REST
from diffpatch.pipelines.families.info import (
    BLOCKS,
    CROSS,
    IMAGE,
    JOINT,
    JOINT_SINGLE,
    VIDEO,
    FamilyInfo,
)
from diffpatch.pipelines.families.rarer import MORE_FAMILIES, REFUSED

__all__ = ["FAMILIES", "FamilyInfo", "attention_modules", "family_of", "list_families"]

_VIDEO_FAMILIES = (
    FamilyInfo(
        "Wan 2.1 / 2.2",
        "WanTransformer3DModel",
        "video",
        BLOCKS,
        VIDEO,
        presets=presets.WAN,
        note="T2V, I2V, TI2V; both experts of 2.2",
    ),
    FamilyInfo(
        "Wan VACE",
        "WanVACETransformer3DModel",
        "video",
        r"(vace_)?" + BLOCKS,
        VIDEO,
        note="reference images count as frames in front of the video",
    ),
    FamilyInfo(
        "Wan Animate",
        "WanAnimateTransformer3DModel",
        "video",
        BLOCKS,
        VIDEO,
        note="the reference image counts as the first frame",
    ),
    FamilyInfo(
        "HunyuanVideo",
        "HunyuanVideoTransformer3DModel",
        "video",
        JOINT_SINGLE,
        grids.latents("BCFHW", after=grids.text),
        text="after",
        presets=presets.HUNYUAN,
        note="T2V and I2V; padded prompts are masked",
    ),
    FamilyInfo(
        "HunyuanVideo 1.5",
        "HunyuanVideo15Transformer3DModel",
        "video",
        JOINT,
        grids.latents("BCFHW", after=REST),
        text="after",
        square_masks=True,
        note="diffusers itself builds a tokens × tokens mask in every layer",
    ),
    FamilyInfo(
        "CogVideoX 1.0 / 1.5",
        "CogVideoXTransformer3DModel",
        "video",
        CROSS,
        grids.latents("BFCHW", before=grids.text),
        text="before",
    ),
    FamilyInfo(
        "Mochi 1",
        "MochiTransformer3DModel",
        "video",
        CROSS,
        grids.latents("BCFHW", after=REST),
        text="after",
        presets=presets.MOCHI,
        note="prompts of different lengths are separate calls",
    ),
    FamilyInfo(
        "LTX-Video",
        "LTXVideoTransformer3DModel",
        "video",
        CROSS,
        grids.placed_video,
        note="condition frames stay always visible",
    ),
    FamilyInfo(
        "LTX-2",
        "LTX2VideoTransformer3DModel",
        "video",
        CROSS,
        grids.packed_video,
        note="video self-attention; audio stays as it is, keyframes stay always visible",
    ),
    FamilyInfo(
        "Cosmos 1 / 2 / 2.5",
        "CosmosTransformer3DModel",
        "video",
        CROSS,
        VIDEO,
        presets=presets.COSMOS,
    ),
    FamilyInfo(
        "SkyReels-V2",
        "SkyReelsV2Transformer3DModel",
        "video",
        BLOCKS,
        VIDEO,
        note="T2V, I2V, diffusion forcing; the block-causal mode runs dense",
    ),
    FamilyInfo(
        "Kandinsky 5",
        "Kandinsky5Transformer3DModel",
        "video",
        r"visual_transformer_blocks\.\d+\.self_attention",
        grids.latents("BFHWC"),
        note="NABLA checkpoints are sparse by themselves and run as they are",
    ),
    FamilyInfo("Allegro", "AllegroTransformer3DModel", "video", CROSS, VIDEO),
    FamilyInfo(
        "Latte",
        "LatteTransformer3DModel",
        "video",
        CROSS,
        grids.latents("BC.HW"),
        note="spatial layers, by methods for images; the temporal ones see few tokens, stay dense",
    ),
)

_IMAGE_FAMILIES = (
    FamilyInfo(
        "Flux.1",
        "FluxTransformer2DModel",
        "image",
        JOINT_SINGLE,
        grids.image_ids,
        text="before",
        note="dev, schnell, Kontext (reference tokens stay always visible), Fill, Control",
    ),
    FamilyInfo(
        "Flux.2",
        "Flux2Transformer2DModel",
        "image",
        JOINT_SINGLE,
        grids.image_ids,
        text="before",
        note="dev and Klein; reference images stay always visible, with a KV cache it runs dense",
    ),
    FamilyInfo(
        "Stable Diffusion 3 / 3.5",
        "SD3Transformer2DModel",
        "image",
        r"transformer_blocks\.\d+\.attn2?",  # attn2: image only, in the dual layers of 3.5 medium
        grids.latents("BCHW", after=REST),
        text="after",
    ),
    FamilyInfo("PixArt-α / Σ", "PixArtTransformer2DModel", "image", CROSS, IMAGE),
    FamilyInfo(
        "QwenImage",
        "QwenImageTransformer2DModel",
        "image",
        JOINT,
        grids.image_shapes,
        text="before",
        note="Edit and Layered: all images but the first stay always visible",
    ),
    FamilyInfo(
        "Z-Image",
        "ZImageTransformer2DModel",
        "image",
        r"layers\.\d+\.attention",
        grids.image_list,
        text="after",
        note="omni mode runs dense",
    ),
    FamilyInfo(
        "HiDream-I1",
        "HiDreamImageTransformer2DModel",
        "image",
        r"(double|single)_stream_blocks\.\d+\.block\.attn1",
        grids.latents("BCHW", after=REST),
        text="after",
        note="the padding of images that are not square stays always visible",
    ),
    FamilyInfo(
        "Lumina 2",
        "Lumina2Transformer2DModel",
        "image",
        r"layers\.\d+\.attn",
        grids.latents("BCHW", before=REST),
        text="before",
        note="prompts of different lengths in one batch run dense",
    ),
    FamilyInfo(
        "AuraFlow",
        "AuraFlowTransformer2DModel",
        "image",
        r"(joint|single)_transformer_blocks\.\d+\.attn",
        grids.latents("BCHW", before=REST),
        text="before",
    ),
    FamilyInfo("HunyuanDiT", "HunyuanDiT2DModel", "image", BLOCKS, IMAGE),
    FamilyInfo(
        "Chroma",
        "ChromaTransformer2DModel",
        "image",
        JOINT_SINGLE,
        grids.image_ids,
        text="before",
        square_masks=True,
        note="its prompt mask is an additive bias in diffusers, and stays one",
    ),
    FamilyInfo(
        "DiT",
        "DiTTransformer2DModel",
        "image",
        CROSS,
        IMAGE,
        note="class-conditional",
    ),
)

FAMILIES: tuple[FamilyInfo, ...] = _VIDEO_FAMILIES + _IMAGE_FAMILIES + MORE_FAMILIES + REFUSED


def list_families() -> list[FamilyInfo]:
    """All families, in the order of the table."""
    return list(FAMILIES)


def family_of(model: Any) -> FamilyInfo | None:
    """The family of a transformer, or None."""
    names = {cls.__name__ for cls in type(model).__mro__}
    return next((f for f in FAMILIES if f.transformer in names), None)


def attention_modules(model: Any, family: FamilyInfo) -> list[tuple[str, Any]]:
    """(path, module) of the self-attention over visual tokens, in the order of the model."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if re.fullmatch(family.modules, path) and hasattr(module, "processor")
    ]
