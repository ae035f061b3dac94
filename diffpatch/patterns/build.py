"""Building patterns from rules.

Two builders cover nearly every static method: `from_tiles` keeps or drops whole tiles, `from_axes`
keeps a pair of tokens if a boolean rule holds on each axis; `from_masks` takes the masks of tiles
themselves. All cost tiles times tiles, never tokens squared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffpatch.errors import BadParameter
from diffpatch.kernels.blocks import EVERYTHING, NOTHING, BlockIndex
from diffpatch.patterns.axes import AxisTable
from diffpatch.patterns.grid import TokenGrid
from diffpatch.patterns.pattern import BlockPattern
from diffpatch.patterns.tiles import Tiling

_AT_ONCE = 1 << 22  # pairs of tiles whose lists are written together: bounds memory


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
    tables = [AxisTable(tiling, axes) for axes in rules]
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
    blocks, kept = block_index(b.order, sizes, keep, ids, masks, heads)
    return BlockPattern(pattern.grid, blocks, kept)


def rest(pattern: BlockPattern) -> BlockPattern:
    """What a pattern leaves out (see `complement`), made once and kept with it."""
    return pattern.once("rest", lambda: complement(pattern))


def _first_of_each(values: torch.Tensor) -> list[int]:
    """The first place of every distinct value, in ascending order of the values."""
    order = values.argsort(stable=True)
    first = torch.ones(len(values), dtype=torch.bool)
    first[1:] = values[order].diff() != 0
    return order[first].tolist()


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
    blocks, fraction = block_index(tiling.order(), tiling.sizes, kept, ids, masks, head_pattern)
    return BlockPattern(grid, blocks, fraction)


def block_index(
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
