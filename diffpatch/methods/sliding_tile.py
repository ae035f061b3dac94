"""Sliding tile attention: every tile of queries sees the whole tiles around it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch

from diffpatch.methods import axis
from diffpatch.methods.base import Method, param
from diffpatch.methods.registry import register
from diffpatch.methods.sizes import KEPT, check_kept
from diffpatch.patterns.axes import outer
from diffpatch.patterns.build import from_tiles
from diffpatch.patterns.grid import TokenGrid
from diffpatch.patterns.pattern import BlockPattern
from diffpatch.patterns.tiles import Cuts, Tiling, choose_tile, even_cuts, refine


@register
@dataclass(frozen=True)
class SlidingTile(Method):
    """Sliding Tile Attention (arXiv 2502.04507): no tile is ever visited in part.

    The grid is cut into tiles, and every token sees the tiles within ⌊window / 2⌋ of its own along
    each axis, shifted inwards at the edges. The paper's tiles are 6×8×8 tokens; here any grid runs,
    cut into tiles of at most that size, as equal as possible.
    """

    name = "sliding_tile"
    summary = "every tile of tokens sees the whole tiles around it"
    source = "STA, arXiv 2502.04507"
    default_dense_steps = 0.3  # 15 of 50 steps
    kept_parameters = ("kept", "window")

    window: axis.Sizes = param(0.6, "tiles along each axis: int, fraction, or -1 for all")
    tile: tuple[int, int, int] = param((6, 8, 8), "most tokens of a tile along each axis")
    kept: float | None = KEPT

    def validate(self) -> None:
        self.check(axis.are_sizes(self.window), "window", axis.SIZES)
        self.check(min(self.tile) >= 1, "tile", "three positive ints")
        check_kept(self)

    def sized(self, grid: TokenGrid) -> SlidingTile:
        """This method with the windows that keep `kept` of the visual pairs of a grid."""
        assert self.kept is not None
        tiles = [-(-n // most) for n, most in zip(grid.shape, self.tile, strict=True)]
        # As many tiles on the left as on the right, or all.
        shares = [{s: s / n for s in (*range(1, n, 2), n)} for n in tiles]
        return replace(self, window=axis.box(shares, self.kept), kept=None)

    def pattern(self, grid: TokenGrid, variant: Hashable = None) -> BlockPattern:
        if self.kept is not None:
            return self.sized(grid).pattern(grid)
        finer = choose_tile([min(t, n) for t, n in zip(self.tile, grid.shape, strict=True)])
        names = ("time", "height", "width")
        cuts, keep = [], []
        for i, length in enumerate(grid.shape):
            tiles = even_cuts(length, self.tile[i])
            cuts.append(refine(tiles, finer[i]))  # tiles larger than a kernel's are cut further
            size = axis.sizes(self.window)[i]
            count = len(tiles) - 1
            span = count if size == -1 else _span(size, count, f"window of tiles along {names[i]}")
            part = _tile_of(cuts[i], tiles)
            keep.append(_slide(count, span)[part[:, None], part])
        t, h, w = cuts
        return from_tiles(grid, Tiling(grid, (t, h, w)), outer(keep))


def _span(size: axis.Size, count: int, what: str) -> int:
    """Tiles that a window covers: as many on the left as on the right, as in the paper."""
    if isinstance(size, float) and size < 1:
        size = min(count, 2 * round((size * count - 1) / 2) + 1)
    whole = isinstance(size, float) or size == count
    return count if whole else min(count, 2 * (axis.resolve(size, count, what) // 2) + 1)


def _slide(count: int, span: int) -> torch.Tensor:
    """bool (count, count): windows of `span` tiles, shifted inwards."""
    tile = torch.arange(count)
    start = (tile - span // 2).clamp(0, count - span)[:, None]
    return (tile >= start) & (tile < start + span)


def _tile_of(fine: Cuts, coarse: Cuts) -> torch.Tensor:
    """int64, the coarse tile that each fine one lies in."""
    return torch.bucketize(torch.tensor(fine[:-1]), torch.tensor(coarse[1:-1]), right=True)
