"""A block index cut into the sub-blocks of keys that the Triton kernel visits one by one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from diffpatch.kernels.bits import pack_words
from diffpatch.kernels.block_sparse.apart import apart
from diffpatch.kernels.blocks import BlockIndex


@dataclass(frozen=True, eq=False)
class SubBlocks:
    """What each row of a block index visits, in units of BLOCK_N keys, on the device of the index.

    Attributes:
        parts: programs for each query tile, of BLOCK_M rows each.
        schedule: int32 (P * N,), the query tiles of each pattern in the order of launch: the few
            with far longer lists than the others (text) first, so that they do not finish last.
        row_ptr: int32 (P * N + 1,), where each row's sub-blocks begin.
        full_end: int32 (P * N,), where those without a mask end.
        places: int32 (n + 1,), the first place (in tile order) of each sub-block, and one spare.
        mask_ids: int32 (n + 1,), the row of `bits` of each masked sub-block, 0 for the others.
        bits: int32 (K, parts * BLOCK_M, BLOCK_N / 32), bit n % 32 of word n // 32 is True where a
            query of the tile sees key n of the sub-block. At least one row.
    """

    parts: int
    schedule: torch.Tensor
    row_ptr: torch.Tensor
    full_end: torch.Tensor
    places: torch.Tensor
    mask_ids: torch.Tensor
    bits: torch.Tensor


def sub_blocks(blocks: BlockIndex, block_m: int, block_n: int, *, gaps: bool = False) -> SubBlocks:
    """The lists for programs of `block_m` queries and steps of `block_n` keys; made once.

    Args:
        blocks: the index.
        block_m: queries of a program.
        block_n: keys of a step.
        gaps: whether keys lie as in `apart`, and not in tile order.
    """
    build = partial(_make, block_m=block_m, block_n=block_n, gaps=gaps)
    return blocks.derived(("sub-blocks", block_m, block_n, gaps), build)


def _make(blocks: BlockIndex, block_m: int, block_n: int, gaps: bool) -> SubBlocks:
    host = blocks.to("cpu")
    tiles, per_tile = host.num_tiles, -(-host.max_tile // block_n)
    parts = -(-host.max_tile // block_m)
    starts, sizes = (apart(host).starts if gaps else host.starts).long(), host.sizes
    masks = _cut(host.masks, parts * block_m, per_tile, block_n)

    # Every entry of `cols`, once for each of its sub-blocks.
    row = host.rows.repeat_interleave(per_tile)
    col = host.cols.long().repeat_interleave(per_tile)
    kind = host.mask_ids.long().repeat_interleave(per_tile)
    sub = torch.arange(per_tile).repeat(host.cols.shape[0])
    keys = (sizes[col] - sub * block_n).clamp(0, block_n)

    # Full tiles that end within a sub-block are masked by where they end; partial tiles by their
    # own masks, unless a sub-block turns out full or empty.
    ends = torch.arange(block_n) < torch.arange(block_n)[:, None]
    ends = ends[:, None, :].expand(block_n, parts * block_m, block_n)
    pairs = masks.sum((1, 2))
    own = kind * per_tile + sub
    seen = torch.where(kind < 0, keys * sizes[row % tiles], pairs.new_zeros(()))
    if pairs.shape[0]:
        seen = torch.where(kind < 0, seen, pairs[own.clamp(min=0)])
    full = seen == sizes[row % tiles] * block_n
    mask = torch.where(kind < 0, masks.shape[0] + keys, own).masked_fill(full, -1)

    visited = (seen > 0).nonzero().flatten()
    place = starts[col] + sub * block_n
    order = ((row * 2 + ~full) * (int(starts[-1]) + host.max_tile) + place)[visited].argsort()
    row, full, place, mask = (x[visited][order] for x in (row, full, place, mask))
    used, mask_ids = mask[~full].unique(return_inverse=True)
    ids = torch.zeros_like(mask)
    ids[~full] = mask_ids
    table = torch.cat([masks, ends])[used] if len(used) else ends[:1]

    rows = host.full_end.shape[0]
    row_ptr = torch.zeros(rows + 1, dtype=torch.int64)
    row_ptr[1:] = row.bincount(minlength=rows).cumsum(0)
    full_end = row_ptr[:-1] + row[full].bincount(minlength=rows)
    lengths = row_ptr.diff().view(-1, tiles)
    light = (lengths <= 2 * lengths.float().mean(1, keepdim=True)).int()
    schedule = light.argsort(dim=1, stable=True).flatten()
    spare = torch.zeros(1, dtype=torch.int64)
    return SubBlocks(
        parts=parts,
        schedule=schedule.int().to(blocks.device),
        row_ptr=row_ptr.int().to(blocks.device),
        full_end=full_end.int().to(blocks.device),
        places=torch.cat([place, spare]).int().to(blocks.device),
        mask_ids=torch.cat([ids, spare]).int().to(blocks.device),
        bits=pack_words(table).to(blocks.device),
    )


def _cut(masks: torch.Tensor, rows: int, per_tile: int, block_n: int) -> torch.Tensor:
    """Masks (M, T, T) -> (M * per_tile, rows, block_n), padded with False."""
    edge = masks.shape[-1]
    grown = masks.new_zeros(masks.shape[0], rows, per_tile * block_n)
    grown[:, :edge, :edge] = masks
    cut = grown.view(-1, rows, per_tile, block_n).transpose(1, 2)
    return cut.reshape(-1, rows, block_n)
