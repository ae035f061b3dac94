"""The choice of tiles in Triton: scores of pairs of tiles, and the best of every row.

Scores are those of `rules` but for what is the same in a row, which decides nothing: a score here
is the logarithm of a mass that is not divided by the sum of its row.
"""

# mypy: disable-error-code="no-untyped-def"
# (what a kernel takes and returns are Triton's values and has no Python types)

from __future__ import annotations

import triton
import triton.language as tl

from diffpatch.kernels.selection import limits

MOST_LOG_MASS = tl.constexpr(limits.MOST_LOG_MASS)
MOST_SPREAD = tl.constexpr(limits.MOST_SPREAD)
LOWEST = tl.constexpr(-3.0e38)  # finite: above what cannot be chosen at all
HIGHEST = tl.constexpr(3.0e38)
SMALLEST = tl.constexpr(1.0e-37)  # a normal number of fp32, or it would be taken for one of fp64
START = tl.constexpr(-1.0e30)


@triton.jit
def _load(at, row, held, channel, stride, SIZE: tl.constexpr):
    """Rows of a matrix whose channels are contiguous; 0 beyond its edges."""
    read = held[:, None] & (channel < SIZE)[None, :]
    return tl.load(at + row[:, None] * stride + channel[None, :], mask=read, other=0.0)


@triton.jit
def _logits(
    QUERIES, QUERY_VAR, KEYS, KEY_VAR, COUNT,
    query, key, has_query, has_key, scale, stride_q, stride_k,
    PLAIN: tl.constexpr, SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The log of the mass of some pairs, to second order, and the variance of their scores.

    PLAIN is the score of the means alone. The second order, which is small, is rounded to tf32.
    """
    first = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    second = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(0, SIZE_PADDED, BLOCK_C):
        channel = begin + tl.arange(0, BLOCK_C)
        q = _load(QUERIES, query, has_query, channel, stride_q, SIZE)
        k = _load(KEYS, key, has_key, channel, stride_k, SIZE)
        first = tl.dot(q, tl.trans(k), first, input_precision="tf32x3")
        if not PLAIN:
            square = _load(QUERY_VAR, query, has_query, channel, stride_q, SIZE) + q * q
            spread = _load(KEY_VAR, key, has_key, channel, stride_k, SIZE)
            second = tl.dot(square, tl.trans(spread), second, input_precision="tf32")
    logit = first * scale
    second = second * (scale * scale)
    if not PLAIN:
        count = tl.load(COUNT + key, mask=has_key, other=-float("inf"))[None, :]
        logit += tl.minimum(second * 0.5, tl.maximum(count, 0.0)) + count
    return logit, second


@triton.jit
def score_kernel(
    QUERIES, QUERY_VAR, KEYS, KEY_VAR, COUNT, SPREAD, SCORES,
    scale, stride_qb, stride_qh, stride_q, stride_kb, stride_kh, stride_k,
    tiles, strips, heads,
    PLAIN: tl.constexpr, SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M query tiles and BLOCK_N strips of one head of one batch entry.

    COUNT (B, strips) is the log of how many keys a strip has, SPREAD (B, H, strips) the log of how
    far its values spread, or nothing where masses alone decide, and SCORES (B, H, tiles, strips)
    contiguous like these.
    """
    batch = (tl.program_id(2) // heads).to(tl.int64)
    head = (tl.program_id(2) % heads).to(tl.int64)
    query = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    key = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    has_query, has_key = query < tiles, key < strips
    at_q = batch * stride_qb + head * stride_qh
    at_k = batch * stride_kb + head * stride_kh
    score, second = _logits(
        QUERIES + at_q, QUERY_VAR + at_q, KEYS + at_k, KEY_VAR + at_k, COUNT + batch * strips,
        query, key, has_query, has_key, scale, stride_q, stride_k,
        PLAIN, SIZE, SIZE_PADDED, BLOCK_C, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    row = batch * heads + head
    if SPREAD is not None:
        deviation = tl.minimum(tl.sqrt(tl.maximum(second, 0.0)), MOST_SPREAD)
        score += tl.log(tl.maximum(deviation, SMALLEST))
        score += tl.load(SPREAD + row * strips + key, mask=has_key, other=0.0)[None, :]
    at = (row * tiles + query)[:, None] * strips + key[None, :]
    tl.store(SCORES + at, tl.maximum(score, LOWEST), mask=has_query[:, None] & has_key[None, :])


@triton.jit
def drop_kernel(
    QUERIES, QUERY_VAR, KEYS, KEY_VAR, COUNT, VALUES, SEEN, SCORES,
    scale, stride_qb, stride_qh, stride_q, stride_kb, stride_kh, stride_k,
    stride_sb, stride_sh, tiles, strips, heads,
    SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M query tiles, all strips twice: for the output, then for the scores.

    Masses wait in SCORES meanwhile, as computing them twice would take longer.

    VALUES (B, H, strips, SIZE) and SCORES (B, H, tiles, strips) are contiguous; a byte of SEEN
    (B or 1, H or 1, tiles, strips) says what is visited.
    """
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    query = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    has_query = query < tiles
    at_q = batch * stride_qb + head * stride_qh
    at_k = batch * stride_kb + head * stride_kh
    row = batch * heads + head
    values = VALUES + row * strips * SIZE
    seen_at = SEEN + batch * stride_sb + head * stride_sh
    channel = tl.arange(0, SIZE_PADDED)
    top = tl.full([BLOCK_M], START, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, SIZE_PADDED], tl.float32)
    for start in range(0, strips, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        has_key = key < strips
        both = has_query[:, None] & has_key[None, :]
        logit, _ = _logits(
            QUERIES + at_q, QUERY_VAR + at_q, KEYS + at_k, KEY_VAR + at_k, COUNT + batch * strips,
            query, key, has_query, has_key, scale, stride_q, stride_k,
            False, SIZE, SIZE_PADDED, BLOCK_C, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        at = (row * tiles + query)[:, None] * strips + key[None, :]
        tl.store(SCORES + at, logit, mask=both)
        seen = tl.load(seen_at + query[:, None] * strips + key[None, :], mask=both, other=0)
        logit = tl.where(seen != 0, logit, -float("inf"))
        new = tl.maximum(top, tl.max(logit, 1))
        weight = tl.exp(logit - new[:, None])
        shrink = tl.exp(top - new)
        total = total * shrink + tl.sum(weight, 1)
        v = _load(values, key, has_key, channel, SIZE, SIZE)
        out = tl.dot(weight, v, out * shrink[:, None], input_precision="tf32")
        top = new
    out = out / tl.maximum(total, SMALLEST)[:, None]
    length = tl.sum(out * out, 1)
    log_total = tl.log(tl.maximum(total, SMALLEST)) + top
    tl.debug_barrier()  # what some threads have stored others read
    for start in range(0, strips, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        has_key = key < strips
        both = has_query[:, None] & has_key[None, :]
        at = (row * tiles + query)[:, None] * strips + key[None, :]
        logit = tl.load(SCORES + at, mask=both, other=0.0)
        v = _load(values, key, has_key, channel, SIZE, SIZE)
        square = length[:, None] + tl.sum(v * v, 1)[None, :]
        square -= 2.0 * tl.dot(out, tl.trans(v), input_precision="tf32")
        share = logit - log_total[:, None]
        score = share + 0.5 * tl.log(tl.maximum(square, SMALLEST))
        score = tl.where(share > MOST_LOG_MASS, HIGHEST, tl.maximum(score, LOWEST))
        tl.store(SCORES + at, score, mask=both)


@triton.jit
def choose_kernel(
    SCORES, SEEN, FIXED, COUNTS, CHOSEN,
    stride_sb, stride_sh, stride_f, stride_c, tiles, strips, heads,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: one query tile of one head of one batch entry.

    SCORES and CHOSEN (B, H, tiles, strips) are contiguous, as are the last two axes of SEEN and
    FIXED and the last of COUNTS. What the chosen exceed is found by halving the numbers between:
    bits, flipped where they are negative, are in the order of the scores. Few halvings leave as
    many as are wanted; equal scores take all 32.
    """
    tile = tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    strip = tl.arange(0, BLOCK_N)
    held = strip < strips
    at = ((batch * heads + head) * tiles + tile) * strips + strip
    inside = tile * strips + strip
    seen = tl.load(SEEN + batch * stride_sb + head * stride_sh + inside, mask=held, other=0) != 0
    must = seen & (tl.load(FIXED + head * stride_f + inside, mask=held, other=0) != 0)
    count = tl.load(COUNTS + head * stride_c + tile).to(tl.int32)
    score = tl.load(SCORES + at, mask=held, other=0.0) + 0.0  # -0 is 0
    score = tl.where(seen, score, -float("inf"))
    score = tl.where(must, float("inf"), score)
    bits = score.to(tl.uint32, bitcast=True)
    order = tl.where((bits >> 31) != 0, ~bits, bits | 0x80000000)
    order = tl.where(held, order, 0)  # below every number
    # At least `count` are `last` or more, fewer are `limit` or more.
    last, limit = tl.full([], 0, tl.uint32), tl.full([], 0xFFFFFFFF, tl.uint32)
    found = BLOCK_N * 1.0
    while (limit - last > 1) & (found != count.to(tl.float32)):
        middle = last + ((limit - last) >> 1)
        those = tl.sum(tl.where(order >= middle, 1.0, 0.0), 0)
        enough = those >= count.to(tl.float32)
        last = tl.where(enough, middle, last)
        found = tl.where(enough, those, found)
        limit = tl.where(enough, limit, middle)
    above, equal = order > last, (order == last) & held
    room = count - tl.sum(above.to(tl.int32), 0)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
    chosen = ((chosen & seen) | must) & held
    tl.store(CHOSEN + at, chosen.to(tl.uint8), mask=held)
