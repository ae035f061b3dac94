"""Temporal attention, mode "mask": the tiles that matter are chosen once for some steps.

The choice is that of `dynamic` (see `kernels.selection`) with rule "error" and the rest dropped,
from the tiles that the wrapped method visits. Masses come from pieces of 16 tokens, as in SparseD.
"""

from __future__ import annotations

import torch

from diffpatch.kernels.active_tiles import api as active_tiles
from diffpatch.kernels.active_tiles.table import tile_table
from diffpatch.kernels.block_sparse.backends import beside
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.selection import choose as choosing
from diffpatch.kernels.selection.api import select
from diffpatch.kernels.selection.choose import Counts
from diffpatch.kernels.selection.tiles import Options, Tiles
from diffpatch.methods.base import Attended, AttentionCall
from diffpatch.methods.selection import Levels, always, cost_bounds, remembered
from diffpatch.patterns.pattern import BlockPattern

RULE = "error"
PIECE = 16  # neighbouring tokens that count as one


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
    """The chosen tiles; every `refresh` steps they are chosen anew, from this step's tensors."""
    state, blocks = call.state, call.pattern.on(q.device)
    bits, table = remembered(call, state, q), tile_table(blocks)
    if bits is None or call.step - state["step"] >= refresh:
        scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
        options = Options("drop", PIECE)
        tiles = Tiles(q, k, v, blocks, 0, scale, call.key_mask, beside(call.backend), options)
        fixed = always(blocks, call.pattern.grid, keep_frames)
        counts = call.pattern.once(
            ("counts", kept, keep_frames, q.shape[2], q.device),
            lambda: _counts(call.pattern, kept, keep_frames, q.shape[2]).to(q.device),
        )
        (chosen,) = select(tiles, RULE, table.map(fixed), [counts])
        bits = active_tiles.pack(table.flags(chosen) & table.valid())
        state.update(bits=bits, step=call.step, pattern=call.pattern)
    active = active_tiles.unpack(bits, table.length)
    found, used = active_tiles.attend_on(
        q, k, v, blocks, active, scale=call.scale, key_mask=call.key_mask, backend=call.backend
    )
    return Attended(found.out, active_tiles.kept(blocks, active), used)


def choose(
    importance: torch.Tensor, blocks: BlockIndex, fixed: torch.Tensor, kept: float
) -> torch.Tensor:
    """The most important tiles of every row, a fraction of them, the fixed ones included.

    Args:
        importance: (B, H, N, N) [query tile, key tile].
        blocks: the index, of E pairs of tiles.
        fixed: bool (H or 1, E), pairs that are in whatever their importance; they count.
        kept: fraction of the pairs of each row, rounded up.

    Returns:
        bool (B, H, E).
    """
    table = tile_table(blocks)
    counts = Counts.of(_rows(blocks, fixed, kept), importance.shape[1]).to(importance.device)
    seen = table.map(table.valid())[None]
    return table.flags(choosing.choose(importance, seen, table.map(fixed), counts)) & table.valid()


def _counts(pattern: BlockPattern, kept: float, keep_frames: int, heads: int) -> Counts:
    """Of every head, on a CPU."""
    blocks = pattern.blocks.to("cpu")
    return Counts.of(_rows(blocks, always(blocks, pattern.grid, keep_frames), kept), heads)


def _rows(blocks: BlockIndex, fixed: torch.Tensor, kept: float) -> torch.Tensor:
    """int64 (H or 1, N): pairs to keep in each row."""
    table = tile_table(blocks)
    wanted = (table.map(table.valid()).sum(2) * kept).ceil().long()
    return torch.maximum(wanted, table.map(fixed).sum(2))


def bounds(pattern: BlockPattern, kept: float, keep_frames: int) -> tuple[float, float]:
    """The least and the most pairs that a choice can keep, as fractions of all pairs.

    They are equal where all tiles have one size.
    """

    def make(blocks: BlockIndex) -> tuple[float, float]:
        table, fixed = tile_table(blocks), always(blocks, pattern.grid, keep_frames)
        counts = _counts(pattern, kept, keep_frames, len(table.pattern))
        least, most = cost_bounds(table, table.map(fixed), Levels((1,), (counts,)), "row")
        return least / len(table.pattern), most / len(table.pattern)

    return pattern.blocks.derived(("bounds of a choice", kept, keep_frames), make)
