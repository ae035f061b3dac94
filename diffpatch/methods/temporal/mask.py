"""Temporal attention, mode "mask": the tiles that matter are chosen once for some steps."""

from __future__ import annotations

import torch

from diffpatch.kernels.active_tiles import api as active_tiles
from diffpatch.kernels.active_tiles.api import tile_table
from diffpatch.kernels.active_tiles.importance import tile_importance
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.methods.base import Attended, AttentionCall
from diffpatch.methods.temporal.tiles import always, remembered
from diffpatch.patterns.grid import Grid
from diffpatch.patterns.pattern import BlockPattern


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    call: AttentionCall,
    *,
    refresh: int,
    kept: float,
    keep_frames: int,
) -> Attended:
    """The chosen tiles; every `refresh` steps they are chosen anew, from this step's q and k."""
    state, blocks = call.state, call.pattern.on(q.device)
    bits = remembered(call, q)
    if bits is None or call.step - state["step"] >= refresh:
        scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
        importance = tile_importance(q, k, blocks, scale, key_mask=call.key_mask)
        fixed = always(blocks, call.pattern.grid, keep_frames)
        bits = active_tiles.pack(choose(importance, blocks, fixed, kept))
        state.update(bits=bits, step=call.step, pattern=call.pattern)
    active = active_tiles.unpack(bits, tile_table(blocks).length)
    used = active_tiles.choose_backend(q, k, v, blocks, call.backend)
    out, _ = active_tiles.attend(
        q, k, v, blocks, active, scale=call.scale, key_mask=call.key_mask, backend=used
    )
    return Attended(out, active_tiles.kept(blocks, active), used)


def choose(
    importance: torch.Tensor, blocks: BlockIndex, fixed: torch.Tensor, kept: float
) -> torch.Tensor:
    """The most important tiles of every row, a fraction of them, the fixed ones included.

    Args:
        importance: (B, H, N, N) [query tile, key tile], at least 0.
        blocks: the index, of E pairs of tiles.
        fixed: bool (H or 1, E), pairs that are in whatever their importance; they count.
        kept: fraction of the pairs of each row, rounded up.

    Returns:
        bool (B, H, E).
    """
    table, tiles = tile_table(blocks), blocks.num_tiles
    heads = importance.shape[1]
    pattern = table.pattern.expand(heads)
    valid = table.valid().expand(heads, -1)
    place = (table.query * tiles + table.key)[pattern]  # (H, E)
    value = importance.flatten(2).gather(2, place.expand(len(importance), -1, -1))
    value = value.masked_fill(fixed, torch.inf)
    # Pairs that only fill up the table go to a place of their own.
    place = place.masked_fill(~valid, tiles * tiles).expand_as(value)
    ranked = value.new_full((*value.shape[:2], tiles * tiles + 1), -1.0)
    ranked = ranked.scatter(2, place, value)[..., :-1].unflatten(2, (tiles, tiles))
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    number = torch.arange(tiles, device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, number).flatten(2)
    count = _counts(blocks, fixed, kept)  # (H or 1, N)
    limit = count.expand(heads, -1).gather(1, table.query[pattern])
    return (rank.gather(2, place.clamp(max=tiles * tiles - 1)) < limit) & valid


def _counts(blocks: BlockIndex, fixed: torch.Tensor, kept: float) -> torch.Tensor:
    """int64 (H or 1, N): pairs to keep in each row."""
    table = tile_table(blocks)
    row = table.query[table.pattern]

    def of_rows(flags: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(len(row), blocks.num_tiles, dtype=torch.int64, device=row.device)
        return zeros.scatter_add(1, row, flags.long())

    wanted = (of_rows(table.valid()) * kept).ceil().long()
    return torch.maximum(wanted, of_rows(fixed.expand_as(row)))


def bounds(pattern: BlockPattern, kept: float, keep_frames: int) -> tuple[float, float]:
    """The least and the most pairs that a choice can keep, as fractions of all pairs.

    They are equal where all tiles have one size.
    """
    key = ("bounds of a choice", kept, keep_frames)
    return pattern.blocks.derived(key, lambda b: _bounds(b, pattern.grid, kept, keep_frames))


def _bounds(blocks: BlockIndex, grid: Grid, kept: float, keep_frames: int) -> tuple[float, float]:
    table, tokens = tile_table(blocks), blocks.num_tokens
    fixed = always(blocks, grid, keep_frames)
    place = (table.query * blocks.num_tiles + table.key)[table.pattern]
    area = table.area[table.pattern].float()
    found = []
    for preference in (tokens**2 - area, area):
        value = preference.new_zeros(len(place), blocks.num_tiles**2).scatter_(1, place, preference)
        value = value.view(1, len(place), blocks.num_tiles, -1)
        active = choose(value, blocks, fixed, kept)
        found.append(float(active_tiles.kept(blocks, active)))
    return found[0], found[1]
