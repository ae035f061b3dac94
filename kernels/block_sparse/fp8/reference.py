"""Attention that computes what the GPU kernel with 8-bit floats computes, in PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from diffpatch.kernels.block_sparse.fp8.levels import quantize_values, round_weights
from diffpatch.kernels.block_sparse.int8.levels import mean_key, mean_score
from diffpatch.kernels.block_sparse.int8.reference import rounded
from diffpatch.kernels.blocks import BlockIndex


def attend_torch_fp8(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    scale: float,
    key_mask: torch.Tensor | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention with scores in 8 bits, weights and values in 8-bit floats, computed in fp32.

    The kernel rounds a weight by the largest score so far, and here it is that of all: the two
    differ by chance, as far as either differs from exact weights.

    Args:
        q: (B, S, H, D).
        k: (B, S, K, D), where K divides H.
        v: (B, S, K, D).
        blocks: which pairs to keep.
        scale: the factor on q·k, above 0.
        key_mask: bool (B, S), False for keys nobody may attend to, or None.
        return_lse: whether to return the log-sum-exp.

    Returns:
        The output (B, S, H, D) in the dtype of q and, if asked for, the natural log-sum-exp of the
        scores, fp32 (fp64 for fp64) (B, S, H).
    """
    key, value = mean_key(k, key_mask), mean_key(v, key_mask)
    queries, keys = rounded(q, k, key, blocks, key_mask)
    values, of_channel = quantize_values(v, value, key_mask)
    groups = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(groups, 2) for x in (keys, values.to(value.dtype)))
    of_channel, value = (x.repeat_interleave(groups, 1)[:, :, None] for x in (of_channel, value))
    queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))  # (B, H, S, D)
    out, lse = torch.zeros_like(queries), queries.new_full(queries.shape[:3], -torch.inf)
    for heads, rows, others, seen in _rows(blocks, q.shape[2]):
        mask = seen if key_mask is None else seen & key_mask[:, None, None, others]
        scores = queries[:, heads, rows] @ keys[:, heads, others].mT * scale
        scores = scores.masked_fill(~mask, -torch.inf)
        top = scores.amax(-1, keepdim=True)
        weights = (scores - top.masked_fill(top == -torch.inf, 0.0)).exp()
        total = weights.sum(-1, keepdim=True)
        lse[:, heads, rows] = (total.log() + top)[..., 0]
        out[:, heads, rows] = round_weights(weights) @ values[:, heads, others] / total.clamp(min=1)
    out = torch.where(lse.isneginf()[..., None], 0.0, out * of_channel + value)
    out, lse = out.transpose(1, 2).to(q.dtype), lse.transpose(1, 2)
    return out, lse + mean_score(q, key, scale) if return_lse else None


def _rows(
    blocks: BlockIndex, count: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What visits anything: h heads (h, 1), R queries of a tile and the n keys of those that it
    visits, by their numbers in the sequence, and which of these each query sees, bool (R, n)."""
    table, starts, row_ptr = blocks.mask_table(), blocks.starts.tolist(), blocks.row_ptr.tolist()
    tokens = [blocks.order[a:b] for a, b in itertools.pairwise(starts)]
    pattern = blocks.head_pattern
    pattern = torch.zeros(count, dtype=torch.int32) if pattern is None else pattern
    for row, (a, b) in enumerate(itertools.pairwise(row_ptr)):
        heads = (pattern.to(blocks.device) == row // blocks.num_tiles).nonzero()[:, 0]
        rows, cols = tokens[row % blocks.num_tiles], blocks.cols[a:b].tolist()
        if not len(heads) or not cols:
            continue
        masks = zip(table[blocks.mask_ids[a:b].long()], cols, strict=True)
        seen = torch.cat([mask[: len(rows), : len(tokens[col])] for mask, col in masks], 1)
        yield heads[:, None], rows, torch.cat([tokens[col] for col in cols]), seen
