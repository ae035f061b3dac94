"""Families beside the well-known ones: younger or rarer models, and those that are refused."""

from __future__ import annotations

from diffpatch.pipelines import grids
from diffpatch.pipelines.family import BLOCKS, CROSS, JOINT_SINGLE, VIDEO, FamilyInfo
from diffpatch.pipelines.grids import REST

LINEAR = "its self-attention is already linear in the tokens: there is nothing to leave out"

# Younger or rarer models that follow the pattern of one above.
MORE_FAMILIES = (
    FamilyInfo("ChronoEdit", "ChronoEditTransformer3DModel", "video", BLOCKS, VIDEO),
    FamilyInfo(
        "AnyFlow",
        "AnyFlowTransformer3DModel",
        "video",
        BLOCKS,
        grids.latents("BFCHW"),
        note="the bidirectional model",
    ),
    FamilyInfo(
        "ConsisID",
        "ConsisIDTransformer3DModel",
        "video",
        CROSS,
        grids.latents("BFCHW", before=grids.text),
        text="before",
    ),
    FamilyInfo(
        "EasyAnimate",
        "EasyAnimateTransformer3DModel",
        "video",
        CROSS,
        grids.latents("BCFHW", before=REST),
        text="before",
    ),
    FamilyInfo(
        "CogView 4",
        "CogView4Transformer2DModel",
        "image",
        CROSS,
        grids.latents("BCHW", before=grids.text),
        text="before",
        square_masks=True,
    ),
    FamilyInfo(
        "CogView 3 Plus",
        "CogView3PlusTransformer2DModel",
        "image",
        CROSS,
        grids.latents("BCHW", before=grids.text),
        text="before",
    ),
    FamilyInfo(
        "Bria 3.2",
        "BriaTransformer2DModel",
        "image",
        JOINT_SINGLE,
        grids.image_ids,
        text="before",
    ),
    FamilyInfo(
        "LongCat-Image",
        "LongCatImageTransformer2DModel",
        "image",
        JOINT_SINGLE,
        grids.image_ids,
        text="before",
        note="Edit: the reference image stays always visible",
    ),
    FamilyInfo(
        "Ovis-Image",
        "OvisImageTransformer2DModel",
        "image",
        JOINT_SINGLE,
        grids.image_ids,
        text="before",
    ),
    FamilyInfo(
        "HunyuanImage 2.1",
        "HunyuanImageTransformer2DModel",
        "image",
        JOINT_SINGLE,
        grids.latents("BCHW", after=REST),
        text="after",
        note="the refiner, whose latents have frames, runs dense",
    ),
)

REFUSED = (
    FamilyInfo("Sana", "SanaTransformer2DModel", "image", refused=LINEAR),
    FamilyInfo("Sana Video", "SanaVideoTransformer3DModel", "video", refused=LINEAR),
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
