"""How much of its attention a query tile gives to each key tile, estimated from pooled tokens."""

from __future__ import annotations

import torch

from diffpatch.kernels.active_tiles.api import tile_table
from diffpatch.kernels.blocks import BlockIndex

MAX_SCORES = 1 << 25  # scores held at a time


def tile_importance(
    q: torch.Tensor,
    k: torch.Tensor,
    blocks: BlockIndex,
    scale: float,
    *,
    key_mask: torch.Tensor | None = None,
    run: int = 16,
) -> torch.Tensor:
    """The attention each key tile gets from each query tile, of the tiles that the index visits.

    Queries and keys are averaged over runs of up to `run` tokens of a tile, in tile order; runs of
    keys count as often as they have tokens. That is SparseD's importance, the block mean of the
    softmax (arXiv 2509.24014), at 1 / run² of its cost.

    Args:
        q: (B, S, H, D).
        k: (B, S, K, D), where K divides H.
        blocks: the tiles, N of them.
        scale: the factor on q·k.
        key_mask: bool (B, S), True where a key may be attended to.
        run: most tokens that are averaged.

    Returns:
        fp32 (B, H, N, N) [query tile, key tile]; rows sum to 1 where anything is seen.
    """
    index, valid, tile = blocks.derived(("pooled runs", run), lambda b: _runs(b, run))
    batch, heads, groups = q.shape[0], q.shape[2], q.shape[2] // k.shape[2]
    size = valid.sum(1).to(q.device).float()  # (R,)
    weight = valid.expand(batch, -1, -1)
    queries = _mean(q, index, weight).transpose(1, 2) * scale  # (B, H, R, D)
    weight = weight if key_mask is None else weight & key_mask[:, index]
    keys = _mean(k, index, weight).repeat_interleave(groups, 2).transpose(1, 2)
    bias = weight.sum(2).float().log()[:, None, None]  # -inf where nothing may be seen
    visited = _visited(blocks)  # (H or 1, N, N)
    belongs = torch.nn.functional.one_hot(tile, blocks.num_tiles).float()  # (R, N)
    share = belongs * size[:, None] / (belongs.T @ size)  # weights of the runs of each query tile
    out = queries.new_zeros(batch, heads, blocks.num_tiles, blocks.num_tiles)
    step = max(1, MAX_SCORES // (batch * heads * len(tile)))
    for first in range(0, len(tile), step):
        piece = slice(first, first + step)
        scores = queries[:, :, piece] @ keys.mT + bias
        seen = visited[:, tile[piece]][:, :, tile]
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
        out += share[piece].T @ (weights @ belongs)
    return out


def _runs(blocks: BlockIndex, run: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tokens of each run, int64 (R, run); which there are, bool; its tile, int64 (R,)."""
    host = blocks.to("cpu")
    starts = host.starts.long()
    parts = -(-starts.diff() // run)
    tile = torch.arange(host.num_tiles).repeat_interleave(parts)
    nth = torch.arange(len(tile)) - (parts.cumsum(0) - parts)[tile]
    place = (starts[tile] + nth * run)[:, None] + torch.arange(run)
    valid = place < starts[tile + 1][:, None]
    index = host.order[place.clamp(max=host.num_tokens - 1)]
    return index.to(blocks.device), valid.to(blocks.device), tile.to(blocks.device)


def _mean(x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Means of (B, S, H, D) over the tokens of weight True (B, R, L): fp32 (B, R, H, D)."""
    total = (x[:, index] * weight[..., None, None]).sum(2, dtype=torch.float32)
    return total / weight.sum(2).clamp(min=1)[..., None, None]


def _visited(blocks: BlockIndex) -> torch.Tensor:
    """bool (H or 1, N, N): the pairs of tiles that each head visits."""
    table, tiles = tile_table(blocks), blocks.num_tiles
    out = torch.zeros(len(table.key), tiles * tiles, dtype=torch.bool, device=blocks.device)
    place = (table.query * tiles + table.key).masked_fill(table.area == 0, 0)
    out.scatter_(1, place, table.area > 0)
    first = (table.area > 0) & (table.query == 0) & (table.key == 0)
    out[:, 0] = first.any(1)  # pairs that only fill up were put there, too
    return out.view(-1, tiles, tiles)[table.pattern]
