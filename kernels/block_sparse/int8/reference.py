"""Queries and keys in 8 bits, so that scores can be computed on 8-bit tensor cores.

Keys are smoothed first: their mean over the tokens is subtracted, which adds the same number to all
scores of a query, so that the softmax does not change and the log-sum-exp is put right by
``scale * q·mean``. What is left has no channel far from 0, which would take all 255 levels for
itself (SageAttention, arXiv 2410.02367). Every query has a scale of its own, which costs nothing in
a kernel whose softmax goes by rows; of the keys every run of `RUN` tokens of a tile.

Here is the definition, in PyTorch, and attention that computes what the GPU kernel computes.
"""

from __future__ import annotations

import torch

from diffpatch.kernels.block_sparse.torch_plan import attend as block_sparse_torch
from diffpatch.kernels.blocks import BlockIndex

RUN = 64  # a multiple of every kernel's sub-blocks of keys
LEVELS = 127
SMALLEST = 1e-20  # the largest magnitude is taken to be this or more


def mean_key(k: torch.Tensor, key_mask: torch.Tensor | None = None) -> torch.Tensor:
    """The mean over the tokens that count.

    Args:
        k: (B, S, K, D).
        key_mask: bool (B, S), False for keys nobody may attend to, whatever they hold; or None.

    Returns:
        fp32 (fp64 for fp64) (B, K, D), 0 where no token counts.
    """
    dtype = torch.promote_types(k.dtype, torch.float32)
    if key_mask is None:
        return k.mean(1, dtype=dtype)
    count = key_mask.sum(1).clamp(min=1)[:, None, None]
    return k.masked_fill(~key_mask[:, :, None, None], 0.0).sum(1, dtype=dtype) / count


def mean_score(q: torch.Tensor, mean: torch.Tensor, scale: float) -> torch.Tensor:
    """What smoothing took from the scores of each query: ``scale * q·mean``.

    Args:
        q: (B, S, H, D).
        mean: (B, K, D), where K divides H.
        scale: the factor on q·k.

    Returns:
        (B, S, H) in the dtype of the mean.
    """
    groups = q.shape[2] // mean.shape[1]
    of_head = mean.repeat_interleave(groups, 1)[:, None]
    return (q.to(mean.dtype) * of_head).sum(-1) * scale


def quantize_queries(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries (B, S, H, D) as int8 of the same shape and scales (B, S, H): q ≈ int8 * scale."""
    x = q.to(torch.promote_types(q.dtype, torch.float32))
    scales = x.abs().amax(-1).clamp(min=SMALLEST) / LEVELS
    return (x / scales[..., None] + 0.5).floor().to(torch.int8), scales


def quantize_keys(
    k: torch.Tensor,
    mean: torch.Tensor,
    blocks: BlockIndex,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys less their mean as 8-bit integers, in tile order: ``k - mean ≈ int8 * scale``.

    Args:
        k: (B, S, K, D).
        mean: fp32 (B, K, D), what is subtracted; zeros leave the keys as they are.
        blocks: the tiles.
        key_mask: bool (B, S), False for keys that become 0; or None.

    Returns:
        int8 (B, S, K, D) and the scale of every key, fp32 (fp64 for fp64) (B, K, S).
    """
    x = k.to(mean.dtype) - mean[:, None]
    if key_mask is not None:
        x = x.masked_fill(~key_mask[:, :, None, None], 0.0)
    x = x[:, blocks.order].transpose(1, 2)  # (B, K, S, D), in tile order
    run = blocks.derived("quantization runs", _runs)
    largest = x.abs().amax(-1)
    of_run = largest.new_zeros(*x.shape[:2], int(run[-1]) + 1)
    of_run.scatter_reduce_(2, run.expand_as(largest), largest, "amax")
    scales = of_run[:, :, run].clamp(min=SMALLEST) / LEVELS
    return (x / scales[..., None] + 0.5).floor().to(torch.int8).transpose(1, 2), scales


def _runs(blocks: BlockIndex) -> torch.Tensor:
    """int64 (S,), the number of the run that each place of tile order belongs to."""
    starts = blocks.starts.long()
    place = torch.arange(blocks.num_tokens, device=blocks.device)
    in_tile = place - starts[:-1].repeat_interleave(starts.diff())
    return (in_tile % RUN == 0).cumsum(0) - 1


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    scale: float,
    key_mask: torch.Tensor | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention with the rounding of 8-bit scores, computed in fp32: not fast, but everywhere.

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
    mean = mean_key(k, key_mask)
    queries, of_query = quantize_queries(q)
    keys, of_key = quantize_keys(k, mean, blocks, key_mask)
    rounded_k = torch.empty_like(k, dtype=mean.dtype)
    rounded_k[:, blocks.order] = keys * of_key.transpose(1, 2)[..., None]
    rounded_q = queries * of_query[..., None]
    out, lse = block_sparse_torch.attend(
        rounded_q, rounded_k, v.to(mean.dtype), blocks, scale, key_mask, return_lse
    )
    if lse is not None:
        lse = lse + mean_score(q, mean, scale)
    return out.to(q.dtype), lse
