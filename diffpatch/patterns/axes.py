"""Rules along the axes of a grid, seen tile by tile: what is empty, full, or cut by a mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from diffpatch.patterns.tiles import Tiling


class AxisTable:
    """The tile-level view of three axis rules: what is empty, what is full, which masks differ."""

    def __init__(self, tiling: Tiling, axes: Sequence[torch.Tensor]) -> None:
        self.cuts = tiling.cuts
        self.axes = [_cut_axis(rule, cuts) for rule, cuts in zip(axes, tiling.cuts, strict=True)]
        self.any = outer([a.any for a in self.axes])
        self.full = outer([a.full for a in self.axes])

    def masks(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids int32 (V, V), -1 where a tile is full or empty; masks bool (M, size, size))."""
        partial = self.any & ~self.full
        query, key = partial.nonzero(as_tuple=True)
        counts = [a.any.shape[0] for a in self.axes]
        q, k = _unravel(query, counts), _unravel(key, counts)
        kinds = [a.kind[i, j] for a, i, j in zip(self.axes, q, k, strict=True)]
        unique, inverse = distinct(kinds, [len(a.blocks) for a in self.axes])
        ids = torch.full(partial.shape, -1, dtype=torch.int32)
        ids[query, key] = inverse.int()
        out = torch.zeros(len(unique), size, size, dtype=torch.bool)
        for mask, (t, h, w) in zip(out, unique.tolist(), strict=True):
            kron = self.axes[0].blocks[t]
            for block in (self.axes[1].blocks[h], self.axes[2].blocks[w]):
                kron = torch.kron(kron, block)
            mask[: kron.shape[0], : kron.shape[1]] = kron.bool()
        return ids, out


@dataclass(frozen=True, eq=False)
class _Axis:
    any: torch.Tensor  # bool (n, n): some pair of the two tiles is kept
    full: torch.Tensor  # bool (n, n): every pair is kept
    kind: torch.Tensor  # int64 (n, n): number of the distinct block
    blocks: list[torch.Tensor]  # the distinct blocks, uint8 (query size, key size)


def _cut_axis(rule: torch.Tensor, cuts: Sequence[int]) -> _Axis:
    """Cut one axis rule into blocks and number the distinct ones."""
    sizes = torch.tensor(cuts).diff()
    n, t = len(sizes), int(sizes.max())
    inside = torch.arange(t) < sizes[:, None]  # (n, t)
    index = (torch.tensor(cuts[:-1])[:, None] + torch.arange(t)).clamp(max=rule.shape[0] - 1)
    valid = inside[:, None, :, None] & inside[None, :, None, :]  # (n, n, t, t)
    block = rule[index[:, None, :, None], index[None, :, None, :]]
    # The sizes are part of the identity: blocks of different shape must not share a number.
    shape = torch.stack([sizes[:, None].expand(n, n), sizes[None, :].expand(n, n)], -1)
    key = torch.cat([shape.reshape(n * n, 2), (block & valid).reshape(n * n, t * t).long()], 1)
    unique, kind = torch.unique(key, dim=0, return_inverse=True)
    blocks = [row[2:].view(t, t)[: row[0], : row[1]].to(torch.uint8) for row in unique]
    return _Axis(
        any=(block & valid).flatten(2).any(-1),
        full=(block | ~valid).flatten(2).all(-1),
        kind=kind.view(n, n),
        blocks=blocks,
    )


def outer(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Boolean Kronecker product of three (n, n) masks: (V, V) over tiles in tile order."""
    t, h, w = parts
    both = t[:, None, None, :, None, None] & h[None, :, None, None, :, None]
    both = both & w[None, None, :, None, None, :]
    return both.reshape(math.prod(both.shape[:3]), -1)


def distinct(
    numbers: Sequence[torch.Tensor], counts: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct rows of several columns of numbers, far faster than `torch.unique` finds rows.

    Args:
        numbers: int64 (N,) each, column by column.
        counts: what the numbers of each column stay below; their product below 2**63.

    Returns:
        int64 (M, columns), in ascending order, and int64 (N,), the place of every row among them.
    """
    code = torch.zeros_like(numbers[0])
    for column, count in zip(numbers, counts, strict=True):
        code = code * count + column
    unique, inverse = torch.unique(code, return_inverse=True)
    return torch.stack(torch.unravel_index(unique, tuple(counts)), 1), inverse


def _unravel(index: torch.Tensor, counts: Sequence[int]) -> tuple[torch.Tensor, ...]:
    _, h, w = counts
    return index // (h * w), index // w % h, index % w
