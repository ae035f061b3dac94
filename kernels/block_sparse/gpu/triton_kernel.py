"""Block-sparse attention as one Triton kernel: what runs on the GPU (the forward pass)."""

# mypy: disable-error-code="no-untyped-def"
# (what a kernel takes and returns are Triton's values and has no Python types)

from __future__ import annotations

import math

import triton
import triton.language as tl

from diffpatch.kernels.block_sparse import apart
from diffpatch.kernels.block_sparse.fp8.levels import LARGEST
from diffpatch.kernels.block_sparse.int8 import levels
from diffpatch.kernels.gpu import common

LN_2 = tl.constexpr(common.LN_2)
START = tl.constexpr(common.START)
LEVELS = tl.constexpr(levels.LEVELS)
SMALLEST = tl.constexpr(levels.SMALLEST)
ALIGNED = tl.constexpr(apart.ALIGNED)
LOG2_LARGEST = tl.constexpr(math.log2(LARGEST))


@triton.jit
def load_rows(at, inside, channel_ok, BOUNDED: tl.constexpr, EVEN: tl.constexpr):
    """Rows of keys or values, zero past the last key and past the head size."""
    if BOUNDED:
        rows = tl.load(at, mask=inside[:, None] & channel_ok[None, :], other=0.0)
    elif EVEN:
        rows = tl.load(at)
    else:
        rows = tl.load(at, mask=channel_ok[None, :], other=0.0)
    return rows


@triton.jit
def _rows(
    X, at, row, tokens_at, stride, first_channel, inside, channel_ok,
    LOADS: tl.constexpr, BOUNDED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The keys or values of one sub-block; a tensor descriptor fills in zeros by itself."""
    if LOADS == "tma":
        rows = X.load([row, first_channel])
    elif LOADS == "gather":
        rows = load_rows(at + tokens_at[:, None] * stride, inside, channel_ok, BOUNDED, EVEN)
    else:
        rows = load_rows(at, inside, channel_ok, BOUNDED, EVEN)
    return rows


@triton.jit
def _sum_fp8(
    acc, weights, shrink, V, value_at, place, channel_ok,
    LOADS: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The new accumulator where values are 8-bit floats (see `fp8.triton_values`)."""
    if LOADS == "tma":
        v = V.load([value_at, place])
    elif EVEN:
        v = tl.load(value_at)
    else:
        v = tl.load(value_at, mask=channel_ok[:, None], other=0.0)
    # The order of the values: each thread already holds the weights that it multiplies.
    w = tl.reshape(weights.to(v.dtype), [weights.shape[0], BLOCK_N // 16, 2, 4, 2])
    w = tl.reshape(tl.permute(w, (0, 1, 3, 2, 4)), [weights.shape[0], BLOCK_N])
    if EXACT:
        acc = tl.dot(w, tl.trans(v), acc * shrink[:, None])
    else:
        # These tensor cores keep 14 bits of a sum, which is enough for one sub-block.
        acc = acc * shrink[:, None] + tl.dot(w, tl.trans(v), max_num_imprecise_acc=BLOCK_N)
    return acc


@triton.jit
def seen_bits(words, offsets_n, BLOCK_N: tl.constexpr):
    """The bits of one or two mask words a row, as booleans (rows, BLOCK_N)."""
    word = tl.load(words)[:, None]
    if BLOCK_N == 64:
        word = tl.where((offsets_n < 32)[None, :], word, tl.load(words + 1)[:, None])
    return (word & (1 << (offsets_n % 32))[None, :]) != 0


@triton.jit
def _step(
    acc, total, top, q, scale, K, V, key_at, value_at, KEY_SCALES, ALLOWED, ORDER, words,
    place, offsets_n, stride_ks, stride_vs, first_row, first_channel, places, channel_ok,
    LOADS: tl.constexpr, MASKED: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr,
    FP8: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Attend to one sub-block of keys: the new accumulator, sum and maximum of each row."""
    if FP8:
        place = tl.multiple_of(place, ALIGNED)
    # Addresses come before masks: Triton 3.9 cannot pipeline the other order on sm_100.
    row = first_row + place
    if LOADS == "pointer":
        key_at += place.to(tl.int64) * stride_ks
        value_at += place if FP8 else place.to(tl.int64) * stride_vs
    inside = offsets_n < places - place  # only a masked sub-block may reach past the last key
    tokens_at = place
    if LOADS == "gather":
        tokens_at = tl.load(ORDER + place + offsets_n, mask=inside, other=0)
    k = _rows(
        K, key_at, row, tokens_at, stride_ks, first_channel, inside, channel_ok,
        LOADS, MASKED and not FP8, EVEN,
    )  # fmt: skip
    if KEY_SCALES is not None:
        scores = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32)
        scale = scale * tl.load(KEY_SCALES + place)
        scale_of_row = scale[:, None]
    else:
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scale_of_row = scale
    if MASKED:
        scores = tl.where(seen_bits(words, offsets_n, BLOCK_N), scores, -float("inf"))
    if ALLOWED is not None:
        may = tl.load(ALLOWED + place + offsets_n, mask=inside, other=0)
        scores = tl.where((may != 0)[None, :], scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    highest = new_top - LOG2_LARGEST if FP8 else new_top  # the weight of the largest score is 1
    weights = tl.exp2(scores * scale_of_row - highest[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    if FP8:
        acc = _sum_fp8(
            acc, weights, shrink, V, value_at, place, channel_ok, LOADS, EVEN, EXACT, BLOCK_N,
        )  # fmt: skip
    else:
        v = _rows(
            V, value_at, row, tokens_at, stride_vs, first_channel, inside, channel_ok,
            LOADS, MASKED, EVEN,
        )  # fmt: skip
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, total, new_top


@triton.jit
def attend_kernel(
    Q, K, V, OUT, LSE, KEY_SCALES, VALUE_SCALES, VALUE_MEANS, ALLOWED, ORDER, STARTS, HEAD_PATTERN,
    SCHEDULE, ROW_PTR, FULL_END, PLACES, MASK_IDS, BITS,
    scale,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs,
    stride_vh,
    tokens, length, heads, group, tiles, parts,
    SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    LOADS: tl.constexpr, SPECIALIZE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one tile, for one head of one batch entry.

    OUT (B, S, H, SIZE) and LSE (B, S, H) are contiguous, and so are the channels of Q, K and V.
    LOADS says what K and V are: "pointer", tensors in tile order; "gather", tensors in sequence
    order; "tma", descriptors of (B * S, heads * SIZE) in tile order. With KEY_SCALES (B, heads, S)
    K holds 8-bit integers in tile order, and the queries are rounded to 8 bits as well, row by row.
    With VALUE_SCALES and VALUE_MEANS (B, heads, SIZE) besides, V holds 8-bit floats (B, heads,
    SIZE, length) or is a descriptor of (B * heads * SIZE, length), and all keys and KEY_SCALES lie
    apart, `length` places of them (see `apart`); EXACT says that tensor cores sum such products in
    fp32. SPECIALIZE leaves the loads to warps of their own.
    """
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    row = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    pattern_start = 0
    if HEAD_PATTERN is not None:
        pattern_start = tl.load(HEAD_PATTERN + head) * tiles
    tile = tl.load(SCHEDULE + pattern_start + row)
    row = pattern_start + tile

    # The queries, through the token order.
    in_tile = part * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.load(STARTS + tile)
    held = in_tile < tl.load(STARTS + tile + 1) - first
    token = tl.load(ORDER + first + in_tile, mask=held, other=0)
    channel = tl.arange(0, SIZE_PADDED)
    channel_ok = channel < SIZE
    stored = held[:, None] & channel_ok[None, :]
    q_at = Q + batch * stride_qb + head.to(tl.int64) * stride_qh
    q = tl.load(q_at + token[:, None] * stride_qs + channel[None, :], mask=stored, other=0.0)

    offsets_n = tl.arange(0, BLOCK_N)
    key_head = (head // group).to(tl.int64)
    FP8: tl.constexpr = VALUE_SCALES is not None
    places = tokens
    if FP8:
        places = length
    key_row = batch * (heads // group) + key_head
    first_row = (batch * places).to(tl.int32)
    first_channel = (key_head * SIZE).to(tl.int32)
    key_at = channel[None, :]
    value_at = channel[None, :]
    if LOADS != "tma":
        key_at = K + batch * stride_kb + key_head * stride_kh + channel[None, :]
        value_at = V + batch * stride_vb + key_head * stride_vh
        value_at += channel[:, None] * stride_vs if FP8 else channel[None, :]
    elif FP8:
        value_at = (key_row * SIZE).to(tl.int32)
    if LOADS == "pointer":
        key_at += offsets_n[:, None] * stride_ks
        value_at += offsets_n[None, :] if FP8 else offsets_n[:, None] * stride_vs
    if KEY_SCALES is not None:
        KEY_SCALES += key_row * places
        q = q.to(tl.float32)
        of_row = tl.maximum(tl.max(tl.abs(q), 1), SMALLEST) / LEVELS
        q = tl.floor(q / of_row[:, None] + 0.5).to(tl.int8)
        scale = scale * of_row
    if ALLOWED is not None:
        ALLOWED += batch * places
    words = BITS + in_tile * (BLOCK_N // 32)
    words_per_mask = parts * BLOCK_M * (BLOCK_N // 32)

    acc = tl.zeros([BLOCK_M, SIZE_PADDED], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], START, tl.float32)
    begin = tl.load(ROW_PTR + row)
    middle = tl.load(FULL_END + row)
    end = tl.load(ROW_PTR + row + 1)
    # What the next iteration visits is loaded one iteration ahead: an index loaded where it is used
    # would itself be staged by the pipeliner and halve the buffers of keys and values.
    place = tl.load(PLACES + begin)
    for i in tl.range(begin, middle, num_stages=STAGES, warp_specialize=SPECIALIZE):
        following = tl.load(PLACES + i + 1)
        acc, total, top = _step(
            acc, total, top, q, scale, K, V, key_at, value_at, KEY_SCALES, ALLOWED, ORDER, words,
            place, offsets_n, stride_ks, stride_vs, first_row, first_channel, places, channel_ok,
            LOADS, False, SIZE == SIZE_PADDED, BLOCK_N, FP8, EXACT,
        )  # fmt: skip
        place = following
    mask = tl.load(MASK_IDS + middle)
    for i in tl.range(middle, end, num_stages=STAGES, warp_specialize=SPECIALIZE):
        following = tl.load(PLACES + i + 1)
        following_mask = tl.load(MASK_IDS + i + 1)
        acc, total, top = _step(
            acc, total, top, q, scale, K, V, key_at, value_at, KEY_SCALES, ALLOWED, ORDER,
            words + mask.to(tl.int64) * words_per_mask, place,
            offsets_n, stride_ks, stride_vs, first_row, first_channel, places, channel_ok,
            LOADS, True, SIZE == SIZE_PADDED, BLOCK_N, FP8, EXACT,
        )  # fmt: skip
        place = following
        mask = following_mask

    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    at_out = (batch * tokens + token) * heads + head
    out = acc / total[:, None]
    if FP8:
        at_channel = key_row * SIZE + channel
        of_channel = tl.load(VALUE_SCALES + at_channel, mask=channel_ok, other=0.0)
        mean = tl.load(VALUE_MEANS + at_channel, mask=channel_ok, other=0.0)
        out = tl.where(blind[:, None], 0.0, out * of_channel[None, :] + mean[None, :])
        top -= LOG2_LARGEST
    out = out.to(OUT.dtype.element_ty)
    tl.store(OUT + at_out[:, None] * SIZE + channel[None, :], out, mask=stored)
    lse = tl.where(blind, -float("inf"), (top + tl.log2(total)) * LN_2)
    tl.store(LSE + at_out, lse, mask=held)
