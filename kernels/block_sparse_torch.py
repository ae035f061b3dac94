"""Block-sparse attention in PyTorch: SDPA on the keys that each group of query tiles needs.

It skips the work on any device, autograd goes through it, and no tensor grows with S².
"""

from __future__ import annotations

from typing import Any, overload

import torch
import torch.nn.functional as F

from diffpatch.kernels.block_sparse_plan import Call, Plan, TileMask, plans
from diffpatch.kernels.blocks import BlockIndex

MAX_CACHED_MASKS = 192 << 20  # bytes of expanded masks kept with an index
MAX_GATHERED = 256 << 20  # bytes of keys and values gathered at a time

Result = tuple[torch.Tensor, torch.Tensor | None]  # the output and, if asked for, the log-sum-exp


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    scale: float,
    key_mask: torch.Tensor | None,
    return_lse: bool,
) -> Result:
    """Attention over the kept pairs by SDPA on gathered keys.

    Args:
        q: (B, S, H, D).
        k: (B, S, K, D), where K divides H.
        v: (B, S, K, D).
        blocks: which pairs to keep.
        scale: the factor on q·k.
        key_mask: bool (B, S), False for keys nobody may attend to, or None. It needs a mask in
            every call and is slower.
        return_lse: whether to return the log-sum-exp. On the CPU it comes from the same SDPA call;
            elsewhere, or where gradients are needed, from attention written out (slower).

    Returns:
        The output (B, S, H, D) and the natural log-sum-exp (B, S, H), fp32 or wider, or None.
    """
    groups = q.shape[2] // k.shape[2]
    outs: list[torch.Tensor] = []
    lses: list[torch.Tensor | None] = []
    pieces = plans(blocks)
    for plan in pieces:
        heads = plan.heads
        query = q if heads is None else q.index_select(2, heads)
        key, value = k, v
        if groups > 1 or heads is not None:
            every = torch.arange(q.shape[2], device=q.device) if heads is None else heads
            key, value = (x.index_select(2, every // groups) for x in (k, v))
        attention = _Attention(blocks, plan, scale, return_lse)
        out, lse = attention(query, key, value, key_mask)
        outs.append(out)
        lses.append(lse)
    if pieces[0].heads is None:
        return outs[0], lses[0]
    back = torch.cat([plan.heads for plan in pieces if plan.heads is not None]).argsort()
    out, lse = _cat(outs, 2), _cat(lses, 2)
    return out.index_select(2, back), None if lse is None else lse.index_select(2, back)


class _Attention:
    """Runs one plan: the calls of one pattern, for the heads that follow it."""

    def __init__(self, blocks: BlockIndex, plan: Plan, scale: float, return_lse: bool) -> None:
        self.blocks, self.plan, self.scale, self.return_lse = blocks, plan, scale, return_lse

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None
    ) -> Result:
        """q, k, v (B, S, h, D), one key head a query head -> the output alike, and (B, S, h)."""
        q = q if self.plan.rows is None else q.index_select(1, self.plan.rows)
        if self.plan.keys is not None:
            k, v = k.index_select(1, self.plan.keys), v.index_select(1, self.plan.keys)
            key_mask = None if key_mask is None else key_mask[:, self.plan.keys]
        outs: list[torch.Tensor] = []
        lses: list[torch.Tensor | None] = []
        first = 0
        for call in self.plan.calls:
            rows = q[:, first : first + call.stack * call.rows]
            first += call.stack * call.rows
            heads = self._heads_at_once(call, k)
            parts = [
                self._call(call, rows[:, :, h], k[:, :, h], v[:, :, h], key_mask)
                for h in (slice(i, i + heads) for i in range(0, q.shape[2], heads))
            ]
            outs.append(_cat([out for out, _ in parts], 2))
            lses.append(_cat([lse for _, lse in parts], 2))
        out, lse = _cat(outs, 1), _cat(lses, 1)
        if self.plan.places is None:
            return out, lse
        places = self.plan.places
        return out.index_select(1, places), None if lse is None else lse.index_select(1, places)

    def _heads_at_once(self, call: Call, k: torch.Tensor) -> int:
        """Every head, unless the gathered keys and values would be large."""
        if isinstance(call.keys, slice):
            return k.shape[2]
        per_head = 2 * k.shape[0] * call.stack * call.num_keys * k.shape[3] * k.element_size()
        return max(1, min(k.shape[2], MAX_GATHERED // per_head))

    def _call(
        self,
        call: Call,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_mask: torch.Tensor | None,
    ) -> Result:
        """One call: q (B, stack * rows, h, D) -> the output alike, and (B, stack * rows, h)."""
        batch, rows, heads, _ = q.shape
        if not call.num_keys:
            nothing = torch.full(q.shape[:3], -torch.inf, dtype=_wide(q.dtype), device=q.device)
            return torch.zeros_like(q), nothing if self.return_lse else None
        q = _stack(q, call, call.rows)
        k, v = (_stack(_take(x, call.keys), call, call.num_keys) for x in (k, v))
        if key_mask is None:
            bias, blind = self._bias(call.mask, q.dtype)
        else:
            bias, blind = self._bias_with(call, key_mask, q.dtype)
        out, lse = _sdpa(q, k, v, bias, self.scale, self.return_lse)
        if blind is not None:
            out = out.masked_fill(blind[..., None], 0.0)
            lse = None if lse is None else lse.masked_fill(blind, -torch.inf)
        out = out.transpose(1, 2).reshape(batch, rows, heads, -1)
        return out, None if lse is None else lse.transpose(1, 2).reshape(batch, rows, heads)

    def _bias(
        self, mask: TileMask | None, dtype: torch.dtype
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The mask as what SDPA adds to the scores, and the rows to blank afterwards."""
        if mask is None:
            return None, None

        def expand(blocks: BlockIndex) -> torch.Tensor:
            table = blocks.derived(
                ("torch table", dtype), lambda _: _additive(self.plan.table, dtype)
            )
            bias = mask.expand(table)
            return bias if mask.blind is None else bias.masked_fill_(mask.blind[:, None], 0.0)

        small = self.plan.mask_entries * dtype.itemsize <= MAX_CACHED_MASKS
        bias = self.blocks.derived((mask, dtype), expand) if small else expand(self.blocks)
        return bias, mask.blind

    def _bias_with(
        self, call: Call, key_mask: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`_bias` when some keys of some batch entries are out of bounds."""
        seen = _stack(_take(key_mask, call.keys), call, call.num_keys)[:, None, None]
        if call.mask is not None:
            seen = seen & call.mask.expand(self.plan.table)
        blind = ~seen.any(-1)
        return _additive(seen | blind[..., None], dtype), blind


def _sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    return_lse: bool,
) -> Result:
    """SDPA on (B, rows, h, D) -> (B, h, rows, D) and, if asked for, the LSE (B, h, rows)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if not return_lse:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale), None
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if q.device.type == "cpu" and not needs_grad:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(q, k, v, attn_mask=bias, scale=scale)
        return out, lse
    scores = (q @ k.mT).to(_wide(q.dtype)) * scale
    scores = scores if bias is None else scores + bias
    return scores.softmax(-1).to(v.dtype) @ v, scores.logsumexp(-1)


def _take(x: torch.Tensor, keys: torch.Tensor | slice) -> torch.Tensor:
    return x[:, keys] if isinstance(keys, slice) else x.index_select(1, keys)


def _stack(x: torch.Tensor, call: Call, length: int) -> torch.Tensor:
    """(B, stack * length, ...) -> (B * stack, length, ...)."""
    return x.reshape(x.shape[0] * call.stack, length, *x.shape[2:])


@overload
def _cat(parts: list[torch.Tensor], dim: int) -> torch.Tensor: ...
@overload
def _cat(parts: list[torch.Tensor | None], dim: int) -> torch.Tensor | None: ...
def _cat(parts: Any, dim: int) -> torch.Tensor | None:
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts, dim)


def _additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What the softmax is kept in."""
    return torch.promote_types(dtype, torch.float32)
