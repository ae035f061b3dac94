"""What virtual tokens miss, in Triton: the mean queries of many tiles in one program.

One pass over the keys and one over the virtual tokens that stand for them, each with a softmax of
its own; their difference is all that is written.
"""

# mypy: disable-error-code="no-untyped-def"
# (what a kernel takes and returns are Triton's values and has no Python types)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.gpu.common import LOG2_E
from diffpatch.kernels.pieces import cut
from diffpatch.kernels.virtual_tokens.tokens import Missed, VirtualTokens
from diffpatch.kernels.virtual_tokens.triton_impl import (
    LARGEST,
    LN_2,
    START,
    VirtualConfig,
    moments,
    padded,
)

LONGEST = 64  # tokens of a piece, all of which are in one step

# (bytes an element, padded head size) -> mean queries, virtual tokens of a step, warps, stages.
CONFIGS = {
    (2, 64): VirtualConfig(32, 32, 4, 2),
    (2, 128): VirtualConfig(32, 32, 8, 2),
    (2, 256): VirtualConfig(16, 32, 8, 1),
    (4, 64): VirtualConfig(32, 16, 8, 1),
    (4, 128): VirtualConfig(16, 16, 8, 1),
    (4, 256): VirtualConfig(16, 16, 8, 1),
}


@triton.jit
def _step(scores, values, acc, total, top):
    """One step of a softmax in base 2 that is summed as it goes."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return acc, total, new_top


@triton.jit
def missed_kernel(
    MEAN, K, V, KEYS, VALUES, VARIANCE, LOG_COUNT, SHOWN, OUT, LSE, ORDER, FIRST, ALLOWED,
    scale, scale_log2, log2_e,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_sb, stride_sh,
    tokens, heads, group, tiles, pieces,
    SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LENGTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: the mean queries of BLOCK_M tiles, for one head of one batch entry.

    MEAN (B, tiles, H, SIZE) and OUT (B, H, tiles, SIZE) are fp32, as is LSE (B, H, tiles); KEYS,
    VALUES and VARIANCE (B, V, heads / group, SIZE) and LOG_COUNT (B, V) are contiguous, and so are
    the channels of K and V. FIRST (V + 1) says where in ORDER each piece of at most LENGTH tokens
    begins; a byte of SHOWN (B or 1, H or 1, tiles, V) whether a tile attends to it.
    """
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    held = row < tiles
    channel = tl.arange(0, SIZE_PADDED)
    inside = (channel < SIZE)[None, :]
    stored = held[:, None] & inside
    at_mean = ((batch * tiles + row[:, None]) * heads + head) * SIZE + channel[None, :]
    q = tl.load(MEAN + at_mean, mask=stored, other=0.0).to(K.dtype.element_ty)
    SHOWN += batch * stride_sb + head * stride_sh
    of_row = row * pieces

    acc = tl.zeros([BLOCK_M, SIZE_PADDED], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], START, tl.float32)
    in_piece = tl.arange(0, LENGTH)
    k_head = K + batch * stride_kb + (head // group) * stride_kh
    v_head = V + batch * stride_vb + (head // group) * stride_vh
    for piece in tl.range(0, pieces, num_stages=STAGES):
        begin = tl.load(FIRST + piece)
        alive = in_piece < tl.load(FIRST + piece + 1) - begin
        token = tl.load(ORDER + begin + in_piece, mask=alive, other=0)
        if ALLOWED is not None:
            alive = alive & (tl.load(ALLOWED + batch * tokens + token, mask=alive, other=0) != 0)
        read = alive[:, None] & inside
        k = tl.load(k_head + token[:, None] * stride_ks + channel[None, :], mask=read, other=0.0)
        v = tl.load(v_head + token[:, None] * stride_vs + channel[None, :], mask=read, other=0.0)
        shown = tl.load(SHOWN + of_row + piece, mask=held, other=0) != 0
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        scores = tl.where(shown[:, None] & alive[None, :], scores, -float("inf"))
        acc, total, top = _step(scores, v, acc, total, top)
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    exact = acc / total[:, None]
    exact_lse = top + tl.log2(total)

    scaled = q.to(tl.float32) * scale
    squared = tl.minimum(scaled * scaled, LARGEST).to(q.dtype)
    acc = tl.zeros([BLOCK_M, SIZE_PADDED], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], START, tl.float32)
    key_heads = heads // group
    base = (batch * pieces * key_heads + head // group) * SIZE + channel[None, :]
    for start in tl.range(0, pieces, BLOCK_N, num_stages=STAGES):
        virtual = start + tl.arange(0, BLOCK_N)
        within = virtual < pieces
        used = within[:, None] & inside
        at = base + virtual[:, None].to(tl.int64) * (key_heads * SIZE)
        key = tl.load(KEYS + at, mask=used, other=0.0)
        value = tl.load(VALUES + at, mask=used, other=0.0)
        log_count = tl.load(LOG_COUNT + batch * pieces + virtual, mask=within, other=-float("inf"))
        log_count = log_count * log2_e
        both = held[:, None] & within[None, :]
        visible = tl.load(SHOWN + of_row[:, None] + virtual[None, :], mask=both, other=0) != 0
        scored = tl.dot(q, tl.trans(key), input_precision="ieee") * scale_log2 + log_count[None, :]
        if VARIANCE is not None:
            spread = tl.load(VARIANCE + at, mask=used, other=0.0)
            second = tl.dot(squared, tl.trans(spread), input_precision="ieee") * (0.5 * log2_e)
            scored += tl.minimum(second, tl.maximum(log_count, 0.0)[None, :])
        scored = tl.where(visible, scored, -float("inf"))
        acc, total, top = _step(scored, value, acc, total, top)
    blind = blind | (total == 0.0)
    total = tl.where(blind, 1.0, total)
    out = tl.where(blind[:, None], 0.0, exact - acc / total[:, None])
    lse = tl.where(blind, 0.0, (exact_lse - top - tl.log2(total)) * LN_2)
    at_row = (batch * heads + head) * tiles + row
    tl.store(OUT + at_row[:, None] * SIZE + channel[None, :], out, mask=stored)
    tl.store(LSE + at_row, lse, mask=held)


def supports(tokens: VirtualTokens) -> bool:
    """Whether the pieces are short enough."""
    return tokens.pieces.longest <= LONGEST


def missed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tokens: VirtualTokens,
    blocks: BlockIndex,
    scale: float,
    seen: torch.Tensor,
    key_mask: torch.Tensor | None,
) -> Missed:
    """As `torch_correction.missed`, of fp32, bf16 or fp16; means of queries are rounded to that."""
    batch, length, heads, size = q.shape
    config = CONFIGS[q.dtype.itemsize, padded(size)]
    mean = moments(q, blocks, cut(blocks).first, None)[0]
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    seen = seen.contiguous()
    tiles, pieces = blocks.num_tiles, len(tokens.pieces)
    out = torch.empty(batch, heads, tiles, size, dtype=torch.float32, device=q.device)
    lse = out.new_empty(batch, heads, tiles)
    missed_kernel[(-(-tiles // config.block_m), batch * heads)](
        mean, k, v, tokens.keys, tokens.values, tokens.variance, tokens.log_count,
        seen.view(torch.uint8), out, lse, blocks.order, tokens.pieces.first,
        None if key_mask is None else key_mask.contiguous().view(torch.uint8),
        scale, scale * LOG2_E, LOG2_E, *k.stride()[:3], *v.stride()[:3],
        seen.stride(0) if seen.shape[0] > 1 else 0, seen.stride(1) if seen.shape[1] > 1 else 0,
        length, heads, heads // k.shape[2], tiles, pieces,
        SIZE=size, SIZE_PADDED=padded(size), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        LENGTH=max(16, triton.next_power_of_2(tokens.pieces.longest)), STAGES=config.num_stages,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return Missed(out, lse)
