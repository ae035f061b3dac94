"""Disc attention: every query sees the keys within a radius of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch

from diffpatch.grid import TokenGrid
from diffpatch.methods import axis
from diffpatch.methods.base import Method, param, register
from diffpatch.pattern import BlockPattern, from_masks
from diffpatch.tiles import Tiling, choose_tile


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
    size_parameters = ("radius", "time")

    radius: int | float = param(0.3, "int: tokens; float: fraction of √(height·width) of the frame")
    time: axis.Size = param(-1, "frames that are seen: int, fraction, or -1 for all")
    sharpen: float = param(1.0, "factor on the scale of the softmax (see entropy_scale)")

    def __post_init__(self) -> None:
        self.check(self.radius > 0, "radius", "positive")
        self.check(self.sharpen > 0, "sharpen", "positive")
        axis.triple((self.time, -1, -1))

    def softmax_factor(self) -> float:
        return self.sharpen

    def sized(self, amount: float, kind: str = "video") -> Disc:
        # A disc has radius²·π tokens; the edges cut some off, and √2 reaches from corner to corner.
        return replace(self, radius=math.sqrt(2.0) if amount == 1 else math.sqrt(amount / math.pi))

    def pattern(self, grid: TokenGrid, variant: Hashable = None) -> BlockPattern:
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
    nearest, farthest, shape = _planes(tiling)
    _, rows, columns = tiling.counts
    places = rows * columns
    some = _spread(seen, nearest < limit)
    full = _spread(whole, farthest < limit)
    ids = torch.where(full, -1, -2).int()
    query, key = (some & ~full).nonzero(as_tuple=True)
    # Equal offsets and sizes give equal masks.
    facts = torch.cat(
        [kind[query // places, key // places][:, None], shape[query % places, key % places]], 1
    )
    unique, which = torch.unique(facts, dim=0, return_inverse=True)
    ids[query, key] = which.int()
    masks = torch.zeros(len(unique), tiling.max_tokens, tiling.max_tokens, dtype=torch.bool)
    for mask, (frames, *plane) in zip(masks, unique.tolist(), strict=True):
        block = torch.kron(blocks[frames], _plane(plane, limit))
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


def _planes(tiling: Tiling) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For every two places of tiles in a frame: the smallest and the largest distance² of two of
    their tokens, (P, P), and (offset, query size, key size) along height and width, (P, P, 6).
    """
    near, far, facts = [], [], []
    for cuts in tiling.cuts[1:]:
        border = torch.tensor(cuts)
        start, size = border[:-1], border.diff()
        offset = start - start[:, None]  # of the key tile from the query tile
        gap = torch.maximum(offset - size[:, None] + 1, -(offset + size - 1)).clamp(min=0)
        reach = torch.maximum(offset + size - 1, size[:, None] - 1 - offset)
        near.append(gap**2)
        far.append(reach**2)
        n = len(size)
        sizes = size[:, None].expand(n, n), size.expand(n, n)
        facts.append(torch.stack([offset, *sizes], -1))
    (rows, columns), places = (len(c) - 1 for c in tiling.cuts[1:]), tiling.counts
    count = places[1] * places[2]

    def both(height: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
        return (height[:, None, :, None] + width[None, :, None, :]).reshape(count, count)

    h = facts[0][:, None, :, None].expand(rows, columns, rows, columns, 3)
    w = facts[1][None, :, None, :].expand(rows, columns, rows, columns, 3)
    return both(*near), both(*far), torch.cat([h, w], -1).reshape(count, count, 6)


def _plane(facts: list[int], limit: float) -> torch.Tensor:
    """uint8 (query tokens, key tokens) of one pair of tiles in a frame."""
    (dy, hq, hk), (dx, wq, wk) = facts[:3], facts[3:]
    rows = (dy + torch.arange(hk) - torch.arange(hq)[:, None]) ** 2
    columns = (dx + torch.arange(wk) - torch.arange(wq)[:, None]) ** 2
    inside = rows[:, None, :, None] + columns[None, :, None, :] < limit
    return inside.reshape(hq * wq, hk * wk).byte()
