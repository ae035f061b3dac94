"""Dense attention as a method: everything, in tiles, for the methods that wrap another one."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch

from diffpatch.methods.base import Method, param
from diffpatch.methods.registry import register
from diffpatch.patterns.build import from_tiles
from diffpatch.patterns.grid import TokenGrid
from diffpatch.patterns.pattern import BlockPattern
from diffpatch.patterns.tiles import MAX_TILE, Tiling, choose_tile

LARGE = 50_000  # visual tokens from which on tiles are twice as large
LARGEST = 2 * MAX_TILE


@register
@dataclass(frozen=True)
class Dense(Method):
    """Everything sees everything, cut into tiles: what ``"dense+temporal"`` starts from.

    Alone it changes nothing: calls run dense, and the report says so. What temporal attention
    remembers grows with the square of the number of tiles, so large grids get larger ones.
    """

    name = "dense"
    summary = "everything, for combinations such as dense+temporal; changes nothing by itself"
    source = "attention as it is"

    tile: int = param(0, "most tokens in a tile; 0 takes 128, and 256 above 50,000 tokens")

    def validate(self) -> None:
        fits = self.tile == 0 or 16 <= self.tile <= LARGEST
        self.check(fits, "tile", f"a count of tokens from 16 to {LARGEST}, or 0")

    def pattern(self, grid: TokenGrid, variant: Hashable = None) -> BlockPattern:
        most = self.tile or (LARGEST if grid.visual_tokens > LARGE else MAX_TILE)
        cuts = Tiling.even(grid, choose_tile(grid.shape, most)).cuts
        tiling = Tiling(grid, cuts, text_tile=min(most, MAX_TILE), nested=True)
        everything = torch.ones(tiling.num_visual, tiling.num_visual, dtype=torch.bool)
        return from_tiles(grid, tiling, everything)
