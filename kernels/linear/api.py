"""Attention to everything a query does not visit by one state: strictly linear in the tokens.

A state is a sum over keys, ``Σ left(k) right(v)ᵀ``. It is taken once over all keys, and the few
that a group of query tiles visits exactly are subtracted, recomputed from their keys and values.
Keys and values are centred on their mean over all tokens first, so that in fp32 nothing cancels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from diffpatch.kernels.block_sparse.backends import run
from diffpatch.kernels.block_sparse.operators import LINEAR
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.linear import reference as linear_attention_reference
from diffpatch.kernels.linear.features import feature_map
from diffpatch.kernels.linear.groups import groups

HELD_BYTES = {"cpu": 2**25}  # what the keys, values and states of some groups may take at a time
HELD_BYTES_ELSEWHERE = 2**28
EMPTY = 1e-6  # of a sum over all keys: less than this is nothing

Result = tuple[torch.Tensor, torch.Tensor]


def attend_cumulants(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    scale: float,
    key_mask: torch.Tensor | None = None,
    backend: str = "auto",
) -> Result:
    """All keys that a query does not visit, by their first and second moments.

    With n such keys, of mean k̄ and covariance C, and H = mean((v - v̄)(k - k̄)ᵀ), the expansion of
    their softmax around the mean key has the mass ``log n + s q·k̄ + w``, ``w = ½ s² qᵀCq``, and the
    output ``v̄ + s H q``. As Gaussian keys condense onto single ones beyond it, w is capped at log n
    and the tilt s H q held at what it is there: an outlier channel cannot blow up either.

    Args:
        q: (B, S, H, D).
        k: (B, S, K, D), where K divides H.
        v: (B, S, K, D).
        blocks: tiles that a query's tile visits, even partly, are left out; one pattern.
        scale: the factor on q·k.
        key_mask: bool (B, S), False for keys nobody may attend to, or None.
        backend: "triton", "torch", "reference" (in memory quadratic), or "auto".

    Returns:
        The output (B, S, H, D) in the dtype of q and its natural log-sum-exp, fp32 (B, S, H) (fp64
        for fp64); 0 and -inf for queries that visit every key.
    """

    def compute(name: str) -> Result:
        if name == "triton":
            from diffpatch.kernels.linear import triton_impl as linear_attention_triton

            return linear_attention_triton.attend_cumulants(q, k, v, blocks, scale, key_mask)
        if name == "reference":
            x, y, z = _wide(q, k, v)
            out, lse = linear_attention_reference.attend_cumulants(x, y, z, blocks, scale, key_mask)
            return out.to(q.dtype), lse
        return _cumulants(q, k, v, blocks, scale, key_mask)

    return run(LINEAR, backend, blocks, (q, k, v), compute)[0]


def _cumulants(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    scale: float,
    key_mask: torch.Tensor | None,
) -> Result:
    """`attend_cumulants` in PyTorch."""
    size = q.shape[-1]
    keep = _keep(k, key_mask)
    (k, centre_k), (v, centre_v) = _centred(k, keep), _centred(v, keep)
    one = keep.expand(*k.shape[:3], 1)  # 0 where masked, as are k and v
    left, right = torch.cat([k, one], -1), torch.cat([k, v, one], -1)
    out, lse = _nothing(q, k.dtype)
    for rows, ok, sums, _ in _far_sums(left, right, blocks):
        count = sums[..., -1:, -1:]  # (B, G, K, 1, 1)
        share = count.clamp(min=1.0).reciprocal()
        mean = sums[..., -1:, :-1] * share  # of keys and values, (B, G, K, 1, 2D)
        spread = sums[..., :-1, :-1] * share - mean[..., :size].mT * mean
        query = _by_key_head(q, rows, k.shape[2]) * scale  # (B, G, K, R, D)
        moved = query @ spread
        second = 0.5 * (moved[..., :size] * query).sum(-1, keepdim=True).clamp(min=0.0)
        cap = count.clamp(min=1.0).log()
        held = torch.minimum(second, cap)
        mean_key = mean[..., :size] + centre_k[:, None, :, None]
        mass = count.log() + held + query @ mean_key.mT
        tilt = moved[..., size:] * (held / second.clamp(min=1e-30)).sqrt()
        value = mean[..., size:] + centre_v[:, None, :, None] + tilt
        value = torch.where(count > 0, value, 0.0)
        _put(out, rows, ok, value)
        _put(lse[..., None], rows, ok, mass)
    return out, lse


def attend_features(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    feature: str,
    key_mask: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """All keys that a query does not visit, weighted by φ(q)·φ(k) instead of exp(q·k).

    The state holds values less their mean, which gives the same result and keeps its precision.
    A query to which φ gives no weight at all gets the mean of the values.

    Args:
        q: (B, S, H, D), what φ takes.
        k: (B, S, K, D), where K divides H.
        v: (B, S, K, E).
        blocks: tiles that a query's tile visits, even partly, are left out; one pattern.
        feature: one of `linear_features.FEATURES`.
        key_mask: bool (B, S), False for keys nobody may attend to, or None.
        backend: "triton", "torch", "reference" (in memory quadratic), or "auto".

    Returns:
        (B, S, H, E) in the dtype of q; 0 for queries that visit every key.
    """

    def compute(name: str) -> torch.Tensor:
        if name == "reference":
            x, y, z = _wide(q, k, v)
            whole = linear_attention_reference.attend_features(x, y, z, blocks, feature, key_mask)
            return whole.to(q.dtype)
        if name == "triton":
            from diffpatch.kernels.linear import triton_impl as linear_attention_triton

            x, y = (feature_map(t.float(), feature).to(t.dtype) for t in (q, k))
            if x.shape[-1] <= linear_attention_triton.MAX_SIZE:
                return linear_attention_triton.attend_features(x, y, v, blocks, key_mask)
        return _features(q, k, v, blocks, feature, key_mask)

    return run(LINEAR, backend, blocks, (q, k, v), compute)[0]


def _features(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    feature: str,
    key_mask: torch.Tensor | None,
) -> torch.Tensor:
    """`attend_features` in PyTorch."""
    keep = _keep(k, key_mask)
    v, centre = _centred(v, keep)
    one = keep.expand(*k.shape[:3], 1)
    left = torch.cat([feature_map(k.to(keep.dtype), feature) * keep, one], -1)
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
    for rows, ok, sums, total in _far_sums(left, torch.cat([v, one], -1), blocks):
        query = feature_map(_by_key_head(q, rows, k.shape[2]), feature)  # (B, G, K, R, F)
        weighted = query @ sums[..., :-1, :]
        mass = weighted[..., -1:]
        # What is left of a sum after the subtraction of all of it is rounding, not weight.
        blind = mass <= EMPTY * (query @ total[..., :-1, -1:])
        mean = sums[..., -1:, :-1] / sums[..., -1:, -1:].clamp(min=1.0)
        value = torch.where(blind, mean, weighted[..., :-1] / mass.masked_fill(blind, 1.0))
        value = value + centre[:, None, :, None]
        _put(out, rows, ok, torch.where(sums[..., -1:, -1:] > 0, value, 0.0))
    return out


def _wide(*inputs: torch.Tensor) -> Iterator[torch.Tensor]:
    return (x.to(torch.promote_types(x.dtype, torch.float32)) for x in inputs)


def _centred(x: torch.Tensor, keep: torch.Tensor) -> Result:
    """x (B, S, K, D), wide, less its mean over the tokens kept; and that mean (B, K, D)."""
    wide = x.to(keep.dtype)
    mean = (wide * keep).sum(1) / keep.sum(1).clamp(min=1.0)
    return (wide - mean[:, None]) * keep, mean


def _keep(k: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    """1 for keys that count, else 0: (B, S, 1, 1) in the dtype of sums."""
    wide = torch.promote_types(k.dtype, torch.float32)
    if key_mask is None:
        return k.new_ones(k.shape[0], k.shape[1], 1, 1, dtype=wide)
    return key_mask[:, :, None, None].to(wide)


def _nothing(q: torch.Tensor, wide: torch.dtype) -> Result:
    return torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=wide)


def _far_sums(
    left: torch.Tensor, right: torch.Tensor, blocks: BlockIndex
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Some groups of queries at a time, and the sums over all keys that these do not visit.

    Args:
        left: (B, S, K, P), 0 for masked keys.
        right: (B, S, K, R).
        blocks: the tiles.

    Yields:
        The queries (G, M), which of them count, the sums (B, G, K, P, R) of left ⊗ right over what
        they do not visit, and (B, 1, K, P, R) over all that some query does not.
    """
    plan = groups(blocks)
    left, right = (x.transpose(1, 2).contiguous() for x in (left, right))  # (B, K, S, ·)
    total = (left[:, :, plan.pool].mT @ right[:, :, plan.pool])[:, None]
    width = left.shape[-1] + right.shape[-1]
    limit = HELD_BYTES.get(left.device.type, HELD_BYTES_ELSEWHERE)
    for batch in plan.batches:
        one = (batch.near.shape[1] + batch.rows.shape[1]) * width
        one += 2 * left.shape[-1] * right.shape[-1]
        step = max(1, limit // (one * left.shape[0] * left.shape[1] * left.element_size()))
        for i in range(0, len(batch.rows), step):
            piece = slice(i, i + step)
            near, near_ok = batch.near[piece], batch.near_ok[piece]
            a, b = (
                x.index_select(2, near.flatten()).unflatten(2, near.shape) for x in (left, right)
            )
            if not batch.even:
                a = a * near_ok[..., None]
            visited = (a.mT @ b).transpose(1, 2)
            yield batch.rows[piece], batch.rows_ok[piece], total - visited, total


def _by_key_head(x: torch.Tensor, rows: torch.Tensor, key_heads: int) -> torch.Tensor:
    """Queries (B, S, H, D) of groups (G, M) as (B, G, K, M · H / K, D), wide."""
    chosen = x[:, rows].to(torch.promote_types(x.dtype, torch.float32))
    chosen = chosen.unflatten(3, (key_heads, -1)).transpose(2, 3)  # (B, G, K, M, H / K, D)
    return chosen.flatten(3, 4)


def _put(out: torch.Tensor, rows: torch.Tensor, ok: torch.Tensor, value: torch.Tensor) -> None:
    """Undo `_by_key_head`: values (B, G, K, M · H / K, D) into out (B, S, H, D)."""
    batch, groups_, key_heads, _, size = value.shape
    value = value.reshape(batch, groups_, key_heads, rows.shape[1], -1, size)
    value = value.transpose(2, 3).flatten(3, 4)  # (B, G, M, H, D)
    out[:, rows[ok]] = value[:, ok].to(out.dtype)
