"""Linear attention as two Triton kernels: what runs on the GPU."""

# mypy: disable-error-code="no-untyped-def"
# (what a kernel takes and returns are Triton's values and has no Python types)

from __future__ import annotations

import triton
import triton.language as tl

EMPTY = tl.constexpr(1e-6)  # of a sum over all keys: less than this is nothing


@triton.jit
def _centred(X, at, CENTRE, centre_at, counted, column_ok):
    """Rows of X less their centre, in the dtype of X, 0 where they do not count."""
    read = counted[:, None] & column_ok[None, :]
    x = tl.load(X + at, mask=read, other=0.0)
    if CENTRE is not None:
        centre = tl.load(CENTRE + centre_at, mask=column_ok, other=0.0)
        x = tl.where(read, x.to(tl.float32) - centre[None, :], 0.0).to(x.dtype)
    return x


@triton.jit
def state_kernel(
    LEFT, RIGHT, LEFT_CENTRE, RIGHT_CENTRE, WEIGHT, STATE, LEFT_SUM, RIGHT_SUM,
    stride_lb, stride_ls, stride_lh, stride_rb, stride_rs, stride_rh,
    tokens, heads, per_split,
    LEFT_SIZE: tl.constexpr, RIGHT_SIZE: tl.constexpr,
    BLOCK_LEFT: tl.constexpr, BLOCK_RIGHT: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """First pass: sums over a stretch of keys of left ⊗ right and of both, for one head.

    STATE (splits, B, heads, LEFT_SIZE, RIGHT_SIZE) and the sums (splits, B, heads, ·) are fp32 and
    contiguous; the centres (B, heads, ·) are fp32 or None. WEIGHT (B, S) is 0 for keys that do not
    count.
    """
    rights = tl.cdiv(RIGHT_SIZE, BLOCK_RIGHT)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    first_left = (tl.program_id(2) // rights) * BLOCK_LEFT
    first_right = (tl.program_id(2) % rights) * BLOCK_RIGHT
    left = first_left + tl.arange(0, BLOCK_LEFT)
    right = first_right + tl.arange(0, BLOCK_RIGHT)
    left_at = batch * stride_lb + head * stride_lh + left[None, :]
    right_at = batch * stride_rb + head * stride_rh + right[None, :]
    own = batch * heads + head
    acc = tl.zeros([BLOCK_LEFT, BLOCK_RIGHT], tl.float32)
    left_sum = tl.zeros([BLOCK_LEFT], tl.float32)
    right_sum = tl.zeros([BLOCK_RIGHT], tl.float32)
    begin = tl.program_id(0) * per_split
    end = tl.minimum(begin + per_split, tokens)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_N)
        counted = tl.load(WEIGHT + batch * tokens + row, mask=row < end, other=0) != 0
        place = row[:, None].to(tl.int64)
        x = _centred(LEFT, left_at + place * stride_ls, LEFT_CENTRE, own * LEFT_SIZE + left,
                     counted, left < LEFT_SIZE)  # fmt: skip
        y = _centred(RIGHT, right_at + place * stride_rs, RIGHT_CENTRE, own * RIGHT_SIZE + right,
                     counted, right < RIGHT_SIZE)  # fmt: skip
        acc = tl.dot(tl.trans(x), y, acc, input_precision=PRECISION)
        left_sum += tl.sum(x.to(tl.float32), 0)
        right_sum += tl.sum(y.to(tl.float32), 0)
    own += tl.program_id(0).to(tl.int64) * tl.num_programs(1)
    at = (own * LEFT_SIZE + left[:, None]) * RIGHT_SIZE + right[None, :]
    tl.store(STATE + at, acc, mask=(left < LEFT_SIZE)[:, None] & (right < RIGHT_SIZE)[None, :])
    if first_right == 0:
        tl.store(LEFT_SUM + own * LEFT_SIZE + left, left_sum, mask=left < LEFT_SIZE)
    if first_left == 0:
        tl.store(RIGHT_SUM + own * RIGHT_SIZE + right, right_sum, mask=right < RIGHT_SIZE)


@triton.jit
def apply_kernel(
    Q, K, V, CENTRE_K, CENTRE_V, WEIGHT, STATE, SQUARES, KEY_SUM, VALUE_SUM, COUNT, OUT, LSE,
    ORDER, STARTS, ROW_PTR, PLACES, LENGTHS,
    scale, stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs,
    stride_vh,
    tokens, heads, group, parts,
    SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr, VALUE_SIZE: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Second pass: BLOCK_M queries of one tile, for one head of one batch entry.

    What the state says about a query, less what the keys that its tile visits contribute to that,
    as attention over these keys whose weights are the bare scores. With SQUARES (keys ⊗ keys) the
    cumulants, else a feature map's linear attention, Q and K being features already. K, V and
    WEIGHT are in tile order; STATE, SQUARES and the sums are fp32 and contiguous, as are OUT
    (B, S, H, VALUE_SIZE) and LSE (B, S, H).
    """
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    key_heads = heads // group
    own = batch * key_heads + head // group
    tile = tl.program_id(0) // parts
    in_tile = (tl.program_id(0) % parts) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.load(STARTS + tile)
    held = in_tile < tl.load(STARTS + tile + 1) - first
    token = tl.load(ORDER + first + in_tile, mask=held, other=0)
    channel = tl.arange(0, SIZE_PADDED)
    channel_ok = channel < SIZE
    column = tl.arange(0, VALUE_PADDED)
    column_ok = column < VALUE_SIZE
    q_at = Q + batch * stride_qb + head * stride_qh + token[:, None] * stride_qs
    q = tl.load(q_at + channel[None, :], mask=held[:, None] & channel_ok[None, :], other=0.0)
    centre_v = tl.load(CENTRE_V + own * VALUE_SIZE + column, mask=column_ok, other=0.0)

    # The keys that the tile visits, to be taken away.
    acc = tl.zeros([BLOCK_M, VALUE_PADDED], tl.float32)
    near = tl.zeros([BLOCK_M], tl.float32)
    near_squares = tl.zeros([BLOCK_M], tl.float32)
    near_values = tl.zeros([VALUE_PADDED], tl.float32)
    far = tl.load(COUNT + batch)
    k_at = batch * stride_kb + (head // group) * stride_kh + channel[None, :]
    v_at = batch * stride_vb + (head // group) * stride_vh + column[None, :]
    offsets = tl.arange(0, BLOCK_N)
    for i in tl.range(tl.load(ROW_PTR + tile), tl.load(ROW_PTR + tile + 1), num_stages=STAGES):
        row = tl.load(PLACES + i) + offsets
        inside = offsets < tl.load(LENGTHS + i)
        counted = tl.load(WEIGHT + batch * tokens + row, mask=inside, other=0) != 0
        place = row[:, None].to(tl.int64)
        k = _centred(K, k_at + place * stride_ks, CENTRE_K, own * SIZE + channel, counted,
                     channel_ok)  # fmt: skip
        v = _centred(V, v_at + place * stride_vs, CENTRE_V, own * VALUE_SIZE + column, counted,
                     column_ok)  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        near += tl.sum(scores, 1)
        if SQUARES is not None:
            near_squares += tl.sum(scores * scores, 1)
        acc = tl.dot((-scores).to(v.dtype), v, acc, input_precision="ieee")
        near_values += tl.sum(v.to(tl.float32), 0)
        far -= tl.sum(counted.to(tl.float32), 0)

    # The state over all keys, some channels at a time.
    total = tl.zeros([BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    wide = q.to(tl.float32) * scale
    for start in range(0, SIZE, BLOCK_C):
        some = start + tl.arange(0, BLOCK_C)
        ok = some < SIZE
        part = tl.load(q_at + some[None, :], mask=held[:, None] & ok[None, :], other=0.0)
        part = part.to(tl.float32) * scale
        at = (own * SIZE + some[:, None]) * VALUE_SIZE + column[None, :]
        state = tl.load(STATE + at, mask=ok[:, None] & column_ok[None, :], other=0.0)
        acc = tl.dot(part, state, acc, input_precision=PRECISION)
        sums = tl.load(KEY_SUM + own * SIZE + some, mask=ok, other=0.0)
        total += tl.sum(part * sums[None, :], 1)
        if SQUARES is not None:
            at = (own * SIZE + channel[:, None]) * SIZE + some[None, :]
            state = tl.load(SQUARES + at, mask=channel_ok[:, None] & ok[None, :], other=0.0)
            squares += tl.sum(tl.dot(wide, state, input_precision=PRECISION) * part, 1)

    share = 1.0 / tl.maximum(far, 1.0)
    sums = tl.load(VALUE_SUM + own * VALUE_SIZE + column, mask=column_ok, other=0.0)
    mean = (sums - near_values) * share
    at_row = (batch * tokens + token) * heads + head
    if SQUARES is not None:
        mean_score = (total - near) * share
        second = 0.5 * tl.maximum((squares - near_squares) * share - mean_score * mean_score, 0.0)
        capped = tl.minimum(second, tl.log(tl.maximum(far, 1.0)))
        held_at = tl.sqrt(capped / tl.maximum(second, 1e-30))
        value = mean[None, :] + held_at[:, None] * (
            acc * share - mean_score[:, None] * mean[None, :]
        )
        centre = tl.load(CENTRE_K + own * SIZE + channel, mask=channel_ok, other=0.0)
        mass = capped + mean_score + tl.sum(wide * centre[None, :], 1)
        mass = tl.where(far > 0, mass + tl.log(tl.maximum(far, 1.0)), -float("inf"))
        tl.store(LSE + at_row, mass, mask=held)
    else:
        mass = total - near
        blind = mass <= EMPTY * total
        value = acc / tl.where(blind, 1.0, mass)[:, None]
        value = tl.where(blind[:, None], mean[None, :], value)
    value = tl.where(far > 0, value + centre_v[None, :], 0.0).to(OUT.dtype.element_ty)
    at_out = at_row[:, None] * VALUE_SIZE + column[None, :]
    tl.store(OUT + at_out, value, mask=held[:, None] & column_ok[None, :])
