"""The pattern of a method on any layout: of one grid, or of several in one sequence."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from diffpatch.methods.base import Method
from diffpatch.patterns.build import from_tiles
from diffpatch.patterns.grid import Grid, TokenGrid
from diffpatch.patterns.packed import compose
from diffpatch.patterns.pattern import BlockPattern
from diffpatch.patterns.tiles import Tiling, choose_tile


def pattern_on(method: Method, grid: Grid, variant: Hashable) -> BlockPattern:
    """The pattern of a method on a layout.

    Of a packed sequence, each grid gets the pattern that the method has for it alone; an image
    among videos stays exact under a method that only saves between frames.

    Args:
        method: any method.
        grid: one grid, or several in a sequence.
        variant: one of the values that ``method.variant`` returns.
    """
    if isinstance(grid, TokenGrid):
        return method.pattern(grid, variant)
    return compose(grid, [of_span(method, span, variant) for span in grid.grids])


def of_span(method: Method, grid: TokenGrid, variant: Hashable) -> BlockPattern:
    """The pattern that a grid of a packed sequence gets, as if it were alone."""
    if grid.num_frames > 1 or "image" in method.kinds:
        return method.pattern(grid, variant)
    tiling = Tiling.even(grid, choose_tile(grid.shape))
    return from_tiles(grid, tiling, torch.ones((tiling.num_visual,) * 2, dtype=torch.bool))
