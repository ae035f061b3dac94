"""What virtual tokens miss, as the mean query of each tile sees it.

A virtual token has the mass and the mean of its piece to second order. What it misses, above all
that values go along with scores inside the piece, is nearly the same for all queries of a tile. So
the mean query of the tile looks at the keys themselves and at the virtual tokens that stand for
them, and what the two differ by, in the output and in the log-sum-exp, is added to what every query
of the tile reads in virtual tokens: a control variate, for one query a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.pieces import Pieces, cut
from diffpatch.kernels.virtual_tokens.tokens import VirtualTokens

# Scores held at a time. Elsewhere many, because every portion reads all keys again.
SCORE_BYTES = {"cpu": 2**20}
SCORE_BYTES_ELSEWHERE = 2**29
LOWEST, TINY = -1e30, 1e-30  # finite, so that nothing is divided by what nobody sees


class Missed(NamedTuple):
    """Exact less virtual attention of the mean query of each tile.

    Attributes:
        out: (B, H, N, D), fp32 (fp64 for fp64).
        lse: (B, H, N). Both are 0 where a tile sees no virtual token.
    """

    out: torch.Tensor
    lse: torch.Tensor

    def added(
        self, out: torch.Tensor, lse: torch.Tensor, blocks: BlockIndex
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """An attention to virtual tokens, (B, S, H, D) and (B, S, H), and what it missed."""
        tile = blocks.tile_of_place[blocks.place]
        more, longer = (x[:, :, tile].transpose(1, 2) for x in self)
        return (out + more).to(out.dtype), lse + longer


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
    groups = q.shape[2] // k.shape[2]

    def of_heads(x: torch.Tensor) -> torch.Tensor:
        return x.to(wide).transpose(1, 2).repeat_interleave(groups, 1).contiguous()  # (B, H, ., D)

    tiles = cut(blocks)
    mean = _means(q, blocks, tiles).to(wide).transpose(1, 2) * scale  # (B, H, N, D)
    keys, values = (of_heads(x.index_select(1, blocks.order)) for x in (k, v))
    alive = None if key_mask is None else key_mask[:, None, None, blocks.order]
    length = tokens.pieces.first.diff().long()
    pooled, pooled_values = of_heads(tokens.keys), of_heads(tokens.values)
    variance = None if tokens.variance is None else of_heads(tokens.variance).mT
    count = tokens.log_count.to(wide)[:, None, None]  # (B, 1, 1, V)
    batch, heads, number, _ = mean.shape
    held = SCORE_BYTES.get(q.device.type, SCORE_BYTES_ELSEWHERE)
    rows = max(1, held // (wide.itemsize * batch * heads * keys.shape[2]))
    found = []
    for piece in (slice(n, n + rows) for n in range(0, number, rows)):
        x, shown = mean[:, :, piece], seen[:, :, piece]
        rough = x @ pooled.mT + count
        if variance is not None:
            rough = rough + torch.minimum(0.5 * (x.square() @ variance), count.clamp(min=0))
        of_keys = shown.repeat_interleave(length, 3)
        of_keys = of_keys if alive is None else of_keys & alive
        exact = _attention(x @ keys.mT, of_keys, values)
        near = _attention(rough, shown & (count > -torch.inf), pooled_values)
        known = (exact[2] & near[2])[..., None]
        found.append(torch.where(known, torch.cat([exact[0] - near[0], exact[1] - near[1]], 3), 0))
    both = torch.cat(found, 2)
    return Missed(both[..., :-1], both[..., -1])


def _means(x: torch.Tensor, blocks: BlockIndex, pieces: Pieces) -> torch.Tensor:
    """(B, V, H, D): the mean of every piece of (B, S, H, D), in the dtype of sums."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if pieces.even:
        return x.index_select(1, blocks.order).unflatten(1, (len(pieces), -1)).mean(2, dtype=wide)
    gathered = x[:, pieces.index].masked_fill(~pieces.valid[..., None, None], 0.0)
    return gathered.sum(2, dtype=wide) / pieces.valid.sum(1)[:, None, None]


def _attention(
    scores: torch.Tensor, seen: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output (..., D), the log-sum-exp (..., 1), and where anything is seen, (...)."""
    scores = scores.masked_fill(~seen, -torch.inf)
    # Constant for the gradients: the maximum drops out of what follows.
    top = scores.detach().amax(-1, keepdim=True).clamp(min=LOWEST)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    safe = total.clamp(min=TINY)
    return (weights @ values) / safe, safe.log() + top, total[..., 0] > 0
