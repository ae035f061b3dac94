"""Attention of every query to every key, by torch, in the layout and with the masks of the rest."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attend_dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
) -> torch.Tensor:
    """Dense attention.

    Args:
        q: (B, S, H, D).
        k: (B, S, K, D), where K divides H.
        v: like k.
        scale: the factor on q·k; None means 1 / sqrt(D).
        key_mask: bool (B, S), True where a key may be attended to, or None.
        is_causal: see no later keys.

    Returns:
        (B, S, H, D).
    """
    mask = None if key_mask is None else key_mask[:, None, None]
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)
