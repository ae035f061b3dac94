"""Window attention: the grid is partitioned into windows, which change with the layer or step."""

from __future__ import annotations

import itertools
import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from diffpatch.methods import axis
from diffpatch.methods.base import Method, param
from diffpatch.methods.registry import register
from diffpatch.methods.sizes import KEPT, ROUNDS, check_kept, nearest
from diffpatch.patterns.build import from_axes
from diffpatch.patterns.grid import TokenGrid
from diffpatch.patterns.pattern import BlockPattern
from diffpatch.patterns.tiles import Cuts, Tiling, choose_tile, equal_cuts, refine, step_cuts

SHIFTS = ("layer", "step", "random", "count", "none")


@register
@dataclass(frozen=True)
class Window(Method):
    """Partitioned windows. Tokens see exactly the tokens of their own window.

    Sizes are one number for all axes or three: ints are tokens, floats fractions of the axis, -1
    the whole axis. Grids that a window does not divide end in smaller windows. So that information
    crosses the borders, the partition changes; nothing wraps around:

    - ``shift="layer"`` or ``"step"``: it moves by half a window every other time (Swin).
    - ``"random"``: on every step it moves by 0, ¼, ½ or ¾ of a window, drawn from `seed` and the
      number of the step and nothing else (HiDiffusion).
    - ``"count"``: every other layer has one window more along the axes that are cut (UltraGen).

    `heads` holds the windows of equal groups of heads; `Window.cross` is such a case.
    """

    name = "window"
    summary = "the grid is cut into windows, which move from layer to layer or step to step"
    source = (
        "Swin, arXiv 2103.14030; HiDiffusion, arXiv 2311.17528; UltraGen, arXiv 2510.18775;"
        " CSWin, arXiv 2107.00652"
    )
    default_dense_steps = 0.25
    kept_parameters = ("kept", "window", "heads")

    window: axis.Sizes = param(
        (-1, 0.5, 0.5), "size of a window along each axis: int, fraction, or -1 for all"
    )
    shift: str = param("layer", "what moves the partition: layer, step, random, count or none")
    seed: int = param(0, "of the moves of shift='random'")
    heads: tuple[axis.Sizes, ...] = param(
        (), "windows of equal groups of heads, instead of one window"
    )
    kept: float | None = KEPT

    def validate(self) -> None:
        self.check(self.shift in SHIFTS, "shift", f"one of {', '.join(SHIFTS)}")
        self.check(axis.are_sizes(self.window), "window", axis.SIZES)
        windows = all(map(axis.are_sizes, self.heads))
        self.check(windows, "heads", f"made of windows, each {axis.SIZES}")
        check_kept(self, self.heads)

    @classmethod
    def cross(cls, stripe: axis.Size) -> Window:
        """Cross-shaped windows: half of the heads see stripes of rows, the others of columns.

        Args:
            stripe: thickness of a stripe, in tokens or as a fraction (CSWin, arXiv 2107.00652).
        """
        return cls(heads=((-1, stripe, -1), (-1, -1, stripe)), shift="none")

    def with_kept(self, kept: float, kind: str = "video") -> Window:
        return replace(self, kept=kept, heads=())

    def sized(self, grid: TokenGrid) -> Window:
        """This method with the window that keeps `kept` of the visual pairs of a grid."""
        kind = "image" if grid.num_frames == 1 else "video"
        variants = sorted({self.variant(*place) for place in ROUNDS})

        def share(method: Window) -> float:
            """Of the visual pairs, the mean over what the partition moves through."""
            return sum(method._share(grid, variant) for variant in variants) / len(variants)

        assert self.kept is not None
        return nearest(lambda kept: self._cut(kept, kind), share, self.kept)

    def _share(self, grid: TokenGrid, variant: int) -> float:
        """Of the visual pairs that one partition keeps."""
        kept = 1.0
        for length, borders in zip(
            grid.shape, self._borders(grid, self.window, variant), strict=True
        ):
            kept *= sum((b - a) ** 2 for a, b in itertools.pairwise(borders)) / length**2
        return kept

    def _cut(self, kept: float, kind: str) -> Window:
        """The window that keeps about a fraction: near, where windows do not divide the grid."""
        # A video is cut along its width first, then also its height, then also time.
        cut = [max(kept, 0.5), min(max(2 * kept, 0.5), 1.0), min(4 * kept, 1.0)]
        width, height, time = cut if kind == "video" else [kept**0.5] * 2 + [1.0]
        if time < 0.5:
            width = height = time = kept ** (1 / 3)
        t, h, w = (axis.part(share) for share in (time, height, width))
        return replace(self, window=(t, h, w), kept=None)

    def variant(self, layer: int, step: int) -> int:
        """Quarters of a window by which the partition moves; for "count", windows that it adds."""
        if self.shift == "random":
            return random.Random(f"{self.seed}, {step}").randrange(4)
        if self.shift == "count":
            return layer % 2
        return {"layer": layer, "step": step, "none": 0}[self.shift] % 2 * 2

    def pattern(self, grid: TokenGrid, variant: Hashable = 0) -> BlockPattern:
        assert isinstance(variant, int)
        if self.kept is not None:
            return self.sized(grid).pattern(grid, variant)
        windows = self.heads or (self.window,)
        return partitioned(grid, [self._borders(grid, window, variant) for window in windows])

    def _borders(self, grid: TokenGrid, window: axis.Sizes, variant: int) -> list[Cuts]:
        """Where the windows end, along each axis."""
        names = ("time", "height", "width")
        borders: list[Cuts] = []
        for size, length, name in zip(axis.sizes(window), grid.shape, names, strict=True):
            step = axis.resolve(size, length, f"window along {name}")
            if step == length:
                borders.append((0, length))
            elif self.shift == "count":
                count = min(length, round(length / step) + variant)
                borders.append(equal_cuts(length, count))
            else:
                borders.append(step_cuts(length, step, variant * step // 4))
        return borders


def partitioned(grid: TokenGrid, groups: Sequence[Sequence[Cuts]]) -> BlockPattern:
    """The pattern in which tokens see their own window.

    Args:
        grid: the tokens.
        groups: for equal groups of heads, where the windows end along each axis.
    """
    # Tiles never straddle a window of any head, so every tile is visited whole or not at all.
    cuts = [tuple(sorted(set().union(*along))) for along in zip(*groups, strict=True)]
    tile = choose_tile([max(b - a for a, b in itertools.pairwise(c)) for c in cuts])
    t, h, w = (refine(c, size) for c, size in zip(cuts, tile, strict=True))
    rules = [[axis.partition(borders) for borders in group] for group in groups]
    heads = range(len(groups)) if len(groups) > 1 else None
    return from_axes(grid, Tiling(grid, (t, h, w)), rules, heads)
