"""Cutting a token grid into tiles: boxes of neighbouring tokens that a kernel handles as one block.

Edge tiles are simply smaller, so any grid runs and nothing is padded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from diffpatch.errors import BadParameter
from diffpatch.patterns.grid import TokenGrid

MAX_TILE = (
    128  # tokens; the block of every kernel here, and of FlashAttention-like kernels in general
)

Cuts = tuple[int, ...]  # (0, …, length): the borders of the tiles along one axis


def even_cuts(length: int, tile: int) -> Cuts:
    """Borders of the fewest tiles of at most `tile` tokens, made as equal as possible.

    >>> even_cuts(10, 4)
    (0, 3, 7, 10)
    """
    return equal_cuts(length, math.ceil(length / tile))


def equal_cuts(length: int, count: int) -> Cuts:
    """Borders of that many tiles, as equal as possible.

    >>> equal_cuts(10, 4)
    (0, 2, 5, 7, 10)
    """
    return (*(round(i * length / count - 1e-9) for i in range(count)), length)


def step_cuts(length: int, step: int, offset: int = 0) -> Cuts:
    """Borders at every multiple of `step` (shifted by `offset`); the outer tiles may be smaller.

    >>> step_cuts(10, 4), step_cuts(10, 4, offset=2)
    ((0, 4, 8, 10), (0, 2, 6, 10))
    """
    inner = range(offset % step, length, step)
    return (0, *(i for i in inner if i > 0), length)


def refine(cuts: Cuts, tile: int) -> Cuts:
    """Cut further, so that no tile exceeds `tile` tokens and every old border stays."""
    finer = [a + c for a, b in itertools.pairwise(cuts) for c in even_cuts(b - a, tile)[:-1]]
    return (*finer, cuts[-1])


def choose_tile(
    shape: Sequence[int], max_tokens: int = MAX_TILE, limits: Sequence[int] | None = None
) -> tuple[int, int, int]:
    """The box of at most `max_tokens` tokens that cuts this grid with the least waste.

    Waste is what a kernel with fixed blocks pays for tiles that are not full; among nearly equal
    boxes the most cube-like wins, because compact tiles make windows keep fewer keys.

    Args:
        shape: (num_frames, height, width) of the grid.
        max_tokens: tokens a tile may hold.
        limits: longest extent along each axis; the grid's own where not given.
    """
    frames, height, width = shape
    longest = [min(a, b) for a, b in zip(shape, limits or shape, strict=True)]
    best: tuple[float, tuple[int, int, int]] = (math.inf, (1, 1, 1))
    for t in range(1, min(longest[0], max_tokens) + 1):
        for h in range(1, min(longest[1], max_tokens // t) + 1):
            w = min(longest[2], max_tokens // (t * h))
            w = math.ceil(width / math.ceil(width / w))  # the even size with as many tiles
            tiles = math.ceil(frames / t) * math.ceil(height / h) * math.ceil(width / w)
            waste = tiles * max_tokens / (frames * height * width)
            sides = [side for side, length in ((t, frames), (h, height), (w, width)) if length > 1]
            stretch = max(sides, default=1) / min(sides, default=1)
            # Twice the stretch weighs as much as 2 % of waste: a mild preference for compact boxes.
            best = min(best, (waste * (1 + 0.02 * math.log2(stretch)), (t, h, w)))
    return best[1]


@dataclass(frozen=True)
class Tiling:
    """A grid cut into tiles along each axis, and its text into runs of at most `text_tile` tokens.

    Tile order: tiles of the text before, then visual tiles (time, row, column), then the text
    after; inside a tile, tokens keep the order of the sequence, or stand in that of `halved`.

    Attributes:
        grid: the grid that is cut.
        cuts: borders along (time, height, width), each from 0 to the length of the axis.
        text_tile: most tokens in a tile of text.
        nested: whether visual tiles are halved again and again, so that pieces of one are compact.
    """

    grid: TokenGrid
    cuts: tuple[Cuts, Cuts, Cuts]
    text_tile: int = MAX_TILE
    nested: bool = False

    def __post_init__(self) -> None:
        for cuts, length in zip(self.cuts, self.grid.shape, strict=True):
            rising = all(a < b for a, b in itertools.pairwise(cuts))
            if not rising or cuts[0] != 0 or cuts[-1] != length:
                raise BadParameter(
                    f"tile borders {cuts} must rise from 0 to the axis length {length}"
                )

    @classmethod
    def even(cls, grid: TokenGrid, tile: Sequence[int]) -> Tiling:
        """Tiles of about the given (t, h, w), as equal as possible."""
        t, h, w = (even_cuts(n, size) for n, size in zip(grid.shape, tile, strict=True))
        return cls(grid, (t, h, w))

    @property
    def counts(self) -> tuple[int, int, int]:
        """Visual tiles along (time, height, width)."""
        t, h, w = (len(c) - 1 for c in self.cuts)
        return t, h, w

    @property
    def num_visual(self) -> int:
        return math.prod(self.counts)

    @cached_property
    def text_sizes(self) -> tuple[list[int], list[int]]:
        """Tokens of each text tile, before and after the visual ones."""

        def sizes(n: int) -> list[int]:
            return [min(self.text_tile, n - i) for i in range(0, n, self.text_tile)]

        return sizes(self.grid.text_before), sizes(self.grid.text_after)

    @cached_property
    def visual_sizes(self) -> torch.Tensor:
        """int64 (num_visual,): tokens of each visual tile."""
        t, h, w = (torch.tensor(c).diff() for c in self.cuts)
        return (t[:, None, None] * h[None, :, None] * w).flatten()

    @cached_property
    def sizes(self) -> torch.Tensor:
        """int64 (num_tiles,): tokens of every tile, in tile order."""
        before, after = (torch.tensor(s, dtype=torch.int64) for s in self.text_sizes)
        return torch.cat([before, self.visual_sizes, after])

    @property
    def max_tokens(self) -> int:
        """Tokens of the largest tile."""
        return int(self.sizes.max())

    def order(self) -> torch.Tensor:
        """int64 (num_tokens,): the sequence index of the token at each place of tile order."""
        grid = self.grid
        tile_of = [
            torch.bucketize(torch.arange(n), torch.tensor(c[1:-1]), right=True)
            for n, c in zip(grid.shape, self.cuts, strict=True)
        ]
        _, rows, columns = self.counts
        t, h, w = tile_of[0][:, None, None], tile_of[1][None, :, None], tile_of[2]
        tile = ((t * rows + h) * columns + w).flatten()
        visual = tile.argsort(stable=True)
        if self.nested:
            visual = visual[self._nested_places()]
        visual = visual + grid.text_before
        before = torch.arange(grid.text_before)
        after = torch.arange(grid.num_tokens - grid.text_after, grid.num_tokens)
        return torch.cat([before, visual, after])

    def _nested_places(self) -> torch.Tensor:
        """int64 (visual_tokens,): where the token at each place stood in plain tile order."""
        sides = ([b - a for a, b in itertools.pairwise(c)] for c in self.cuts)
        found, begin = [], 0
        for box in itertools.product(*sides):
            found.append(halved(box) + begin)
            begin += math.prod(box)
        return torch.cat(found)


@lru_cache(maxsize=256)
def halved(box: tuple[int, int, int]) -> torch.Tensor:
    """int64 (tokens,): a box in the order that halving its longest side again and again gives.

    Runs of a half, a quarter and so on of the tokens are compact boxes themselves. Of equal sides
    the last is halved, so that frames, which resemble each other most, stay together longest.

    >>> halved((1, 2, 4)).tolist()
    [0, 4, 1, 5, 2, 6, 3, 7]
    """
    places = torch.arange(math.prod(box)).view(box)

    def order(part: torch.Tensor) -> list[torch.Tensor]:
        if part.numel() == 1:
            return [part.flatten()]
        axis = max(range(3), key=lambda n: (part.shape[n], n))
        first = part.shape[axis] // 2
        return [x for half in part.tensor_split([first], axis) for x in order(half)]

    return torch.cat(order(places))


def raster(grid: TokenGrid, block: int = MAX_TILE) -> Tiling:
    """Blocks of `block` consecutive visual tokens, whatever row or frame they belong to."""
    line = TokenGrid(1, 1, grid.visual_tokens, grid.text_before, grid.text_after)
    return Tiling(line, ((0, 1), (0, 1), step_cuts(line.width, block)), block)
