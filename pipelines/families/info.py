"""What a row of the table of families says, and the parts that many rows share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from diffpatch.pipelines.families import grids
from diffpatch.pipelines.families.grids import GridFunction
from diffpatch.pipelines.families.presets import Preset


@dataclass(frozen=True)
class Trained:
    """The largest size that public checkpoints were trained at, in tokens of their grid.

    Attributes:
        num_frames: frames; 1 for images.
        height: rows; None where it differs among checkpoints that look alike.
        width: columns; None as above.
        heads: attention heads that tell these checkpoints from others of their family; None fits
            any.
        time_patch: latent frames in a token that tell them from others; None fits any.
    """

    num_frames: int
    height: int | None = None
    width: int | None = None
    _: KW_ONLY
    heads: int | None = None
    time_patch: int | None = None

    def fits(self, heads: int | None, time_patch: int) -> bool:
        """Whether a model with so many heads and latent frames in a token may be one of these."""
        return self.heads in (None, heads) and self.time_patch in (None, time_patch)

    @property
    def size(self) -> tuple[int, int] | None:
        """Rows and columns, where they are known."""
        return None if self.height is None or self.width is None else (self.height, self.width)


@dataclass(frozen=True)
class FamilyInfo:
    """One row: what diffpatch knows about a transformer class of diffusers.

    The fields given by name are facts of diffusers' own pipelines and models, written down so that
    the table costs no import of them; the tests look every one of them up there.

    Attributes:
        name: what people call it.
        transformer: diffusers' class name.
        kind: "video" or "image".
        modules: regular expression that full-matches the paths of its self-attention modules.
        grid: reads the token grid from the arguments of the transformer's forward.
        text: where always-visible tokens stand: "none", "before" or "after"; "packed" where they
            are spans among grids.
        text_queries: whether that text asks, too; in some models it has keys and no queries, and
            their grid functions count it exactly.
        presets: method name -> published setting.
        note: limits worth knowing.
        square_masks: whether the model's square masks are products m_i·m_j of one number a token,
            so that their diagonal says everything.
        refused: why this family cannot be patched; empty where it can.
        guidance: how its pipelines call it with and without the prompt: "batch" (both in one
            forward), "calls" (one forward each), "distilled" (one forward, because the model was
            trained to need no second; two where a true guidance scale is given), or "" where
            diffusers has no pipeline for it.
        regional: whether diffusers can compile its blocks alone (`compile_repeated_blocks`);
            others compile as a whole.
        ulysses: whether diffusers has a plan that splits its sequence over several GPUs.
        cacheable: False where diffusers' FirstBlockCache fails in a forward of it: it reads the
            input of a block by the wrong name, or takes all blocks for alike.
        trained: what its public checkpoints were trained at, the first that fits a model; empty
            where that is not known.
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
    text_queries: bool = True
    refused: str = ""
    _: KW_ONLY
    guidance: str
    regional: bool
    ulysses: bool
    cacheable: bool = True
    trained: tuple[Trained, ...] = ()

    def trained_at(self, heads: int | None = None, time_patch: int | None = None) -> Trained | None:
        """What a model of this family was trained at; None where that is not known.

        Args:
            heads: attention heads of the model.
            time_patch: latent frames in one of its tokens.
        """
        return next((one for one in self.trained if one.fits(heads, time_patch or 1)), None)

    def trained_of(self, model: Any) -> Trained | None:
        """The same for a transformer, by its config."""
        if not self.trained:
            return None
        config = model.config
        return self.trained_at(config.get("num_attention_heads"), config.get("patch_size_t"))


BLOCKS = r"blocks\.\d+\.attn1"
CROSS = r"transformer_blocks\.\d+\.attn1"  # text reaches the model through cross-attention, attn2
JOINT = r"transformer_blocks\.\d+\.attn"
JOINT_SINGLE = r"(single_)?transformer_blocks\.\d+\.attn"  # first two streams, then one

VIDEO = grids.latents("BCFHW")
IMAGE = grids.latents("BCHW")
