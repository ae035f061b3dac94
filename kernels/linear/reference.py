"""Linear attention by its definition: every query sums over its own keys, in memory quadratic."""

from __future__ import annotations

import torch

from diffpatch.kernels.blocks import NOTHING, BlockIndex
from diffpatch.kernels.linear.features import feature_map


def left_out(blocks: BlockIndex) -> torch.Tensor:
    """bool (S, S), the pairs [query, key] whose tiles do not meet; one pattern."""
    tile = blocks.tile_of_place[blocks.place]
    return (blocks.mask_map()[0] == NOTHING)[tile][:, tile]


def attend_cumulants(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    scale: float,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear_attention.attend_cumulants` in the dtype of the arguments."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    out = torch.zeros_like(q)
    lse = q.new_full(q.shape[:3], -torch.inf)
    for b in range(q.shape[0]):
        far = left_out(blocks)
        if key_mask is not None:
            far = far & key_mask[b]
        seen = far.any(1)
        count = far.sum(1, dtype=q.dtype)[seen]
        share = far[seen].to(q.dtype) / count[:, None]
        for h in range(q.shape[2]):
            key, value, query = k[b, :, h], v[b, :, h], q[b, seen, h] * scale
            mean_k, mean_v = share @ key, share @ value
            products = torch.cat([key, value], -1)[:, :, None] * key[:, None]
            moments = torch.einsum("st,tij->sij", share, products)
            both = torch.cat([mean_k, mean_v], -1)
            spread = moments - both[:, :, None] * mean_k[:, None]  # (s, 2D, D)
            moved = torch.einsum("sij,sj->si", spread, query)
            size = q.shape[-1]
            second = 0.5 * (moved[:, :size] * query).sum(-1)
            held = torch.minimum(second, count.log())
            lse[b, seen, h] = count.log() + (query * mean_k).sum(-1) + held
            tilt = moved[:, size:] * (held / second.clamp(min=1e-30)).sqrt()[:, None]
            out[b, seen, h] = mean_v + tilt
    return out, lse


def attend_features(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    feature: str,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """`linear_attention.attend_features` in the dtype of the arguments."""
    far = left_out(blocks).expand(q.shape[0], 1, -1, -1)
    if key_mask is not None:
        far = far & key_mask[:, None, None]
    q, k = feature_map(q, feature), feature_map(k, feature)
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k) * far
    weights = torch.where(weights.sum(-1, keepdim=True) > 0, weights, far.to(q.dtype))
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)
