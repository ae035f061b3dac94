"""Virtual tokens in Triton, for GPUs: one kernel pools keys and values, one attends to them.

The second goes on with the softmax of the exact part: it begins with that part's output and
log-sum-exp, so that near and far share one softmax and nothing has to be merged afterwards. What is
missed has to be added to the far part alone, which is then merged before it is written. All queries
of a program lie in one tile, so that which pieces they attend to is a byte for each piece, and what
they miss is one row.
"""

# mypy: disable-error-code="no-untyped-def"
# (what a kernel takes and returns are Triton's values and has no Python types)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.gpu.common import LOG2_E
from diffpatch.kernels.virtual_tokens.tokens import Missed, VirtualTokens

LN_2 = tl.constexpr(0.6931471805599453)
START = tl.constexpr(-1.0e30)  # a finite start of the running maximum, see block_sparse_triton
LARGEST = tl.constexpr(60000.0)  # of a squared query, which fp16 could not hold
POOLED_ROWS = 64  # tokens that the pooling kernel reads at a time


class VirtualConfig(NamedTuple):
    """Queries and virtual tokens of a step, warps of a program, and steps in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (bytes an element, padded head size) -> configuration. A step holds three things of the size of
# keys (keys, values, variances) where plain attention holds two.
CONFIGS = {
    (2, 64): VirtualConfig(128, 32, 8, 2),
    (2, 128): VirtualConfig(64, 32, 8, 2),
    (2, 256): VirtualConfig(32, 32, 8, 1),
    (4, 64): VirtualConfig(32, 16, 8, 1),
    (4, 128): VirtualConfig(16, 16, 8, 1),
    (4, 256): VirtualConfig(16, 16, 8, 1),
}


def configuration(dtype: torch.dtype, size: int, tile: int) -> VirtualConfig:
    """The configuration that ships for a dtype, a head size up to 256 and the largest tile."""
    config = CONFIGS[dtype.itemsize, padded(size)]
    if config.block_m == 128 and tile <= 64:
        config = config._replace(block_m=64, num_warps=4)
    return config


def padded(size: int) -> int:
    """The channels the kernels compute for a head size: a power of two, 64 at least."""
    return max(64, triton.next_power_of_2(size))


@triton.jit
def pool_kernel(
    K, V, KEYS, VALUES, VARIANCE, LOG_COUNT, ORDER, FIRST, ALLOWED,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    tokens, heads, pieces,
    SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: the means, the variance and the count of one piece, one head, one batch entry.

    KEYS, VALUES and VARIANCE (B, V, heads, SIZE) and LOG_COUNT (B, V) are contiguous; FIRST (V + 1)
    says where in ORDER each piece begins. Without V there are no values.
    """
    piece = tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    channel = tl.arange(0, SIZE_PADDED)
    row = tl.arange(0, ROWS)
    begin, end = tl.load(FIRST + piece), tl.load(FIRST + piece + 1)
    key = tl.zeros([SIZE_PADDED], tl.float32)
    value = tl.zeros([SIZE_PADDED], tl.float32)
    count = 0.0
    for start in range(begin, end, ROWS):
        held = start + row < end
        token = tl.load(ORDER + start + row, mask=held, other=0)
        if ALLOWED is not None:
            held = held & (tl.load(ALLOWED + batch * tokens + token, mask=held, other=0) != 0)
        read = held[:, None] & (channel < SIZE)[None, :]
        k_at = K + batch * stride_kb + head * stride_kh + token[:, None] * stride_ks
        key += tl.sum(tl.load(k_at + channel[None, :], mask=read, other=0.0).to(tl.float32), 0)
        if V is not None:
            v_at = V + batch * stride_vb + head * stride_vh + token[:, None] * stride_vs
            v = tl.load(v_at + channel[None, :], mask=read, other=0.0)
            value += tl.sum(v.to(tl.float32), 0)
        count += tl.sum(held.to(tl.float32), 0)
    share = 1.0 / tl.maximum(count, 1.0)
    key = key * share
    at = ((batch * pieces + piece) * heads + head) * SIZE + channel
    tl.store(KEYS + at, key.to(KEYS.dtype.element_ty), mask=channel < SIZE)
    if V is not None:
        tl.store(VALUES + at, (value * share).to(VALUES.dtype.element_ty), mask=channel < SIZE)
    if head == 0:
        log_count = tl.where(count > 0, tl.log(count), -float("inf"))
        tl.store(LOG_COUNT + batch * pieces + piece, log_count)
    if VARIANCE is not None:
        spread = tl.zeros([SIZE_PADDED], tl.float32)
        for start in range(begin, end, ROWS):
            held = start + row < end
            token = tl.load(ORDER + start + row, mask=held, other=0)
            if ALLOWED is not None:
                held = held & (tl.load(ALLOWED + batch * tokens + token, mask=held, other=0) != 0)
            read = held[:, None] & (channel < SIZE)[None, :]
            k_at = K + batch * stride_kb + head * stride_kh + token[:, None] * stride_ks
            k = tl.load(k_at + channel[None, :], mask=read, other=0.0).to(tl.float32)
            k = tl.where(read, k - key[None, :], 0.0)
            spread += tl.sum(k * k, 0)
        spread = tl.minimum(spread * share, LARGEST)
        tl.store(VARIANCE + at, spread.to(VARIANCE.dtype.element_ty), mask=channel < SIZE)


@triton.jit
def virtual_kernel(
    Q, KEYS, VALUES, VARIANCE, LOG_COUNT, SHOWN, COUNTS, NEAR, NEAR_LSE, MISSED, MISSED_LSE,
    OUT, LSE, ORDER, STARTS,
    scale, scale_log2, log2_e, stride_qb, stride_qs, stride_qh, stride_sb, stride_sh,
    tokens, heads, group, tiles, parts, pieces,
    SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one tile, for one head of one batch entry.

    KEYS, VALUES and VARIANCE (B, V, heads / group, SIZE), LOG_COUNT (B, V), NEAR and OUT
    (B, S, H, SIZE), NEAR_LSE and LSE (B, S, H), MISSED (B, H, tiles, SIZE) and MISSED_LSE
    (B, H, tiles), both fp32, are contiguous, and so are the channels of Q. A byte
    of SHOWN (B or 1, H or 1, tiles, V) says whether a tile attends to a piece; COUNTS, laid out
    alike without its last axis, holds V, or 0 where it attends to none.
    """
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    tile = tl.program_id(0) // parts
    row = batch * stride_sb + head * stride_sh + tile
    in_tile = (tl.program_id(0) % parts) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.load(STARTS + tile)
    held = in_tile < tl.load(STARTS + tile + 1) - first
    token = tl.load(ORDER + first + in_tile, mask=held, other=0)
    channel = tl.arange(0, SIZE_PADDED)
    stored = held[:, None] & (channel < SIZE)[None, :]
    at_row = (batch * tokens + token) * heads + head
    at_out = at_row[:, None] * SIZE + channel[None, :]
    q_at = Q + batch * stride_qb + head * stride_qh + token[:, None] * stride_qs + channel[None, :]
    q = tl.load(q_at, mask=stored, other=0.0)
    scaled = q.to(tl.float32) * scale
    squared = tl.minimum(scaled * scaled, LARGEST).to(q.dtype)

    acc = tl.zeros([BLOCK_M, SIZE_PADDED], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], START, tl.float32)
    if NEAR is not None and MISSED is None:
        lse = tl.load(NEAR_LSE + at_row, mask=held, other=-float("inf"))
        begun = lse > -float("inf")
        top = tl.where(begun, lse * log2_e, START)
        total = begun.to(tl.float32)
        acc = tl.load(NEAR + at_out, mask=stored, other=0.0).to(tl.float32)

    key_heads = heads // group
    offsets = tl.arange(0, BLOCK_N)
    base = (batch * pieces * key_heads + head // group) * SIZE + channel[None, :]
    SHOWN += row * pieces
    for start in tl.range(0, tl.load(COUNTS + row), BLOCK_N, num_stages=STAGES):
        piece = start + offsets
        inside = piece < pieces
        read = inside[:, None] & (channel < SIZE)[None, :]
        at = base + piece[:, None].to(tl.int64) * (key_heads * SIZE)
        k = tl.load(KEYS + at, mask=read, other=0.0)
        log_count = tl.load(LOG_COUNT + batch * pieces + piece, mask=inside, other=-float("inf"))
        shown = tl.load(SHOWN + piece, mask=inside, other=0) != 0
        log_count = tl.where(shown, log_count * log2_e, -float("inf"))
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 + log_count[None, :]
        if VARIANCE is not None:
            spread = tl.load(VARIANCE + at, mask=read, other=0.0)
            second = tl.dot(squared, tl.trans(spread), input_precision="ieee") * (0.5 * log2_e)
            scores += tl.minimum(second, tl.maximum(log_count, 0.0)[None, :])
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(VALUES + at, mask=read, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top

    if MISSED is not None:
        of_tile = (batch * heads + head) * tiles + tile
        missed = tl.load(MISSED + of_tile * SIZE + channel, mask=channel < SIZE, other=0.0)
        seen = total > 0.0
        acc = acc / tl.where(seen, total, 1.0)[:, None]
        acc = tl.where(seen[:, None], acc + missed[None, :], 0.0)
        top += tl.log2(tl.where(seen, total, 1.0)) + tl.load(MISSED_LSE + of_tile) * log2_e
        top = tl.where(seen, top, START)
        total = seen.to(tl.float32)
        if NEAR is not None:
            lse = tl.load(NEAR_LSE + at_row, mask=held, other=-float("inf"))
            begun = lse > -float("inf")
            near_top = tl.where(begun, lse * log2_e, START)
            new_top = tl.maximum(top, near_top)
            of_far = tl.exp2(top - new_top) * total
            of_near = tl.exp2(near_top - new_top) * begun.to(tl.float32)
            near = tl.load(NEAR + at_out, mask=stored, other=0.0).to(tl.float32)
            acc = acc * of_far[:, None] + near * of_near[:, None]
            total = of_far + of_near
            top = new_top

    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    tl.store(OUT + at_out, (acc / total[:, None]).to(OUT.dtype.element_ty), mask=stored)
    lse = tl.where(blind, -float("inf"), (top + tl.log2(total)) * LN_2)
    tl.store(LSE + at_row, lse, mask=held)


def pool(
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    first: torch.Tensor,
    second_order: bool,
    key_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Pool keys and values, each read once, but the keys twice for their variance.

    Args:
        k: (B, S, K, D), fp32, bf16 or fp16.
        v: (B, S, K, D).
        blocks: the tiles.
        first: int32 (V + 1,), where each piece begins in tile order.
        second_order: whether to make the variance.
        key_mask: bool (B, S), True where a key counts; or None.

    Returns:
        Mean keys and values (B, V, K, D), the variance of the keys or None, and the log of the
        counts, fp32 (B, V).
    """
    batch, tokens, heads, size = k.shape
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    pieces = first.shape[0] - 1
    keys, values = (torch.empty(batch, pieces, heads, size, dtype=k.dtype, device=k.device)
                    for _ in range(2))  # fmt: skip
    variance = torch.empty_like(keys) if second_order else None
    log_count = torch.empty(batch, pieces, dtype=torch.float32, device=k.device)
    allowed = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
    pool_kernel[(pieces, batch * heads)](
        k, v, keys, values, variance, log_count, blocks.order, first, allowed,
        *k.stride()[:3], *v.stride()[:3], tokens, heads, pieces,
        SIZE=size, SIZE_PADDED=padded(size), ROWS=POOLED_ROWS, num_warps=4,
    )  # fmt: skip
    return keys, values, variance, log_count


def moments(
    x: torch.Tensor, blocks: BlockIndex, first: torch.Tensor, key_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Means and variances (B, V, K, D) of every piece of tokens, and log counts (B, V), in fp32.

    Args:
        x: (B, S, K, D), fp32, bf16 or fp16; read twice.
        blocks: the tiles.
        first: int32 (V + 1,), where each piece begins in tile order.
        key_mask: bool (B, S), True where a token counts; or None.
    """
    batch, tokens, heads, size = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    pieces = first.shape[0] - 1
    mean = torch.empty(batch, pieces, heads, size, dtype=torch.float32, device=x.device)
    variance, log_count = torch.empty_like(mean), mean.new_empty(batch, pieces)
    allowed = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
    pool_kernel[(pieces, batch * heads)](
        x, None, mean, None, variance, log_count, blocks.order, first, allowed,
        *x.stride()[:3], 0, 0, 0, tokens, heads, pieces,
        SIZE=size, SIZE_PADDED=padded(size), ROWS=POOLED_ROWS, num_warps=4,
    )  # fmt: skip
    return mean, variance, log_count


def attend(
    q: torch.Tensor,
    tokens: VirtualTokens,
    blocks: BlockIndex,
    scale: float,
    near: tuple[torch.Tensor, torch.Tensor] | None,
    shown: torch.Tensor,
    missed: Missed | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to virtual tokens and what it missed, in one softmax with `near`.

    Args:
        q: (B, S, H, D), fp32, bf16 or fp16.
        tokens: the virtual tokens, contiguous.
        blocks: the tiles of the queries.
        scale: the factor on q·k.
        near: an output (B, S, H, D) and its natural log-sum-exp fp32 (B, S, H) to go on with.
        shown: bool (B or 1, H or 1, N, V), which of them a query tile attends to.
        missed: what is added to the virtual part of every query of a tile, fp32.

    Returns:
        The output (B, S, H, D) in the dtype of q and its natural log-sum-exp, fp32 (B, S, H).
    """
    batch, length, heads, size = q.shape
    config = configuration(q.dtype, size, blocks.max_tile)
    q = q if q.stride(3) == 1 else q.contiguous()
    shown = shown.contiguous()
    # A head or batch entry that shares the flags of another one begins where that one does.
    pieces, by_head = shown.shape[3], shown.shape[1] > 1
    by_entry = shown.shape[1] * blocks.num_tiles if shown.shape[0] > 1 else 0
    counts = shown.any(-1).int() * pieces
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    begun, begun_lse = (None, None) if near is None else (x.contiguous() for x in near)
    more, longer = (None, None) if missed is None else (x.contiguous() for x in missed)
    parts = -(-blocks.max_tile // config.block_m)
    virtual_kernel[(blocks.num_tiles * parts, batch * heads)](
        q, tokens.keys, tokens.values, tokens.variance, tokens.log_count,
        shown.view(torch.uint8), counts, begun, begun_lse, more, longer,
        out, lse, blocks.order, blocks.starts, scale, scale * LOG2_E, LOG2_E, *q.stride()[:3],
        by_entry, blocks.num_tiles if by_head else 0,
        length, heads, heads // tokens.keys.shape[2], blocks.num_tiles, parts, pieces,
        SIZE=size, SIZE_PADDED=padded(size),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, STAGES=config.num_stages,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse
