"""What virtual tokens miss, as the mean query of each tile sees it, in PyTorch on any device.

A virtual token has the mass and the mean of its piece to second order. What it misses is above all
that values and scores vary together inside the piece, and that is nearly the same for all queries
of a tile. So it is computed once a tile, for its mean query, which attends both to the keys and to
the virtual tokens that stand for them. The difference of the two, in the output and in the
log-sum-exp, is added to what every query of the tile reads in virtual tokens: a control variate.
"""

from __future__ import annotations

import torch

from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.pieces import cut, gathered
from diffpatch.kernels.virtual_tokens.tokens import Missed, VirtualTokens
from diffpatch.kernels.virtual_tokens.torch_impl import (
    SCORE_BYTES,
    of_heads,
    scores_of,
    softmax_of,
)

SCORE_BYTES_ELSEWHERE = 2**29  # many, because every portion of rows reads all keys again


def missed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tokens: VirtualTokens,
    blocks: BlockIndex,
    scale: float,
    seen: torch.Tensor,
    key_mask: torch.Tensor | None,
) -> Missed:
    """As `virtual_tokens.missed`, from `seen`, bool (B or 1, H or 1, N, V) [tile, piece]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, _, heads, _ = q.shape
    mean = _tile_means(q, blocks).to(wide).transpose(1, 2) * scale  # (B, H, N, D)
    keys, values = (
        of_heads(x.index_select(1, blocks.order), heads, wide).contiguous() for x in (k, v)
    )
    pooled, pooled_values = (of_heads(x, heads, wide) for x in (tokens.keys, tokens.values))
    spread = None if tokens.variance is None else of_heads(tokens.variance, heads, wide).mT * 0.5
    count = tokens.log_count.to(wide)[:, None, None]  # (B, 1, 1, V)
    alive = None if key_mask is None else key_mask[:, None, None, blocks.order]
    length = tokens.pieces.first.diff().long()
    held = SCORE_BYTES.get(q.device.type, SCORE_BYTES_ELSEWHERE)
    step = max(1, held // (wide.itemsize * batch * heads * keys.shape[2]))
    found = []
    for x, shown in zip(mean.split(step, 2), seen.split(step, 2), strict=True):
        of_keys = shown.repeat_interleave(length, 3)
        of_keys = of_keys if alive is None else of_keys & alive
        exact = softmax_of((x @ keys.mT).masked_fill_(~of_keys, -torch.inf), values)
        rough = scores_of(x, pooled.mT, spread, count).masked_fill_(~shown, -torch.inf)
        near = softmax_of(rough, pooled_values)
        known = exact[1].isfinite() & near[1].isfinite()
        out = torch.where(known[..., None], exact[0] - near[0], 0.0)
        found.append((out, torch.where(known, exact[1] - near[1], 0.0)))
    return Missed(*(torch.cat(parts, 2) for parts in zip(*found, strict=True)))


def _tile_means(q: torch.Tensor, blocks: BlockIndex) -> torch.Tensor:
    """(B, N, H, D): the mean query of every tile, in the dtype of sums."""
    tiles, wide = cut(blocks), torch.promote_types(q.dtype, torch.float32)
    x = gathered(q, tiles)
    x = x if tiles.even else x.masked_fill(~tiles.valid[..., None, None], 0.0)
    return x.sum(2, dtype=wide) / tiles.valid.sum(1)[:, None, None]
