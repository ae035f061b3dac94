"""The pattern of a packed sequence, composed from patterns of the grids in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from diffpatch.errors import BadParameter
from diffpatch.kernels.blocks import EVERYTHING, NOTHING
from diffpatch.patterns.build import block_index
from diffpatch.patterns.grid import PackedGrid, TokenGrid
from diffpatch.patterns.pattern import BlockPattern
from diffpatch.patterns.tiles import MAX_TILE


def compose(grid: PackedGrid, patterns: Sequence[BlockPattern]) -> BlockPattern:
    """The pattern of a packed sequence.

    Args:
        grid: the layout.
        patterns: a pattern for each of ``grid.grids``, in their order, made for that grid alone.
            Their heads must agree: as many settings of heads in each, or one for all heads.

    Raises:
        BadParameter: the patterns are not those of the grids.
    """
    if [p.grid for p in patterns] != list(grid.grids):
        raise BadParameter(
            f"{grid} needs patterns of {', '.join(map(str, grid.grids))}, not of"
            f" {', '.join(str(p.grid) for p in patterns)}"
        )
    spans = _spans(grid, patterns)
    heads, chosen = _heads(patterns)
    order = torch.cat([span.order + start for span, start in zip(spans, grid.starts, strict=True)])
    sizes = torch.cat([span.sizes for span in spans])
    largest = max([int(sizes.max()), *(p.blocks.max_tile for p in patterns)])
    ids = torch.stack([_table(spans, list(which), grid.between) for which in chosen])
    masks = [span.masks_in(largest) for span in spans]
    blocks, kept = block_index(
        order, sizes, ids != NOTHING, ids.clamp(min=EVERYTHING), torch.cat(masks), heads
    )
    # What a method computes beside its pattern (virtual tokens) counts as in the span alone.
    beside = sum((p.kept - _exact(p)) * p.blocks.num_tokens**2 for p in patterns)
    return BlockPattern(grid, blocks, kept + beside / grid.num_tokens**2)


def without_queries(pattern: BlockPattern, silent: range) -> BlockPattern:
    """The same pattern where some tokens have keys and no queries.

    Their rows see nothing, so that a kernel spends nothing on them, and `kept` counts none of
    their pairs; it is still a fraction of tokens × tokens.

    Args:
        pattern: in which those tokens see everything.
        silent: their places in the sequence; whole tiles.

    Raises:
        BadParameter: some tile holds tokens of both kinds.
    """
    b = pattern.blocks
    quiet = (b.order >= silent.start) & (b.order < silent.stop)
    count = torch.zeros(b.num_tiles, dtype=torch.int64).index_add_(0, b.tile_of_place, quiet.long())
    if ((count > 0) & (count < b.sizes)).any():
        raise BadParameter(f"tokens {silent.start} to {silent.stop} of {pattern.grid} share tiles")
    ids = b.mask_map().int()
    ids[:, count > 0] = NOTHING
    heads = None if b.head_pattern is None else b.head_pattern.tolist()
    blocks, _ = block_index(
        b.order, b.sizes, ids != NOTHING, ids.clamp(min=EVERYTHING), b.masks, heads
    )
    return BlockPattern(pattern.grid, blocks, pattern.kept - len(silent) / b.num_tokens)


@dataclass(frozen=True, eq=False)
class _Span:
    """A span cut into tiles.

    Attributes:
        order: int64 (n,), the token of the span at each place of tile order.
        sizes: int64 (N,), tokens of every tile.
        pattern: for a grid, its own; None for tokens without one.
        first_mask: the number of its first mask among those of all spans.
    """

    order: torch.Tensor
    sizes: torch.Tensor
    pattern: BlockPattern | None = None
    first_mask: int = 0

    def ids(self, which: int) -> torch.Tensor:
        """int32 (N, N): what each of its tiles sees of the others, under one of its patterns."""
        if self.pattern is None:
            return torch.full((len(self.sizes),) * 2, EVERYTHING, dtype=torch.int32)
        ids = self.pattern.blocks.mask_map()[which].int()
        return torch.where(ids >= 0, ids + self.first_mask, ids)

    def masks_in(self, largest: int) -> torch.Tensor:
        """bool (M, largest, largest): its masks, each in a corner of a larger one."""
        if self.pattern is None:
            return torch.zeros(0, largest, largest, dtype=torch.bool)
        more = largest - self.pattern.blocks.max_tile
        return torch.nn.functional.pad(self.pattern.blocks.masks, (0, more, 0, more))

    def tile_of(self) -> torch.Tensor:
        """int64 (n,): the tile of every token, in the order of the sequence."""
        tiles = torch.arange(len(self.sizes)).repeat_interleave(self.sizes)
        return torch.empty_like(self.order).scatter_(0, self.order, tiles)

    def centres(self) -> torch.Tensor:
        """float64 (N, 3): the middle of every tile along each axis, as a fraction of it."""
        assert self.pattern is not None and isinstance(self.pattern.grid, TokenGrid)
        shape = self.pattern.grid.shape
        place = torch.stack(torch.unravel_index(self.order, shape), 1).double() + 0.5
        tiles = torch.arange(len(self.sizes)).repeat_interleave(self.sizes)
        total = torch.zeros(len(self.sizes), 3, dtype=torch.float64).index_add_(0, tiles, place)
        return total / self.sizes[:, None] / torch.tensor(shape)


def _spans(grid: PackedGrid, patterns: Sequence[BlockPattern]) -> list[_Span]:
    spans, left, masks = [], list(patterns), 0
    for span, size in zip(grid.spans, grid.sizes, strict=True):
        if isinstance(span, int):
            runs = [min(MAX_TILE, size - i) for i in range(0, size, MAX_TILE)]
            spans.append(_Span(torch.arange(size), torch.tensor(runs)))
            continue
        pattern = left.pop(0)
        blocks = pattern.blocks
        spans.append(_Span(blocks.order, blocks.sizes, pattern, masks))
        masks += len(blocks.masks)
    return spans


def _heads(patterns: Sequence[BlockPattern]) -> tuple[list[int] | None, list[tuple[int, ...]]]:
    """The composed pattern of every head, and of which pattern of each grid it is made."""
    given = [p.blocks.head_pattern for p in patterns]
    counts = {len(heads) for heads in given if heads is not None}
    if len(counts) > 1:
        raise BadParameter(f"patterns of {sorted(counts)} heads cannot share a packed sequence")
    if not counts:
        return None, [(0,) * len(patterns)]
    heads = [[0] * max(counts) if h is None else h.tolist() for h in given]
    each = list(zip(*heads, strict=True))
    chosen = sorted(set(each))
    return [chosen.index(which) for which in each], chosen


def _table(spans: Sequence[_Span], which: list[int], between: str) -> torch.Tensor:
    """int32 (N, N): what each tile of the sequence sees of every other one, for one head."""
    grids = iter(which)
    own = [span.ids(0 if span.pattern is None else next(grids)) for span in spans]
    rows = []
    for i, query in enumerate(spans):
        row = []
        for j, key in enumerate(spans):
            if i == j:
                row.append(own[i])
            elif between == "aligned" and query.pattern is not None and key.pattern is not None:
                row.append(_aligned(query, key, own[j]))
            else:
                size = len(query.sizes), len(key.sizes)
                row.append(torch.full(size, EVERYTHING, dtype=torch.int32))
        rows.append(torch.cat(row, 1))
    return torch.cat(rows)


def _aligned(query: _Span, key: _Span, seen: torch.Tensor) -> torch.Tensor:
    """int32 (N, M): what the tile at the same relative place of the other grid sees, whole."""
    assert key.pattern is not None and isinstance(key.pattern.grid, TokenGrid)
    shape = torch.tensor(key.pattern.grid.shape)
    t, h, w = (query.centres() * shape).long().minimum(shape - 1).unbind(1)
    token = (t * shape[1] + h) * shape[2] + w
    return seen[key.tile_of()[token]].clamp(max=EVERYTHING)


def _exact(pattern: BlockPattern) -> float:
    """Fraction of the pairs that the tiles of a pattern keep, mean over heads."""
    b = pattern.blocks
    sizes = b.sizes.double()
    pairs = (pattern.tile_map() * sizes[:, None] * sizes).sum((1, 2))
    heads = slice(None) if b.head_pattern is None else b.head_pattern.long()
    return float(pairs[heads].mean() / sizes.sum() ** 2)
