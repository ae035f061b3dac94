"""Virtual tokens by their definition: one piece, then one head and one query tile at a time."""

from __future__ import annotations

import itertools
import math

import torch

from diffpatch.kernels.blocks import NOTHING, BlockIndex
from diffpatch.kernels.pieces import Pieces
from diffpatch.kernels.virtual_tokens.tokens import VirtualTokens


def pool(
    k: torch.Tensor,
    v: torch.Tensor,
    pieces: Pieces,
    second_order: bool,
    key_mask: torch.Tensor | None,
) -> VirtualTokens:
    """As `virtual_tokens.pool`, in fp32 (fp64 for fp64), rounded to the dtype of the inputs."""
    wide = torch.promote_types(k.dtype, torch.float32)
    shape = (k.shape[0], len(pieces), *k.shape[2:])
    keys, values, variance = (k.new_zeros(shape) for _ in range(3))
    log_count = k.new_full(shape[:2], -torch.inf, dtype=torch.float32)
    largest = torch.finfo(k.dtype).max
    for b, piece in itertools.product(range(shape[0]), range(len(pieces))):
        token = pieces.index[piece][pieces.valid[piece]]
        token = token if key_mask is None else token[key_mask[b, token]]
        if not len(token):
            continue
        own = k[b, token].to(wide)
        keys[b, piece], values[b, piece] = own.mean(0), v[b, token].to(wide).mean(0)
        variance[b, piece] = (own - own.mean(0)).square().mean(0).clamp(max=largest)
        log_count[b, piece] = math.log(len(token))
    spread = variance if second_order else None
    return VirtualTokens(keys, values, spread, log_count, pieces)


def attend(
    q: torch.Tensor,
    tokens: VirtualTokens,
    blocks: BlockIndex,
    scale: float,
    near: tuple[torch.Tensor, torch.Tensor] | None,
    shown: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `virtual_tokens.attend_virtual`, in fp32 (fp64 for fp64); the exact part is one key more,
    of score `lse` and value `out`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[2] // tokens.keys.shape[2]
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=wide)
    left_out = blocks.mask_map() == NOTHING
    of_head = torch.zeros(q.shape[2], dtype=torch.int64)
    of_head = of_head if blocks.head_pattern is None else blocks.head_pattern.long()
    tiles = [blocks.order[a:b] for a, b in itertools.pairwise(blocks.starts.tolist())]
    for b, h, i in itertools.product(range(q.shape[0]), range(q.shape[2]), range(len(tiles))):
        seen = left_out[of_head[h], i, tokens.pieces.tile]
        seen = seen if shown is None else shown[b, h, i, tokens.pieces.whole]
        x = q[b, tiles[i], h].to(wide)
        count = tokens.log_count[b, seen].to(wide)
        scores = scale * x @ tokens.keys[b, seen, h // groups].to(wide).T + count
        if tokens.variance is not None:
            spread = tokens.variance[b, seen, h // groups].to(wide)
            second = 0.5 * scale**2 * x.square() @ spread.T
            scores = scores + torch.minimum(second, count.clamp(min=0))
        values = tokens.values[b, seen, h // groups].to(wide).expand(len(x), -1, -1)
        if near is not None:
            scores = torch.cat([scores, near[1][b, tiles[i], h, None].to(wide)], 1)
            values = torch.cat([values, near[0][b, tiles[i], h, None].to(wide)], 1)
        if scores.shape[1]:
            lse[b, tiles[i], h] = scores.logsumexp(1)
            weights = scores.softmax(1).nan_to_num()
            out[b, tiles[i], h] = (weights[:, None] @ values)[:, 0].to(q.dtype)
    return out, lse
