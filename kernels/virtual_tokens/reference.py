"""Virtual tokens by their definition: one piece, then one head and one query tile at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch

from diffpatch.kernels.blocks import NOTHING, BlockIndex
from diffpatch.kernels.pieces import Pieces
from diffpatch.kernels.virtual_tokens.tokens import Missed, VirtualTokens


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
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=wide)
    for b, h, _, tile, seen in _tiles(q, tokens, blocks, shown):
        scores, values = _scores(q[b, tile, h].to(wide), tokens, b, h, q.shape[2], seen, scale)
        values = values.expand(len(tile), -1, -1)
        if near is not None:
            scores = torch.cat([scores, near[1][b, tile, h, None].to(wide)], 1)
            values = torch.cat([values, near[0][b, tile, h, None].to(wide)], 1)
        if scores.shape[1]:
            lse[b, tile, h] = scores.logsumexp(1)
            weights = scores.softmax(1).nan_to_num()
            out[b, tile, h] = (weights[:, None] @ values)[:, 0].to(q.dtype)
    return out, lse


def missed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tokens: VirtualTokens,
    blocks: BlockIndex,
    scale: float,
    shown: torch.Tensor | None,
    key_mask: torch.Tensor | None,
) -> Missed:
    """As `virtual_tokens.missed`: the mean query of a tile against the keys, and their means."""
    wide, groups = torch.promote_types(q.dtype, torch.float32), q.shape[2] // k.shape[2]
    shape = (q.shape[0], q.shape[2], blocks.num_tiles)
    out, lse = q.new_zeros(*shape, q.shape[3], dtype=wide), q.new_zeros(shape, dtype=wide)
    pieces = tokens.pieces
    for b, h, i, tile, seen in _tiles(q, tokens, blocks, shown):
        mean = q[b, tile, h].to(wide).mean(0, keepdim=True)
        token = pieces.index[seen][pieces.valid[seen]]
        token = token if key_mask is None else token[key_mask[b, token]]
        if not len(token):
            continue
        exact = scale * mean @ k[b, token, h // groups].to(wide).T
        rough, means = _scores(mean, tokens, b, h, q.shape[2], seen, scale)
        values = v[b, token, h // groups].to(wide)
        out[b, h, i] = (exact.softmax(1) @ values - rough.softmax(1) @ means)[0]
        lse[b, h, i] = exact.logsumexp(1)[0] - rough.logsumexp(1)[0]
    return Missed(out, lse)


def _tiles(
    q: torch.Tensor, tokens: VirtualTokens, blocks: BlockIndex, shown: torch.Tensor | None
) -> Iterator[tuple[int, int, int, torch.Tensor, torch.Tensor]]:
    """Batch entry, head, tile, its tokens, and bool (V,): which pieces are shown to it."""
    left_out = blocks.mask_map() == NOTHING
    of_head = torch.zeros(q.shape[2], dtype=torch.int64)
    of_head = of_head if blocks.head_pattern is None else blocks.head_pattern.long()
    tiles = [blocks.order[a:b] for a, b in itertools.pairwise(blocks.starts.tolist())]
    for b, h, i in itertools.product(range(q.shape[0]), range(q.shape[2]), range(len(tiles))):
        seen = left_out[of_head[h], i, tokens.pieces.tile]
        yield b, h, i, tiles[i], seen if shown is None else shown[b, h, i, tokens.pieces.whole]


def _scores(
    x: torch.Tensor,
    tokens: VirtualTokens,
    entry: int,
    head: int,
    heads: int,
    seen: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (R, V) of queries (R, D) and the virtual tokens that are seen, and values (V, D)."""
    of_keys = head * tokens.keys.shape[2] // heads
    keys, values = (y[entry, seen, of_keys].to(x.dtype) for y in (tokens.keys, tokens.values))
    count = tokens.log_count[entry, seen].to(x.dtype)
    scores = scale * x @ keys.T + count
    if tokens.variance is not None:
        spread = tokens.variance[entry, seen, of_keys].to(x.dtype)
        second = 0.5 * scale**2 * x.square() @ spread.T
        scores = scores + torch.minimum(second, count.clamp(min=0))
    return scores, values
