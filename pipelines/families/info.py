"""What a row of the families table says, and the parts that many rows share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from diffpatch.pipelines.families import grids
from diffpatch.pipelines.families.grids import GridFunction
from diffpatch.pipelines.families.presets import Preset
from diffpatch.pipelines.families.traits import TRAITS, Traits


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

    @property
    def traits(self) -> Traits:
        """How its pipelines guide, compile and spread."""
        return TRAITS.get(self.transformer, Traits())


BLOCKS = r"blocks\.\d+\.attn1"
CROSS = r"transformer_blocks\.\d+\.attn1"  # text reaches the model through cross-attention, attn2
JOINT = r"transformer_blocks\.\d+\.attn"
JOINT_SINGLE = r"(single_)?transformer_blocks\.\d+\.attn"  # first two streams, then one

VIDEO = grids.latents("BCFHW")
IMAGE = grids.latents("BCHW")
