"""What diffpatch knows about each diffusers transformer: one row a family.

A row says which modules are the self-attention over visual tokens, how the token grid follows from
the arguments of the forward, and where the visual tokens start. Nothing else differs between
families; everything behind these rows is shared. Classes are known by name, so that rows of models
that the installed diffusers lacks cost nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffpatch.pipelines import grids, presets
from diffpatch.pipelines.grids import REST, GridFunction
from diffpatch.pipelines.presets import Preset


@dataclass(frozen=True)
class FamilyInfo:
    """One row.

    Attributes:
        name: what people call it.
        transformer: diffusers' class name.
        kind: "video" or "image".
        modules: regular expression that full-matches the paths of its self-attention modules.
        grid: reads the token grid from the arguments of the transformer's forward.
        text: where always-visible tokens stand: "none", "before" or "after".
        presets: method name -> published setting.
        note: limits worth knowing.
        square_masks: whether the model's square masks are products m_i·m_j of one number a token,
            so that their diagonal says everything.
        refused: why this family cannot be patched; empty where it can.
    """

    name: str
    transformer: str
    kind: str
    modules: str = ""
    grid: GridFunction = grids.unknown
    text: str = "none"
    presets: Mapping[str, Preset] = field(default_factory=dict)
    note: str = ""
    square_masks: bool = False
    refused: str = ""


_BLOCKS = r"blocks\.\d+\.attn1"
_CROSS = r"transformer_blocks\.\d+\.attn1"  # text reaches the model through cross-attention, attn2
_JOINT = r"transformer_blocks\.\d+\.attn"
_JOINT_SINGLE = r"(single_)?transformer_blocks\.\d+\.attn"  # first two streams, then one

_VIDEO = grids.latents("BCFHW")
_IMAGE = grids.latents("BCHW")

_LINEAR = "its self-attention is already linear in the tokens: there is nothing to leave out"

_VIDEO_FAMILIES = (
    FamilyInfo(
        "Wan 2.1 / 2.2",
        "WanTransformer3DModel",
        "video",
        _BLOCKS,
        _VIDEO,
        presets=presets.WAN,
        note="T2V, I2V, TI2V; both experts of 2.2",
    ),
    FamilyInfo(
        "Wan VACE",
        "WanVACETransformer3DModel",
        "video",
        r"(vace_)?" + _BLOCKS,
        _VIDEO,
        note="reference images count as frames in front of the video",
    ),
    FamilyInfo(
        "Wan Animate",
        "WanAnimateTransformer3DModel",
        "video",
        _BLOCKS,
        _VIDEO,
        note="the reference image counts as the first frame",
    ),
    FamilyInfo(
        "HunyuanVideo",
        "HunyuanVideoTransformer3DModel",
        "video",
        _JOINT_SINGLE,
        grids.latents("BCFHW", after=grids.text),
        text="after",
        presets=presets.HUNYUAN,
        note="T2V and I2V; padded prompts are masked",
    ),
    FamilyInfo(
        "HunyuanVideo 1.5",
        "HunyuanVideo15Transformer3DModel",
        "video",
        _JOINT,
        grids.latents("BCFHW", after=REST),
        text="after",
        square_masks=True,
        note="diffusers itself builds a tokens × tokens mask in every layer",
    ),
    FamilyInfo(
        "CogVideoX 1.0 / 1.5",
        "CogVideoXTransformer3DModel",
        "video",
        _CROSS,
        grids.latents("BFCHW", before=grids.text),
        text="before",
    ),
    FamilyInfo(
        "Mochi 1",
        "MochiTransformer3DModel",
        "video",
        _CROSS,
        grids.latents("BCFHW", after=REST),
        text="after",
        presets=presets.MOCHI,
        note="prompts of different lengths are separate calls",
    ),
    FamilyInfo(
        "LTX-Video",
        "LTXVideoTransformer3DModel",
        "video",
        _CROSS,
        grids.placed_video,
        note="condition frames stay always visible",
    ),
    FamilyInfo(
        "LTX-2",
        "LTX2VideoTransformer3DModel",
        "video",
        _CROSS,
        grids.packed_video,
        note="video self-attention; audio stays as it is, keyframes stay always visible",
    ),
    FamilyInfo(
        "Cosmos 1 / 2 / 2.5",
        "CosmosTransformer3DModel",
        "video",
        _CROSS,
        _VIDEO,
        presets=presets.COSMOS,
    ),
    FamilyInfo(
        "SkyReels-V2",
        "SkyReelsV2Transformer3DModel",
        "video",
        _BLOCKS,
        _VIDEO,
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
    FamilyInfo("Allegro", "AllegroTransformer3DModel", "video", _CROSS, _VIDEO),
    FamilyInfo(
        "Latte",
        "LatteTransformer3DModel",
        "video",
        _CROSS,
        grids.latents("BC.HW"),
        note="spatial layers, by methods for images; the temporal ones see few tokens, stay dense",
    ),
)

_IMAGE_FAMILIES = (
    FamilyInfo(
        "Flux.1",
        "FluxTransformer2DModel",
        "image",
        _JOINT_SINGLE,
        grids.image_ids,
        text="before",
        note="dev, schnell, Kontext (reference tokens stay always visible), Fill, Control",
    ),
    FamilyInfo(
        "Flux.2",
        "Flux2Transformer2DModel",
        "image",
        _JOINT_SINGLE,
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
    FamilyInfo("PixArt-α / Σ", "PixArtTransformer2DModel", "image", _CROSS, _IMAGE),
    FamilyInfo(
        "QwenImage",
        "QwenImageTransformer2DModel",
        "image",
        _JOINT,
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
    FamilyInfo("HunyuanDiT", "HunyuanDiT2DModel", "image", _BLOCKS, _IMAGE),
    FamilyInfo(
        "Chroma",
        "ChromaTransformer2DModel",
        "image",
        _JOINT_SINGLE,
        grids.image_ids,
        text="before",
        square_masks=True,
        note="its prompt mask is an additive bias in diffusers, and stays one",
    ),
    FamilyInfo(
        "DiT",
        "DiTTransformer2DModel",
        "image",
        _CROSS,
        _IMAGE,
        note="class-conditional",
    ),
)

# Younger or rarer models that follow the pattern of one above.
_MORE_FAMILIES = (
    FamilyInfo("ChronoEdit", "ChronoEditTransformer3DModel", "video", _BLOCKS, _VIDEO),
    FamilyInfo(
        "AnyFlow",
        "AnyFlowTransformer3DModel",
        "video",
        _BLOCKS,
        grids.latents("BFCHW"),
        note="the bidirectional model",
    ),
    FamilyInfo(
        "ConsisID",
        "ConsisIDTransformer3DModel",
        "video",
        _CROSS,
        grids.latents("BFCHW", before=grids.text),
        text="before",
    ),
    FamilyInfo(
        "EasyAnimate",
        "EasyAnimateTransformer3DModel",
        "video",
        _CROSS,
        grids.latents("BCFHW", before=REST),
        text="before",
    ),
    FamilyInfo(
        "CogView 4",
        "CogView4Transformer2DModel",
        "image",
        _CROSS,
        grids.latents("BCHW", before=grids.text),
        text="before",
        square_masks=True,
    ),
    FamilyInfo(
        "CogView 3 Plus",
        "CogView3PlusTransformer2DModel",
        "image",
        _CROSS,
        grids.latents("BCHW", before=grids.text),
        text="before",
    ),
    FamilyInfo(
        "Bria 3.2",
        "BriaTransformer2DModel",
        "image",
        _JOINT_SINGLE,
        grids.image_ids,
        text="before",
    ),
    FamilyInfo(
        "LongCat-Image",
        "LongCatImageTransformer2DModel",
        "image",
        _JOINT_SINGLE,
        grids.image_ids,
        text="before",
        note="Edit: the reference image stays always visible",
    ),
    FamilyInfo(
        "Ovis-Image",
        "OvisImageTransformer2DModel",
        "image",
        _JOINT_SINGLE,
        grids.image_ids,
        text="before",
    ),
    FamilyInfo(
        "HunyuanImage 2.1",
        "HunyuanImageTransformer2DModel",
        "image",
        _JOINT_SINGLE,
        grids.latents("BCHW", after=REST),
        text="after",
        note="the refiner, whose latents have frames, runs dense",
    ),
)

_REFUSED = (
    FamilyInfo("Sana", "SanaTransformer2DModel", "image", refused=_LINEAR),
    FamilyInfo("Sana Video", "SanaVideoTransformer3DModel", "video", refused=_LINEAR),
    FamilyInfo(
        "Cosmos 3",
        "Cosmos3OmniTransformer",
        "video",
        refused="it packs text, video and sound into one ragged sequence with causal parts",
    ),
    FamilyInfo(
        "FramePack",
        "HunyuanVideoFramepackTransformer3DModel",
        "video",
        refused="its sequence mixes past frames of several scales, which no single grid describes",
    ),
)

FAMILIES: tuple[FamilyInfo, ...] = _VIDEO_FAMILIES + _IMAGE_FAMILIES + _MORE_FAMILIES + _REFUSED


def families() -> list[FamilyInfo]:
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
