"""Radial attention: the further apart two frames are, the smaller the window between them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

from diffpatch.errors import BadParameter
from diffpatch.methods.base import Method, param
from diffpatch.methods.radial import rules as radial_rules
from diffpatch.methods.registry import register
from diffpatch.patterns.build import from_tiles
from diffpatch.patterns.grid import TokenGrid
from diffpatch.patterns.pattern import BlockPattern
from diffpatch.patterns.tiles import raster


@register
@dataclass(frozen=True)
class Radial(Method):
    """Radial Attention (arXiv 2506.19852): windows that shrink with the distance between frames.

    A query sees all of its own frame and of the next to it; from there on, the window halves every
    time the distance doubles. All queries see the first frame (the sink).

    ``rule="published"`` reproduces the masks that the paper measured: bands over the raster order,
    rounded to 128-token blocks. ``rule="tiles"`` spends the same budget on two-dimensional windows
    of whole tiles. At the edges of a frame these are shifted inwards, where raster bands would be
    cut in half and leave visible glitches.

    `kept` sets the budget directly: all windows grow or shrink, in the proportions that `decay`
    gives them, until they cover that fraction of the pairs. If the near frames and the first one
    alone cost more than that, these shrink too.
    """

    name = "radial"
    summary = "windows that halve whenever the distance between frames doubles"
    source = "Radial Attention, arXiv 2506.19852"
    kinds = ("video",)
    default_dense_steps = 0.25
    default_dense_layers = 1
    kept_parameters = ("kept", "decay")

    decay: float = param(0.5, "width of the windows; the published presets are 0.2 to 1")
    rule: str = param("tiles", "'tiles' (2-D windows on tiles) or 'published' (raster bands)")
    sink: bool = param(True, "every token sees the whole first frame")
    kept: float | None = param(None, "fraction of the pairs to keep (rule 'tiles'), or None")

    def validate(self) -> None:
        self.check(self.decay > 0, "decay", "positive")
        self.check(self.rule in ("tiles", "published"), "rule", "'tiles' or 'published'")
        if self.kept is not None:
            self.check(0 < self.kept <= 1, "kept", "in (0, 1], or None")
            self.check(self.rule == "tiles", "kept", "None with rule='published'; set decay")

    def with_kept(self, kept: float, kind: str = "video") -> Radial:
        if self.rule == "published":  # its only knob; the published presets are 0.2 to 1
            return replace(self, decay=min(kept, 0.99) / (1 - min(kept, 0.99)))
        return replace(self, kept=kept)

    def pattern(self, grid: TokenGrid, variant: Hashable = None) -> BlockPattern:
        if grid.num_frames < 2:
            raise BadParameter(
                f"radial: the grid {grid} has one frame, so nothing can be saved between frames;"
                " use neighborhood or window for images"
            )
        if self.rule == "published":
            keep = radial_rules.published(grid, self.decay, self.sink)
            return from_tiles(grid, raster(grid), keep)
        tiling, keep = radial_rules.tiles(grid, self.decay, self.sink, self.kept)
        return from_tiles(grid, tiling, keep)
