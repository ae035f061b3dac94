"""Block-sparse attention in PyTorch: SDPA on the keys that each group of query tiles needs.

It skips the work on any device, autograd goes through it, and no tensor grows with S².
"""

from __future__ import annotations

import math
from typing import Any, overload

import torch
import torch.nn.functional as F

from diffpatch.kernels.block_sparse.torch_plan.calls import Band, SdpaCall, SdpaPlan, plans
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.merge import merge_outputs

MAX_CACHED_MASKS = 192 << 20  # bytes of expanded masks kept with an index
MAX_GATHERED = 32 << 20  # bytes of keys and values gathered at a time, which caches may hold

Result = tuple[torch.Tensor, torch.Tensor | None]  # the output and, if asked for, the log-sum-exp


def attend_torch(
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
    # Only the CPU's SDPA returns its log-sum-exp, and without it there is nothing to merge by.
    lean = q.device.type == "cpu" and not _needs_grad(q, k, v)
    if lean:  # rows that can be copied in one piece
        q, k, v = (x if x.stride()[2:] == (x.shape[3], 1) else x.contiguous() for x in (q, k, v))
    pieces = plans(blocks, merging=lean and key_mask is None)
    for plan in pieces:
        heads = plan.heads
        query = q if heads is None else q.index_select(2, heads)
        key, value = k, v
        if groups > 1 or heads is not None:
            every = torch.arange(q.shape[2], device=q.device) if heads is None else heads
            key, value = (x.index_select(2, every // groups) for x in (k, v))
        run = _Runner(blocks, plan, scale, return_lse, lean)
        out, lse = run(query, key, value, key_mask)
        outs.append(out)
        lses.append(lse)
    if pieces[0].heads is None:
        return outs[0], lses[0]
    back = torch.cat([plan.heads for plan in pieces if plan.heads is not None]).argsort()
    out, lse = _cat(outs, 2), _cat(lses, 2)
    return out.index_select(2, back), None if lse is None else lse.index_select(2, back)


class _Runner:
    """What runs one plan: the calls of one pattern, for the heads that follow it.

    A lean one (on a CPU, without gradients) copies rows with all threads, and gathers the keys of
    every call into the same memory: memory fresh from the system costs more than the copy.
    """

    def __init__(
        self, blocks: BlockIndex, plan: SdpaPlan, scale: float, return_lse: bool, lean: bool
    ) -> None:
        self.blocks, self.plan, self.scale, self.lean = blocks, plan, scale, lean
        self.return_lse = return_lse
        self.buffers: dict[str, torch.Tensor] = {}

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None
    ) -> Result:
        """q, k, v (B, S, h, D), one key head a query head -> the output alike, and (B, S, h)."""
        rows = self.plan.rows
        if rows is not None and not self.lean:
            q, rows = self._take(q, rows), None
        if self.plan.keys is not None:
            k, v = self._take(k, self.plan.keys), self._take(v, self.plan.keys)
            key_mask = None if key_mask is None else key_mask[:, self.plan.keys]
        outs: list[torch.Tensor] = []
        lses: list[torch.Tensor | None] = []
        first = 0
        whole = torch.empty_like(q, memory_format=torch.contiguous_format) if self.lean else None
        for band in self.plan.bands:
            last = first + band.rows
            place: torch.Tensor | slice = slice(first, last)
            place = place if rows is None else rows[place]
            out, lse = self._band(band, self._take(q, place, "queries"), k, v, key_mask)
            if whole is None:
                outs.append(out)
            else:
                _put(out, whole, place)
            lses.append(lse)
            first = last
        out, lse = _cat(outs, 1) if whole is None else whole, _cat(lses, 1)
        if self.plan.places is None:
            return out, lse
        places = self.plan.places
        out = self._take(out, places) if whole is None else out
        return out, None if lse is None else lse.index_select(1, places)

    def _band(
        self,
        band: Band,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_mask: torch.Tensor | None,
    ) -> Result:
        """One band: q (B, rows, h, D) -> the output alike, and (B, rows, h)."""
        with_lse = self.return_lse or band.common is not None
        outs: list[torch.Tensor] = []
        lses: list[torch.Tensor | None] = []
        first = 0
        for call in band.rest:
            rows = q[:, first : first + call.stack * call.rows]
            first += call.stack * call.rows
            out, lse = self._by_heads(call, rows, k, v, key_mask, with_lse)
            outs.append(out)
            lses.append(lse)
        out, lse = _cat(outs, 1), _cat(lses, 1)
        if band.common is None or lse is None:
            return out, lse
        shared, shared_lse = self._by_heads(band.common, q, k, v, key_mask, True)
        assert shared_lse is not None  # it was asked for
        out = merge_outputs(shared, shared_lse, out, lse)
        return out, torch.logaddexp(shared_lse, lse) if self.return_lse else None

    def _by_heads(
        self,
        call: SdpaCall,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_mask: torch.Tensor | None,
        return_lse: bool,
    ) -> Result:
        """One call for every head; few at a time if the gathered keys and values are large."""
        heads = q.shape[2]
        if not isinstance(call.keys, slice):
            per_head = 2 * k.shape[0] * call.stack * call.num_keys * k.shape[3] * k.element_size()
            heads = max(1, min(heads, MAX_GATHERED // max(1, per_head)))
        bias, blind = self._bias(call, key_mask, q.dtype)
        parts = [
            self._call(call, q[:, :, h], k[:, :, h], v[:, :, h], bias, blind, return_lse)
            for h in (slice(i, i + heads) for i in range(0, q.shape[2], heads))
        ]
        return _cat([out for out, _ in parts], 2), _cat([lse for _, lse in parts], 2)

    def _call(
        self,
        call: SdpaCall,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor | None,
        blind: torch.Tensor | None,
        return_lse: bool,
    ) -> Result:
        """One call: q (B, stack * rows, h, D) -> the output alike, and (B, stack * rows, h)."""
        batch, rows, heads, _ = q.shape
        if not call.num_keys:
            nothing = torch.full(q.shape[:3], -torch.inf, dtype=_wide(q.dtype), device=q.device)
            return torch.zeros_like(q), nothing if return_lse else None
        q = _stack(q, call, call.rows)
        k = _stack(self._take(k, call.keys, "keys"), call, call.num_keys)
        v = _stack(self._take(v, call.keys, "values"), call, call.num_keys)
        out, lse = _sdpa(q, k, v, bias, self.scale, return_lse)
        if blind is not None:
            out = out.masked_fill(blind[..., None], 0.0)
            lse = None if lse is None else lse.masked_fill(blind, -torch.inf)
        out = out.transpose(1, 2).reshape(batch, rows, heads, -1)
        return out, None if lse is None else lse.transpose(1, 2).reshape(batch, rows, heads)

    def _take(
        self, x: torch.Tensor, rows: torch.Tensor | slice, buffer: str | None = None
    ) -> torch.Tensor:
        """Rows of x (B, S, h, D), in a buffer of that name if it is used again before long."""
        if isinstance(rows, slice):
            return x[:, rows]
        if not self.lean:
            return x.index_select(1, rows)
        shape = (x.shape[0], len(rows), *x.shape[2:])
        size = math.prod(shape)
        if buffer is None:
            out = x.new_empty(shape)
        else:
            if buffer not in self.buffers or self.buffers[buffer].numel() < size:
                self.buffers[buffer] = x.new_empty(size)
            out = self.buffers[buffer][:size].view(shape)
        for source, target in zip(x, out, strict=True):  # along the first axis torch is parallel
            torch.index_select(source, 0, rows, out=target)
        return out

    def _bias(
        self, call: SdpaCall, key_mask: torch.Tensor | None, dtype: torch.dtype
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The mask as what SDPA adds to the scores, and the rows to blank afterwards."""
        if key_mask is not None:
            return self._bias_with(call, key_mask, dtype)
        mask = call.mask
        if mask is None:
            return None, None

        def build(_: BlockIndex) -> tuple[torch.Tensor, torch.Tensor | None]:
            seen = mask.compact(self.plan.table, dtype)
            blind = ~seen.any(-1) if mask.blind else None
            return _additive(seen if blind is None else seen.masked_fill_(blind[:, None], 1)), blind

        small = self.plan.mask_entries * dtype.itemsize <= MAX_CACHED_MASKS
        bias, blind = self.blocks.derived((mask, dtype), build) if small else build(self.blocks)
        if mask.row_kinds is None:
            return bias, blind
        blind = None if blind is None else blind[mask.row_kinds]
        return self._take(bias[None], mask.row_kinds, "bias")[0], blind

    def _bias_with(
        self, call: SdpaCall, key_mask: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`_bias` when some keys of some batch entries are out of bounds."""
        keys = key_mask[:, call.keys]
        seen = _stack(keys, call, call.num_keys)[:, None, None]
        if call.mask is not None:
            seen = seen & call.mask.expand(self.plan.table)
        blind = ~seen.any(-1)
        return _additive((seen | blind[..., None]).to(dtype)), blind


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
    if q.device.type == "cpu" and not _needs_grad(q, k, v):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(q, k, v, attn_mask=bias, scale=scale)
        return out, lse
    scores = (q @ k.mT).to(_wide(q.dtype)) * scale
    scores = scores if bias is None else scores + bias
    return scores.softmax(-1).to(v.dtype) @ v, scores.logsumexp(-1)


def _needs_grad(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _stack(x: torch.Tensor, call: SdpaCall, length: int) -> torch.Tensor:
    """(B, stack * length, ...) -> (B * stack, length, ...)."""
    return x.reshape(x.shape[0] * call.stack, length, *x.shape[2:])


@overload
def _cat(parts: list[torch.Tensor], dim: int) -> torch.Tensor: ...
@overload
def _cat(parts: list[torch.Tensor | None], dim: int) -> torch.Tensor | None: ...
def _cat(parts: Any, dim: int) -> torch.Tensor | None:
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts, dim)


def _put(rows: torch.Tensor, whole: torch.Tensor, place: torch.Tensor | slice) -> None:
    """Write results (B, rows, h, D) to their places in (B, S, h, D)."""
    if isinstance(place, slice):
        whole[:, place] = rows
        return
    for source, target in zip(rows, whole, strict=True):
        target.index_copy_(0, place, source)


def _additive(seen: torch.Tensor) -> torch.Tensor:
    """What is added to scores: 0 for a 1 and -inf for a 0, in place of these."""
    return seen.reciprocal_().neg_().add_(1)  # far faster on a CPU than filling by a mask


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What the softmax is kept in."""
    return torch.promote_types(dtype, torch.float32)
