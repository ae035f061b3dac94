"""Attention that computes what the GPU kernel with 8-bit scores computes, in PyTorch."""

from __future__ import annotations

import torch

from diffpatch.kernels.block_sparse.int8.levels import (
    mean_key,
    mean_score,
    quantize_keys,
    quantize_queries,
)
from diffpatch.kernels.block_sparse.torch_plan.attend import attend_torch
from diffpatch.kernels.blocks import BlockIndex


def attend_torch_int8(
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
    rounded_q, rounded_k = rounded(q, k, mean, blocks, key_mask)
    out, lse = attend_torch(
        rounded_q, rounded_k, v.to(mean.dtype), blocks, scale, key_mask, return_lse
    )
    if lse is not None:
        lse = lse + mean_score(q, mean, scale)
    return out.to(q.dtype), lse


def rounded(
    q: torch.Tensor,
    k: torch.Tensor,
    mean: torch.Tensor,
    blocks: BlockIndex,
    key_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries, and keys less their mean, as 8 bits know them, in fp32 (fp64 for fp64)."""
    queries, of_query = quantize_queries(q)
    keys, of_key = quantize_keys(k, mean, blocks, key_mask)
    found = torch.empty_like(k, dtype=mean.dtype)
    found[:, blocks.order] = keys * of_key.transpose(1, 2)[..., None]
    return queries * of_query[..., None], found
