"""The backward pass of the Triton block-sparse attention, and the two as one autograd function.

One kernel computes either the gradient of queries, visiting keys, or those of keys and values,
visiting queries through the transposed lists. With weights P and scores S, both need
``dS = P * (dO V^T - delta)``, delta being ``rowsum(dO * O)`` less the gradient of the log-sum-exp.
"""

# mypy: disable-error-code="no-untyped-def"
# (what a kernel takes and returns are Triton's values and has no Python types)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from diffpatch.kernels.block_sparse.gpu import triton_kernel as device
from diffpatch.kernels.block_sparse.gpu.lists import sub_blocks
from diffpatch.kernels.block_sparse.gpu.triton_forward import ForwardConfig, attend_triton
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.gpu import support
from diffpatch.kernels.gpu.common import LOG2_E, padded
from diffpatch.kernels.gpu.device import on_device_of
from diffpatch.kernels.tile_order import identity_order, in_sequence_order

# (bytes an element, padded head size) -> configuration, on every GPU; nothing spills.
CONFIGS = {
    (2, 64): ForwardConfig(64, 32, 4, 2),
    (2, 128): ForwardConfig(64, 32, 4, 2),
    (2, 256): ForwardConfig(32, 32, 8, 1),
    (4, 64): ForwardConfig(16, 32, 8, 1),
    (4, 128): ForwardConfig(16, 32, 8, 1),
}


def unsupported_reason(q: torch.Tensor) -> str | None:
    """Why the kernel cannot compute gradients, or None. Takes the queries (B, S, H, D)."""
    if (q.dtype.itemsize, padded(q.shape[-1])) in CONFIGS:
        return None
    return f"gradients in {q.dtype} of heads with {q.shape[-1]} channels do not fit in a GPU block"


def attend_with_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    scale: float,
    key_mask: torch.Tensor | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`triton_forward.attend_triton` with gradients for q, k and v through both results."""
    out, lse = _WithGradients.apply(q, k, v, blocks, scale, key_mask)
    return out, lse


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        blocks: BlockIndex,
        scale: float,
        key_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = attend_triton(q, k, v, blocks, scale, key_mask, True)
        ctx.save_for_backward(q, k, v, out, lse, key_mask)
        ctx.blocks, ctx.scale = blocks, scale
        return out, lse

    @staticmethod
    def backward(
        ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse, key_mask = ctx.saved_tensors
        results = (q, k, v, out, lse, key_mask, grad_out, grad_lse)
        with on_device_of(q):
            return (*gradients(*results, ctx.blocks, ctx.scale), None, None, None)


def gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    key_mask: torch.Tensor | None,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    blocks: BlockIndex,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v, in their shapes and dtypes.

    Args:
        q: (B, S, H, D).
        k: (B, S, K, D).
        v: (B, S, K, D).
        out: (B, S, H, D), what the forward pass returned.
        lse: fp32 (B, S, H), likewise.
        key_mask: bool (B, S) or None.
        grad_out: (B, S, H, D).
        grad_lse: fp32 (B, S, H).
        blocks: which pairs were kept.
        scale: the factor on q·k.
    """
    blind = lse.isinf()
    delta = (grad_out.float() * out.float()).sum(-1) - grad_lse.masked_fill(blind, 0.0)
    # Weights are exp2(scores - lse): +inf makes those of rows that see nothing 0.
    lse = torch.where(blind, torch.inf, lse * LOG2_E)
    key_mask = None if key_mask is None else key_mask.view(torch.uint8)
    q, k, v, grad_out, lse, delta = (
        _contiguous_in_tile_order(x, blocks) for x in (q, k, v, grad_out, lse, delta)
    )
    key_mask = None if key_mask is None else _contiguous_in_tile_order(key_mask, blocks)
    statistics = (lse, delta, key_mask)
    (grad_q,) = _launch((q, grad_out), (k, v), statistics, blocks, scale, False)
    grad_k, grad_v = _launch((k, v), (q, grad_out), statistics, blocks, scale, True)
    batch, tokens, heads, size = k.shape
    grad_k, grad_v = (
        x.view(batch, tokens, heads, -1, size).sum(3).to(k.dtype) for x in (grad_k, grad_v)
    )
    grad_q, grad_k, grad_v = (in_sequence_order(x, blocks) for x in (grad_q, grad_k, grad_v))
    return grad_q, grad_k, grad_v


def configuration(dtype: torch.dtype, size: int, keys: bool, arch: int) -> ForwardConfig:
    """The configuration that ships for a dtype, a head size, a side and a compute capability."""
    config = CONFIGS[dtype.itemsize, padded(size)]
    if not keys and config == CONFIGS[2, 256]:  # one accumulator less; spills a little otherwise
        config = config._replace(num_warps=4)
    if keys and arch == 100:  # Triton 3.9 cannot pipeline two accumulators there
        warps = 16 if config == CONFIGS[4, 128] else config.num_warps  # 3.6 spills otherwise
        config = config._replace(num_stages=1, num_warps=warps)
    return config


def _launch(
    own: tuple[torch.Tensor, torch.Tensor],
    other: tuple[torch.Tensor, torch.Tensor],
    statistics: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    blocks: BlockIndex,
    scale: float,
    keys: bool,
) -> tuple[torch.Tensor, ...]:
    """Gradients of `own`, in tile order; of keys and values one for each query head, in fp32."""
    batch, tokens, _, size = own[0].shape
    lse, delta, allowed = statistics
    heads = lse.shape[2]
    config = configuration(own[0].dtype, size, keys, support.arch(lse.device))
    index = blocks.derived("transposed", transposed) if keys else blocks
    lists = sub_blocks(index, config.block_m, config.block_n)
    dtype = torch.float32 if keys else own[0].dtype
    outs = [
        torch.empty(batch, tokens, heads, size, dtype=dtype, device=lse.device)
        for _ in range(1 + keys)
    ]
    gradient_kernel[blocks.num_tiles * lists.parts, batch * heads](
        *own, *other, outs[0], outs[1] if keys else None, lse, delta, allowed,
        blocks.starts, blocks.head_pattern, lists.schedule, lists.row_ptr, lists.full_end,
        lists.places, lists.mask_ids, lists.bits,
        scale, scale * LOG2_E,
        tokens, heads, own[0].shape[2], other[0].shape[2], blocks.num_tiles, lists.parts,
        KEYS=keys, SIZE=size, SIZE_PADDED=padded(size),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, STAGES=config.num_stages,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return tuple(outs)


def _contiguous_in_tile_order(x: torch.Tensor, blocks: BlockIndex) -> torch.Tensor:
    return x.contiguous() if identity_order(blocks) else x.index_select(1, blocks.order)


def transposed(blocks: BlockIndex) -> BlockIndex:
    """The same pairs by key tile: for every key tile, the query tiles that visit it."""
    tiles, rows = blocks.num_tiles, blocks.full_end.shape[0]
    row = blocks.rows
    new_row, new_col = row // tiles * tiles + blocks.cols, row % tiles
    partial = (blocks.mask_ids >= 0).long()
    order = ((new_row * 2 + partial) * tiles + new_col).argsort()
    counts, full = (x.bincount(minlength=rows) for x in (new_row, new_row[partial == 0]))
    ends = counts.cumsum(0)
    return BlockIndex(
        order=blocks.order,
        starts=blocks.starts,
        row_ptr=torch.cat([ends.new_zeros(1), ends]).int(),
        full_end=(ends - counts + full).int(),
        cols=new_col[order].int(),
        mask_ids=blocks.mask_ids[order],
        masks=blocks.masks.mT.contiguous(),
        head_pattern=blocks.head_pattern,
    )


@triton.jit
def _visit(
    grad, grad2, own, own2, other_at, other2_at, LSE, DELTA, lse, delta, ALLOWED, may, words, place,
    offsets_n, tokens, heads, other_stride, scale_log2, channel_ok,
    KEYS: tl.constexpr, MASKED: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add what one sub-block of the other side contributes."""
    inside = offsets_n < tokens - place
    shift = place.to(tl.int64) * other_stride
    other = device.load_rows(other_at + shift, inside, channel_ok, MASKED, EVEN)
    other2 = device.load_rows(other2_at + shift, inside, channel_ok, MASKED, EVEN)
    scores = tl.dot(own, tl.trans(other), input_precision="ieee") * scale_log2
    if KEYS:
        at = (place + offsets_n) * heads
        lse = tl.load(LSE + at, mask=inside, other=float("inf"))[None, :]
        delta = tl.load(DELTA + at, mask=inside, other=0.0)[None, :]
    weights = tl.exp2(scores - lse)
    if MASKED:
        weights = tl.where(device.seen_bits(words, offsets_n, BLOCK_N), weights, 0.0)
    if ALLOWED is not None:
        if not KEYS:
            may = tl.load(ALLOWED + place + offsets_n, mask=inside, other=0)[None, :]
        weights = tl.where(may != 0, weights, 0.0)
    slopes = tl.dot(own2, tl.trans(other2), input_precision="ieee")
    slopes = (weights * (slopes - delta)).to(other.dtype)
    grad = tl.dot(slopes, other, grad, input_precision="ieee")
    if KEYS:
        grad2 = tl.dot(weights.to(other2.dtype), other2, grad2, input_precision="ieee")
    return grad, grad2


@triton.jit
def gradient_kernel(
    OWN, OWN2, OTHER, OTHER2, GRAD, GRAD2, LSE, DELTA, ALLOWED,
    STARTS, HEAD_PATTERN, SCHEDULE, ROW_PTR, FULL_END, PLACES, MASK_IDS, BITS,
    scale, scale_log2,
    tokens, heads, own_heads, other_heads, tiles, parts,
    KEYS: tl.constexpr, SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M tokens of one tile, for one query head of one batch entry.

    KEYS: OWN, OWN2 are k, v and OTHER, OTHER2 are q, dO; GRAD, GRAD2 are dk, dv.
    Not KEYS: OWN, OWN2 are q, dO and OTHER, OTHER2 are k, v; GRAD is dq.
    All are contiguous and in tile order.
    """
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    part = tl.program_id(0) % parts
    pattern_start = 0
    if HEAD_PATTERN is not None:
        pattern_start = tl.load(HEAD_PATTERN + head) * tiles
    tile = tl.load(SCHEDULE + pattern_start + tl.program_id(0) // parts)
    row = pattern_start + tile

    in_tile = part * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.load(STARTS + tile)
    held = in_tile < tl.load(STARTS + tile + 1) - first
    token = batch * tokens + first + in_tile
    channel = tl.arange(0, SIZE_PADDED)
    channel_ok = channel < SIZE
    stored = held[:, None] & channel_ok[None, :]
    own_at = (token * own_heads + head // (heads // own_heads))[:, None] * SIZE + channel[None, :]
    own = tl.load(OWN + own_at, mask=stored, other=0.0)
    own2 = tl.load(OWN2 + own_at, mask=stored, other=0.0)
    LSE += batch * tokens * heads + head
    DELTA += batch * tokens * heads + head
    lse = 0.0
    delta = 0.0
    may = 1
    if ALLOWED is not None:
        ALLOWED += batch * tokens
    if not KEYS:
        lse = tl.load(LSE + (first + in_tile) * heads, mask=held, other=float("inf"))[:, None]
        delta = tl.load(DELTA + (first + in_tile) * heads, mask=held, other=0.0)[:, None]
    elif ALLOWED is not None:
        may = tl.load(ALLOWED + first + in_tile, mask=held, other=0)[:, None]

    offsets_n = tl.arange(0, BLOCK_N)
    other_stride = other_heads * SIZE
    other_at = (batch * tokens * other_heads + head // (heads // other_heads)) * SIZE
    other_at += offsets_n[:, None] * other_stride + channel[None, :]
    words = BITS + in_tile * (BLOCK_N // 32)
    words_per_mask = parts * BLOCK_M * (BLOCK_N // 32)
    grad = tl.zeros([BLOCK_M, SIZE_PADDED], tl.float32)
    grad2 = grad
    begin = tl.load(ROW_PTR + row)
    middle = tl.load(FULL_END + row)
    end = tl.load(ROW_PTR + row + 1)
    place = tl.load(PLACES + begin)
    for i in tl.range(begin, middle, num_stages=STAGES):
        following = tl.load(PLACES + i + 1)
        grad, grad2 = _visit(
            grad, grad2, own, own2, OTHER + other_at, OTHER2 + other_at, LSE, DELTA, lse, delta,
            ALLOWED, may, words, place, offsets_n, tokens, heads, other_stride, scale_log2,
            channel_ok, KEYS, False, SIZE == SIZE_PADDED, BLOCK_N,
        )  # fmt: skip
        place = following
    mask = tl.load(MASK_IDS + middle)
    for i in tl.range(middle, end, num_stages=STAGES):
        following = tl.load(PLACES + i + 1)
        following_mask = tl.load(MASK_IDS + i + 1)
        grad, grad2 = _visit(
            grad, grad2, own, own2, OTHER + other_at, OTHER2 + other_at, LSE, DELTA, lse, delta,
            ALLOWED, may, words + mask * words_per_mask, place, offsets_n, tokens, heads,
            other_stride, scale_log2, channel_ok, KEYS, True, SIZE == SIZE_PADDED, BLOCK_N,
        )  # fmt: skip
        place = following
        mask = following_mask

    at = (token * heads + head)[:, None] * SIZE + channel[None, :]
    tl.store(GRAD + at, (grad * scale).to(GRAD.dtype.element_ty), mask=stored)
    if KEYS:
        tl.store(GRAD2 + at, grad2.to(GRAD2.dtype.element_ty), mask=stored)
