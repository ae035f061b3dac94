"""Disc attention: every query sees the keys within a radius of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch

from diffpatch.methods import axis
from diffpatch.methods.base import Method, param
from diffpatch.methods.registry import register
from diffpatch.methods.sizes import KEPT, check_kept
from diffpatch.patterns.axes import distinct
from diffpatch.patterns.build import from_masks
from diffpatch.patterns.grid import TokenGrid
from diffpatch.patterns.pattern import BlockPattern
from diffpatch.patterns.tiles import Tiling, choose_tile


@register
@dataclass(frozen=True)
class Disc(Method):
    """CLEAR's circular window (arXiv 2412.16112): keys with Δh² + Δw² < radius² are seen.

    Discs are cut off at the edges of the frame, not shifted, so tokens there see fewer keys. Videos
    also take a window along time. The paper distils its models for radii of 8, 16 and 32; without
    that the larger ones serve better.
    """

    name = "disc"
    summary = "every token sees the tokens within a radius of it"
    source = "CLEAR, arXiv 2412.16112"
    default_dense_steps = 0.25
    kept_parameters = ("kept", "radius", "time")

    radius: int | float = param(0.3, "int: tokens; float: fraction of √(height·width) of the frame")
    time: axis.Size = param(-1, "frames that are seen: int, fraction, or -1 for all")
    sharpen: float = param(1.0, "factor on the scale of the softmax (see entropy_scale)")
    kept: float | None = KEPT

    def validate(self) -> None:
        self.check(self.radius > 0, "radius", "positive")
        self.check(self.sharpen > 0, "sharpen", "positive")
        check_kept(self)
        self.check(axis.are_sizes(self.time), "time", "a count ≥ 1, a fraction in (0, 1], or -1")

    def softmax_factor(self) -> float:
        return self.sharpen

    def sized(self, grid: TokenGrid) -> Disc:
        """This method with the radius that keeps `kept` of the visual pairs of a grid."""
        assert self.kept is not None
        frames = axis.resolve(self.time, grid.num_frames, "time")
        wanted = self.kept * grid.frame_tokens**2 * grid.num_frames / frames
        # How often each distance occurs between two tokens of a frame, from near to far.
        counts: dict[int, int] = {}
        for dy, dx in itertools.product(range(grid.height), range(grid.width)):
            pairs = (grid.height - dy) * (grid.width - dx) * (2 if dy else 1) * (2 if dx else 1)
            counts[dy**2 + dx**2] = counts.get(dy**2 + dx**2, 0) + pairs
        reached = sorted(counts)
        kept = itertools.accumulate(counts[distance] for distance in reached)
        _, limit = min((abs(pairs - wanted), d) for pairs, d in zip(kept, reached, strict=True))
        # Distances² are whole numbers and stay below the square of the radius.
        return replace(self, radius=math.sqrt((limit + 0.5) / grid.frame_tokens), kept=None)

    def pattern(self, grid: TokenGrid, variant: Hashable = None) -> BlockPattern:
        if self.kept is not None:
            return self.sized(grid).pattern(grid)
        radius = float(self.radius)
        if isinstance(self.radius, float):
            radius *= math.sqrt(grid.frame_tokens)
        tiling = Tiling.even(grid, choose_tile(grid.shape))
        frames = axis.resolve(self.time, grid.num_frames, "time")
        rule = axis.neighborhood(grid.num_frames, frames)
        return from_masks(grid, tiling, *_disc(tiling, rule, radius**2))


def _disc(tiling: Tiling, time: torch.Tensor, limit: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask ids (V, V) and masks, as `from_masks` takes them, for distances² below `limit`."""
    blocks, kind, seen, whole = _time_blocks(tiling.cuts[0], time)
    height, width = (_DiscAxis.of(cuts) for cuts in tiling.cuts[1:])
    nearest = _both(height.nearest, width.nearest)
    farthest = _both(height.farthest, width.farthest)
    some = _spread(seen, nearest < limit)
    full = _spread(whole, farthest < limit)
    ids = torch.where(full, -1, -2).int()
    query, key = (some & ~full).nonzero(as_tuple=True)
    # Equal offsets and sizes give equal masks.
    q, k = (torch.unravel_index(x, tiling.counts) for x in (query, key))
    kinds = [table[i, j] for table, i, j in zip((kind, height.kind, width.kind), q, k, strict=True)]
    unique, which = distinct(kinds, (len(blocks), len(height.facts), len(width.facts)))
    ids[query, key] = which.int()
    masks = torch.zeros(len(unique), tiling.max_tokens, tiling.max_tokens, dtype=torch.bool)
    for mask, (t, h, w) in zip(masks, unique.tolist(), strict=True):
        block = torch.kron(blocks[t], _plane(height.facts[h], width.facts[w], limit))
        mask[: block.shape[0], : block.shape[1]] = block.bool()
    return ids, masks


def _spread(time: torch.Tensor, plane: torch.Tensor) -> torch.Tensor:
    """bool (V, V) from a table over slabs of frames and one over places in a frame."""
    return torch.kron(time.byte(), plane.byte()).bool()


def _time_blocks(
    cuts: tuple[int, ...], rule: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """The distinct blocks of a rule along time, the number of each pair's, any and all of each."""
    spans = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    known: dict[tuple[tuple[int, ...], bytes], int] = {}
    blocks: list[torch.Tensor] = []
    kind = torch.zeros(len(spans), len(spans), dtype=torch.int64)
    for i, query in enumerate(spans):
        for j, key in enumerate(spans):
            block = rule[query, key].byte()
            name = (tuple(block.shape), block.numpy().tobytes())
            if name not in known:
                known[name] = len(blocks)
                blocks.append(block)
            kind[i, j] = known[name]
    some = torch.tensor([bool(b.any()) for b in blocks])[kind]
    full = torch.tensor([bool(b.all()) for b in blocks])[kind]
    return blocks, kind, some, full


@dataclass(frozen=True, eq=False)
class _DiscAxis:
    """For every two tiles along one axis, (n, n):

    Attributes:
        nearest: the smallest distance² of two of their tokens.
        farthest: the largest.
        kind: the number of the row of `facts` that is theirs.
        facts: the distinct (offset of the key tile, query size, key size).
    """

    nearest: torch.Tensor
    farthest: torch.Tensor
    kind: torch.Tensor
    facts: list[list[int]]

    @classmethod
    def of(cls, cuts: Sequence[int]) -> _DiscAxis:
        border = torch.tensor(cuts)
        start, size = border[:-1], border.diff()
        offset, n = start - start[:, None], len(size)
        gap = torch.maximum(offset - size[:, None] + 1, -(offset + size - 1)).clamp(min=0)
        reach = torch.maximum(offset + size - 1, size[:, None] - 1 - offset)
        sizes = size[:, None].expand(n, n), size.expand(n, n)
        columns = [x.flatten() for x in (offset + cuts[-1], *sizes)]
        facts, kind = distinct(columns, (2 * cuts[-1], cuts[-1] + 1, cuts[-1] + 1))
        facts[:, 0] -= cuts[-1]
        return cls(gap**2, reach**2, kind.view(n, n), facts.tolist())


def _both(height: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    """Distances² over the places of a frame, (P, P), from those along its axes."""
    places = len(height) * len(width)
    return (height[:, None, :, None] + width[None, :, None, :]).reshape(places, places)


def _plane(height: list[int], width: list[int], limit: float) -> torch.Tensor:
    """uint8 (query tokens, key tokens) of one pair of tiles in a frame."""
    (dy, hq, hk), (dx, wq, wk) = height, width
    rows = (dy + torch.arange(hk) - torch.arange(hq)[:, None]) ** 2
    columns = (dx + torch.arange(wk) - torch.arange(wq)[:, None]) ** 2
    inside = rows[:, None, :, None] + columns[None, :, None, :] < limit
    return inside.reshape(hq * wq, hk * wk).byte()
