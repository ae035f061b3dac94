"""What the temporal modes that remember decisions share: the tiles that are always computed."""

from __future__ import annotations

import torch

from diffpatch.kernels.active_tiles.api import tile_table
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.methods.base import AttentionCall
from diffpatch.patterns.grid import Grid


def always(blocks: BlockIndex, grid: Grid, frames: int) -> torch.Tensor:
    """bool (H or 1, E): pairs of tiles that no decision leaves out.

    These are the rows and columns of text, each tile's view of itself, and the keys of the first
    `frames` frames.
    """

    def build(index: BlockIndex) -> torch.Tensor:
        table = tile_table(index)
        early = grid.in_first_frames(index.order, frames)
        text, seen = (_any_in_tile(x, index) for x in (grid.is_text(index.order), early))
        kept = text[table.query] | text[table.key] | seen[table.key]
        return ((kept | (table.query == table.key)) & (table.area > 0))[table.pattern]

    return blocks.derived(("always", grid, frames), build)


def _any_in_tile(tokens: torch.Tensor, blocks: BlockIndex) -> torch.Tensor:
    """bool (S,) in tile order -> bool (N,): whether a tile holds a True one."""
    before = torch.nn.functional.pad(tokens.long().cumsum(0), (1, 0))
    return before[blocks.starts.long()].diff() > 0


def remembered(call: AttentionCall, q: torch.Tensor) -> torch.Tensor | None:
    """The bits of an earlier step, uint8 (B, H, n), if they are about these tokens and heads."""
    bits = call.state.get("bits")
    if bits is None or call.state["pattern"] is not call.pattern:
        return None
    same = bits.shape[:2] == (q.shape[0], q.shape[2]) and bits.device == q.device
    return bits if same else None
