"""Window attention: the grid is partitioned into windows, shifted on every other layer or step."""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from dataclasses import dataclass, replace

from diffpatch.grid import TokenGrid
from diffpatch.methods import axis
from diffpatch.methods.base import Method, param, register
from diffpatch.pattern import BlockPattern, from_axes
from diffpatch.tiles import Tiling, choose_tile, refine, step_cuts


@register
@dataclass(frozen=True)
class Window(Method):
    """Partitioned windows. Tokens see exactly the tokens of their own window.

    Sizes are one number for all axes or three: ints are tokens, floats fractions of the axis, -1
    the whole axis. Grids that a window does not divide end in smaller windows. Every second layer
    (or step) the partition moves by half a window, so that information crosses the borders; nothing
    wraps around.
    """

    name = "window"
    summary = "the grid is cut into windows, shifted by half on every other layer or step"
    source = "Swin, arXiv 2103.14030; HiDiffusion, arXiv 2311.17528"
    default_dense_steps = 0.25
    size_parameters = ("window",)

    window: axis.Size | tuple[axis.Size, ...] = param(
        (-1, 0.5, 0.5), "size of a window along each axis: int, fraction, or -1 for all"
    )
    shift: str = param("layer", "what moves the partition by half a window: layer, step or none")

    def __post_init__(self) -> None:
        self.check(self.shift in ("layer", "step", "none"), "shift", "'layer', 'step' or 'none'")
        axis.triple(self.window)

    def sized(self, amount: float, kind: str = "video") -> Window:
        # A video is cut along its width first, then also its height, then also time.
        cut = [max(amount, 0.5), min(max(2 * amount, 0.5), 1.0), min(4 * amount, 1.0)]
        width, height, time = cut if kind == "video" else [amount**0.5] * 2 + [1.0]
        if time < 0.5:
            width = height = time = amount ** (1 / 3)
        return replace(self, window=tuple(axis.part(share) for share in (time, height, width)))

    def variant(self, layer: int, step: int) -> bool:
        """Whether the partition is shifted."""
        return {"layer": layer, "step": step, "none": 0}[self.shift] % 2 == 1

    def pattern(self, grid: TokenGrid, variant: Hashable = False) -> BlockPattern:
        names = ("time", "height", "width")
        borders = []
        for size, length, name in zip(axis.triple(self.window), grid.shape, names, strict=True):
            step = axis.resolve(size, length, f"window along {name}")
            offset = step // 2 if variant and step < length else 0
            borders.append(step_cuts(length, step, offset))
        # Tiles never straddle a window, so every tile is visited whole or not at all.
        largest = [max(b - a for a, b in itertools.pairwise(c)) for c in borders]
        tile = choose_tile(largest)
        t, h, w = (refine(c, size) for c, size in zip(borders, tile, strict=True))
        return from_axes(grid, Tiling(grid, (t, h, w)), [[axis.partition(c) for c in borders]])
