"""Attention over active tiles by its definition: one head and one pair of tiles at a time."""

from __future__ import annotations

import itertools

import torch

from diffpatch.kernels.active_tiles.table import Result, tile_table
from diffpatch.kernels.block_sparse.reference import dense_mask
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.gpu.common import LOG2_E


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    active: torch.Tensor,
    scale: float,
    key_mask: torch.Tensor | None,
    threshold: float | None,
    reverse: bool,
    strip: int = 0,
) -> Result:
    """As `active_tiles.attend`, in fp32 (fp64 for fp64 inputs)."""
    table = tile_table(blocks, strip)
    dtype = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[2] // k.shape[2]
    tokens, strips = (
        [blocks.order[a:b] for a, b in itertools.pairwise(borders.tolist())]
        for borders in (blocks.starts, table.strips.first)
    )
    seen = dense_mask(blocks)
    out, hits = torch.zeros_like(q), torch.zeros_like(active)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=dtype)
    for b, h, i in itertools.product(range(q.shape[0]), range(q.shape[2]), range(len(tokens))):
        p = int(table.pattern.expand(q.shape[2])[h])
        entries = range(int(table.row_ptr[p, i]), int(table.row_ptr[p, i + 1]))
        top = q.new_full((len(tokens[i]),), -torch.inf, dtype=dtype)
        scores, keys = [], []
        for e in reversed(entries) if reverse else entries:
            if not active[b, h, e]:
                continue
            tile = strips[int(table.key[p, e])]
            s = q[b, tokens[i], h].to(dtype) @ k[b, tile, h // groups].to(dtype).T * scale
            s = s.masked_fill(~seen[p][tokens[i]][:, tile], -torch.inf)
            s = s if key_mask is None else s.masked_fill(~key_mask[b, tile], -torch.inf)
            peak = s.amax(1)
            if threshold is not None:  # -inf - -inf is not a number, and not a hit
                hits[b, h, e] = bool(((peak - top) * LOG2_E > threshold).any())
            top = torch.maximum(top, peak)
            scores.append(s)
            keys.append(tile)
        if scores:
            together = torch.cat(scores, 1)
            lse[b, tokens[i], h] = together.logsumexp(1)
            weights = together.softmax(1).nan_to_num()
            values = v[b, torch.cat(keys), h // groups].to(dtype)
            out[b, tokens[i], h] = (weights @ values).to(q.dtype)
    return Result(out, lse, hits if threshold is not None else None)
