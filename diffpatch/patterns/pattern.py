"""Patterns: which key tiles each query tile visits, and which elements of the partial ones count.

Two builders cover every static method: `from_tiles` keeps or drops whole tiles, `from_axes` keeps a
pair of tokens if a boolean rule holds on each axis. Both cost tiles times tiles, never tokens
squared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import torch

from diffpatch.errors import BadParameter
from diffpatch.kernels.blocks import EVERYTHING, NOTHING, BlockIndex
from diffpatch.kernels.memo import Memo
from diffpatch.patterns.grid import TokenGrid
from diffpatch.patterns.tiles import Tiling

if TYPE_CHECKING:
    from PIL import Image

Value = TypeVar("Value")

_AT_ONCE = 1 << 22  # pairs of tiles whose lists are written together: bounds memory


@dataclass(frozen=True, eq=False)
class BlockPattern:
    """The pattern of one method on one grid.

    Attributes:
        grid: the grid it was made for.
        blocks: the tensors a kernel reads.
        kept: query-key pairs computed, as a fraction of all pairs; text included, mean over heads.
    """

    grid: TokenGrid
    blocks: BlockIndex
    kept: float
    _memo: Memo = field(default_factory=Memo, init=False, repr=False)

    def once(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """What follows from this pattern and a key, made once and kept as long as the pattern."""
        return self._memo(key, make)

    def for_heads(self, heads: int) -> BlockPattern:
        """The pattern with its groups of heads spread over all heads, in runs of equal length.

        Raises:
            BadParameter: the groups do not divide the heads.
        """
        groups = self.blocks.head_pattern
        if groups is None or len(groups) == heads:
            return self
        if heads % len(groups):
            raise BadParameter(
                f"{len(groups)} groups of heads do not divide the {heads} heads of the model:"
                " give as many settings as divide them"
            )

        def make() -> BlockPattern:
            each = groups.repeat_interleave(heads // len(groups))
            return BlockPattern(self.grid, replace(self.blocks, head_pattern=each), self.kept)

        return self.once(("groups of heads", heads), make)

    def on(self, device: torch.device) -> BlockIndex:
        """The blocks on a device, copied there once."""
        return self.once(device, lambda: self.blocks.to(device))

    def rest(self) -> BlockPattern:
        """What the pattern leaves out, made once (see `complement`)."""
        return self.once("rest", lambda: complement(self))

    def dense(self) -> torch.Tensor:
        """bool (P, S, S): the pattern as a dense mask in sequence order. For tests and small S."""
        from diffpatch.kernels.block_sparse.reference import dense_mask

        return dense_mask(self.blocks)

    def tile_map(self) -> torch.Tensor:
        """float (P, N, N): the kept fraction of every pair of tiles."""
        b = self.blocks
        out = torch.zeros(b.num_patterns * b.num_tiles, b.num_tiles, dtype=torch.float32)
        rows, sizes = b.rows, b.sizes.float()
        share = torch.ones(b.cols.shape[0], dtype=torch.float32)
        partial = b.mask_ids >= 0
        area = sizes[rows % b.num_tiles] * sizes[b.cols.long()]
        share[partial] = b.masks.sum((1, 2)).float()[b.mask_ids[partial].long()] / area[partial]
        out[rows, b.cols.long()] = share
        return out.view(b.num_patterns, b.num_tiles, b.num_tiles)

    def draw(self, size: int = 512, pattern: int = 0) -> Image.Image:
        """A picture of the tile map: rows are query tiles, columns key tiles, white is kept."""
        from PIL import Image

        grey = (self.tile_map()[pattern] * 255).round().to(torch.uint8)
        picture = Image.fromarray(grey.numpy())
        scale = max(1, size // grey.shape[0])
        return picture.resize((grey.shape[0] * scale,) * 2, Image.Resampling.NEAREST)


def from_tiles(grid: TokenGrid, tiling: Tiling, keep: torch.Tensor) -> BlockPattern:
    """A pattern of whole tiles.

    Args:
        grid: the grid; may differ from ``tiling.grid`` in shape but not in its token counts (raster
            blocks are a tiling of the same tokens seen as one line).
        tiling: how the tokens are cut.
        keep: bool (V, V) or (P, V, V) over visual tiles, [query tile, key tile].
    """
    keep = keep if keep.ndim == 3 else keep[None]
    none = torch.zeros(0, tiling.max_tokens, tiling.max_tokens, dtype=torch.bool)
    return _assemble(grid, tiling, keep, torch.full_like(keep, -1, dtype=torch.int32), none)


def from_axes(
    grid: TokenGrid,
    tiling: Tiling,
    rules: Sequence[Sequence[torch.Tensor]],
    head_pattern: Sequence[int] | None = None,
) -> BlockPattern:
    """A pattern that keeps a pair of tokens if a rule holds on every axis.

    Args:
        grid: the grid.
        tiling: a tiling of it.
        rules: for each pattern the three masks of (time, height, width), each bool (L, L) with
            [query position, key position] along that axis.
        head_pattern: the pattern of each head, where there are several.
    """
    size = tiling.max_tokens
    tables = [_AxisTable(tiling, axes) for axes in rules]
    keep = torch.stack([t.any for t in tables])
    # Each pattern numbers its masks from 0; together they are numbered in order of the patterns.
    ids, masks, seen = [], [], 0
    for table in tables:
        mask_ids, own = table.masks(size)
        ids.append(mask_ids if not seen else torch.where(mask_ids >= 0, mask_ids + seen, mask_ids))
        masks.append(own)
        seen += own.shape[0]
    return _assemble(grid, tiling, keep, torch.stack(ids), torch.cat(masks), head_pattern)


def from_masks(
    grid: TokenGrid, tiling: Tiling, ids: torch.Tensor, masks: torch.Tensor
) -> BlockPattern:
    """A pattern of tiles and of masks inside them, for rules that no product of axes gives.

    Args:
        grid: the grid.
        tiling: a tiling of it.
        ids: int (V, V) over visual tiles, [query tile, key tile]: -1 keeps the whole tile, -2
            nothing, and any other number what that row of `masks` says.
        masks: bool (M, T, T), [query in tile, key in tile], T the tokens of the largest tile;
            False past the end of a smaller one.
    """
    keep = ids != NOTHING
    return _assemble(grid, tiling, keep[None], ids.clamp(min=-1).int()[None], masks)


def complement(pattern: BlockPattern) -> BlockPattern:
    """Exactly the pairs that a pattern leaves out; the rows of text then see nothing."""
    b = pattern.blocks
    sizes, rows = b.sizes, b.rows
    ids = b.mask_map().int()
    # What was full is gone, what was unseen is full, and masks turn around inside their tiles.
    masks = b.masks.clone()
    partial = (b.mask_ids >= 0).nonzero()[:, 0]
    which = b.mask_ids[partial].long()
    place = torch.arange(b.max_tile)
    for mask, entry in zip(which.unique().tolist(), _first_of_each(which), strict=True):
        height, width = (
            sizes[rows[partial[entry]] % b.num_tiles],
            sizes[b.cols[partial[entry]].long()],
        )
        masks[mask] = ~masks[mask] & (place < height)[:, None] & (place < width)
    keep = ids != EVERYTHING
    ids[ids == NOTHING] = EVERYTHING
    heads = None if b.head_pattern is None else b.head_pattern.tolist()
    blocks, kept = _index(b.order, sizes, keep, ids, masks, heads)
    return BlockPattern(pattern.grid, blocks, kept)


def _first_of_each(values: torch.Tensor) -> list[int]:
    """The first place of every distinct value, in ascending order of the values."""
    order = values.argsort(stable=True)
    first = torch.ones(len(values), dtype=torch.bool)
    first[1:] = values[order].diff() != 0
    return order[first].tolist()


class _AxisTable:
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


def _assemble(
    grid: TokenGrid,
    tiling: Tiling,
    keep: torch.Tensor,
    mask_ids: torch.Tensor,
    masks: torch.Tensor,
    head_pattern: Sequence[int] | None = None,
) -> BlockPattern:
    """Add the text tiles, which see and are seen by everything, and write the key lists."""
    patterns, visual = keep.shape[:2]
    if visual != tiling.num_visual or tiling.grid.num_tokens != grid.num_tokens:
        raise BadParameter(
            f"a pattern over {visual} tiles does not fit {tiling.num_visual} of {grid}"
        )
    before, after = (len(s) for s in tiling.text_sizes)
    total = before + visual + after
    kept = torch.ones(patterns, total, total, dtype=torch.bool)
    ids = torch.full((patterns, total, total), -1, dtype=torch.int32)
    inner = slice(before, before + visual)
    kept[:, inner, inner], ids[:, inner, inner] = keep, mask_ids
    blocks, fraction = _index(tiling.order(), tiling.sizes, kept, ids, masks, head_pattern)
    return BlockPattern(grid, blocks, fraction)


def _index(
    order: torch.Tensor,
    sizes: torch.Tensor,
    kept: torch.Tensor,
    ids: torch.Tensor,
    masks: torch.Tensor,
    head_pattern: Sequence[int] | None,
) -> tuple[BlockIndex, float]:
    """Write the key lists: the index, and the fraction of all pairs that it keeps."""
    patterns, total = kept.shape[:2]
    tokens = len(order)
    kept, ids = kept.view(-1, total), ids.view(-1, total)
    seen = torch.cat([masks.flatten(1).view(torch.uint8).sum(1, dtype=torch.int64), sizes[:1]])
    parts, pairs = [], torch.zeros(patterns, dtype=torch.int64)
    for rows in torch.arange(len(kept)).split(max(1, _AT_ONCE // total)):
        # Full tiles first within each row, each half ascending.
        partial = ids[rows] >= 0
        halves = torch.stack([kept[rows] & ~partial, kept[rows] & partial], 1)
        row, inside, col = halves.nonzero(as_tuple=True)
        mask_id = ids[rows[row], col]
        area = torch.where(inside == 1, seen[mask_id], sizes[rows[row] % total] * sizes[col])
        pairs.index_add_(0, rows[row] // total, area)
        parts.append((col.int(), mask_id, halves.sum(2)))
    cols, mask_ids, lengths = map(torch.cat, zip(*parts, strict=True))
    row_ptr = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.sum(1).cumsum(0)])
    heads = torch.tensor(range(patterns) if head_pattern is None else head_pattern)
    blocks = BlockIndex(
        order=order,
        starts=torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]).int(),
        row_ptr=row_ptr.int(),
        full_end=(row_ptr[:-1] + lengths[:, 0]).int(),
        cols=cols,
        mask_ids=mask_ids,
        masks=masks,
        head_pattern=None if head_pattern is None else heads.int(),
    )
    return blocks, int(pairs[heads].sum()) / (len(heads) * tokens**2)
