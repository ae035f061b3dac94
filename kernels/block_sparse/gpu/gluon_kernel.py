"""Block-sparse attention for Hopper, scheduled by hand in Gluon: what runs on the GPU.

Three groups of warps share a program. One warp loads: it walks the list of sub-blocks and has the
copy engine (TMA) bring their keys and values into a ring of buffers. Two warpgroups compute, each
for half of the queries. While its tensor cores multiply the weights of one sub-block by the values,
a warpgroup already has the scores of the next, and turns those into weights. If they take turns,
one warpgroup starts its products while the other computes weights. (Both are ideas of
FlashAttention-3, arXiv 2407.08608, sections 3.1 and 3.2.)

`ready` barriers say that a buffer is filled, `free` ones that both warpgroups have done with it,
`turns` ones whose turn it is.
"""

# mypy: disable-error-code="no-untyped-def"
# (what a kernel takes and returns are Triton's values and has no Python types)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import constexpr_function
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from diffpatch.kernels.gpu import common

LN_2 = gl.constexpr(common.LN_2)
START = gl.constexpr(common.START)
WARPGROUP = gl.constexpr(4)  # warps
ROWS = gl.constexpr(64)  # queries of a warpgroup: what one tensor-core instruction takes
COMPUTING = gl.constexpr(2)  # warpgroups that compute
LANES = gl.constexpr(4)  # threads that share a row of scores, and mask words of a row

# Triton renamed it between 3.7 and 3.9.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def _load(
    K, V, PLACES, keys, values, barriers, begin, end, first_row, first_channel,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp: fill the ring with the keys and values of each sub-block in turn."""
    keys_ready, values_ready, keys_free, values_free, _ = barriers
    place = gl.load(PLACES + begin)
    for i in range(begin, end):
        following = gl.load(PLACES + i + 1)
        slot = (i - begin) % STAGES
        phase = (i - begin) // STAGES & 1
        row = first_row + place
        # A new barrier counts as having completed phase 1: the first round does not wait.
        mbarrier.wait(keys_free.index(slot), phase ^ 1)
        mbarrier.expect(keys_ready.index(slot), K.block_type.nbytes)
        async_load(K, [row, first_channel], keys_ready.index(slot), keys.index(slot))
        mbarrier.wait(values_free.index(slot), phase ^ 1)
        mbarrier.expect(values_ready.index(slot), V.block_type.nbytes)
        async_load(V, [row, first_channel], values_ready.index(slot), values.index(slot))
        place = following


@constexpr_function
def _by_lane(columns):
    """How a warpgroup holds scores, told apart as (row, 8 columns each, lane of 4, column of 2)."""
    eights = [[0, 1 << n, 0, 0] for n in range(8) if 8 << n < columns]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 0, 1], [8, 0, 0, 0], *eights],
        lane_bases=[[0, 0, 1, 0], [0, 0, 2, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]],
        warp_bases=[[16, 0, 0, 0], [32, 0, 0, 0]],
        block_bases=[],
        shape=[64, columns // 8, 4, 2],
    )


@gluon.jit
def _mask_words(BITS, mask, at, masked, MASK_ROWS: gl.constexpr):
    """A thread's mask word of each of its queries, loaded long before it is needed; anything
    without a mask (a constant would make LLVM move the arithmetic on the words up to here)."""
    words = at
    if masked:
        words = gl.load(BITS + mask.to(gl.int64) * (MASK_ROWS * LANES) + at)
    return words


@gluon.jit
def _hide(
    scores, words, masked, ALLOWED, PLACES, i, tokens,
    BLOCK_N: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Scores, with -inf where a query does not see a key."""
    column = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
    if masked:
        whole: gl.constexpr = _by_lane(BLOCK_N)
        eight: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, whole)))
        two: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, whole)))
        pair = gl.arange(0, BLOCK_N // 8, layout=eight)[None, :, None, None]
        bit = 2 * pair + gl.arange(0, 2, layout=two)[None, None, None, :]
        seen = (words[:, None, :, None] & (1 << bit)) != 0
        seen = gl.convert_layout(seen.reshape([ROWS, BLOCK_N]), layout, assert_trivial=True)
        scores = gl.where(seen, scores, -float("inf"))
    if ALLOWED is not None:
        key = gl.load(PLACES + i) + column
        may = gl.load(ALLOWED + key, mask=key < tokens, other=0)
        scores = gl.where((may != 0)[None, :], scores, -float("inf"))
    return scores


@gluon.jit
def _weigh(scores, top, total, scale):
    """One step of the softmax: weights, the new maximum and sum, and what older sums shrink by."""
    new_top = gl.maximum(top, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - new_top[:, None])
    shrink = gl.exp2(top - new_top)
    return weights, new_top, total * shrink + gl.sum(weights, 1), shrink


@gluon.jit
def _compute(
    which, tensors, lists, buffers, barriers, place, visits, scale, strides, tokens, heads,
    SIZE: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, MASK_ROWS: gl.constexpr,
    TURNS: gl.constexpr,
):  # fmt: skip
    """A computing warpgroup: attention of its queries to every sub-block of the row."""
    Q, OUT, LSE, ALLOWED = tensors
    ORDER, STARTS, PLACES, MASK_IDS, BITS = lists
    queries, keys, values = buffers
    batch, head, part, tile = place
    begin, middle, end = visits
    keys_ready, values_ready, keys_free, values_free, turns = barriers
    stride_qb, stride_qs, stride_qh = strides
    dtype: gl.constexpr = Q.dtype.element_ty
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPGROUP, 1], [16, SIZE, 16])
    score_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [WARPGROUP, 1], [16, BLOCK_N, 16]
    )
    left_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    acc_rows: gl.constexpr = gl.SliceLayout(1, acc_layout)
    score_rows: gl.constexpr = gl.SliceLayout(1, score_layout)
    # 16 bytes a thread, whole rows side by side.
    row_layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // SIZE, SIZE // 8], [WARPGROUP, 1], [1, 0]
    )
    own: gl.constexpr = gl.SliceLayout(1, row_layout)

    first = gl.load(STARTS + tile)
    held = gl.load(STARTS + tile + 1) - first
    first_query = part * (COMPUTING * ROWS) + which * ROWS
    queries = queries.index(which)
    channel = gl.arange(0, SIZE, layout=gl.SliceLayout(0, row_layout))
    in_tile = first_query + gl.arange(0, ROWS, layout=own)
    token = gl.load(ORDER + first + in_tile, mask=in_tile < held, other=0)
    at = Q + batch * stride_qb + head.to(gl.int64) * stride_qh
    at = at + token[:, None] * stride_qs + channel[None, :]
    queries.store(gl.load(at, mask=(in_tile < held)[:, None], other=0.0))
    fence_async_shared()  # the tensor cores read shared memory past the usual path

    word_layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, _by_lane(BLOCK_N)))
    in_mask = first_query + gl.arange(0, ROWS, layout=gl.SliceLayout(1, word_layout))
    lane = gl.arange(0, LANES, layout=gl.SliceLayout(0, word_layout))
    in_mask = in_mask[:, None] * LANES + lane[None, :]
    if ALLOWED is not None:
        ALLOWED += batch * tokens

    acc = gl.zeros([ROWS, SIZE], gl.float32, acc_layout)
    nothing = gl.zeros([ROWS, BLOCK_N], gl.float32, score_layout)
    total = gl.zeros([ROWS], gl.float32, score_rows)
    top = gl.full([ROWS], START, gl.float32, score_rows)
    if begin < end:
        # The scores of the first sub-block.
        mask = gl.load(MASK_IDS + begin)
        masked = begin >= middle
        seen = _mask_words(BITS, mask, in_mask, masked, MASK_ROWS)
        mbarrier.wait(keys_ready.index(0), 0)
        scores = warpgroup_mma(
            queries, keys.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        scores = warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(keys_free.index(0), count=1)
        scores = _hide(scores, seen, masked, ALLOWED, PLACES, begin, tokens, BLOCK_N, score_layout)
        weights, top, total, _ = _weigh(scores, top, total, scale)
        left = gl.convert_layout(weights.to(dtype), left_layout)
        mask = gl.load(MASK_IDS + begin + 1)
        mbarrier.wait(keys_ready.index(1 % STAGES), 1 // STAGES & 1, pred=begin + 1 < end)
        for i in range(begin + 1, end):
            n = i - begin
            slot = n % STAGES
            before = (n - 1) % STAGES
            masked = i >= middle
            seen = _mask_words(BITS, mask, in_mask, masked, MASK_ROWS)
            following = gl.load(MASK_IDS + i + 1)
            if TURNS:  # the first warpgroup begins
                mbarrier.wait(turns.index(which), ((n - 1) & 1) ^ (1 - which))
            scores = warpgroup_mma(
                queries, keys.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            mbarrier.wait(values_ready.index(before), (n - 1) // STAGES & 1)
            sums = warpgroup_mma(left, values.index(before), acc, is_async=True)
            if TURNS:
                mbarrier.arrive(turns.index(1 - which), count=1)
            scores = warpgroup_mma_wait(1, deps=(scores,))
            mbarrier.arrive(keys_free.index(slot), count=1)
            scores = _hide(scores, seen, masked, ALLOWED, PLACES, i, tokens, BLOCK_N, score_layout)
            weights, top, total, shrink = _weigh(scores, top, total, scale)
            rounded = weights.to(dtype)
            mask = following
            # The wait for the next keys stands here because it branches: otherwise the assembler
            # moves the wait for the sums up, before the weights that are computed meanwhile.
            following_slot = (n + 1) % STAGES
            mbarrier.wait(keys_ready.index(following_slot), (n + 1) // STAGES & 1, pred=i + 1 < end)
            acc = warpgroup_mma_wait(0, deps=(sums, left))[0]
            mbarrier.arrive(values_free.index(before), count=1)
            acc = acc * gl.convert_layout(shrink, acc_rows)[:, None]
            left = gl.convert_layout(rounded, left_layout)
        last = end - begin - 1
        mbarrier.wait(values_ready.index(last % STAGES), last // STAGES & 1)
        sums = warpgroup_mma(left, values.index(last % STAGES), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(sums, left))[0]

    blind = total == 0.0
    total = gl.where(blind, 1.0, total)
    acc = acc / gl.convert_layout(total, acc_rows)[:, None]
    lse = gl.where(blind, -float("inf"), (top + gl.log2(total)) * LN_2)
    # Through the memory of the queries, so that a thread has 16 bytes of a row to store.
    queries.store(acc.to(dtype))
    # Not kept since the beginning: registers are scarce in between.
    token = gl.load(ORDER + first + in_tile, mask=in_tile < held, other=0)
    at_out = (batch * tokens + token) * heads + head
    at = OUT + at_out[:, None] * SIZE + channel[None, :]
    gl.store(at, queries.load(row_layout), mask=(in_tile < held)[:, None])
    gl.store(LSE + at_out, gl.convert_layout(lse, own), mask=in_tile < held)


@gluon.jit
def attend_kernel(
    Q, K, V, OUT, LSE, ALLOWED, ORDER, STARTS, HEAD_PATTERN,
    SCHEDULE, ROW_PTR, FULL_END, PLACES, MASK_IDS, BITS,
    scale,
    stride_qb, stride_qs, stride_qh,
    tokens, heads, group, tiles,
    SIZE: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
    TURNS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program: 128 queries of one tile, for one head of one batch entry; with 4 warps.

    As in `triton_kernel.attend_kernel`, with K and V descriptors of (B * S, heads * SIZE) in tile
    order. TURNS says whether warpgroups take turns. REGISTERS are those of a thread that computes.
    """
    batch = (gl.program_id(1) // heads).to(gl.int64)
    head = gl.program_id(1) % heads
    row = gl.program_id(0) // PARTS
    part = gl.program_id(0) % PARTS
    pattern_start = 0
    if HEAD_PATTERN is not None:
        pattern_start = gl.load(HEAD_PATTERN + head) * tiles
    tile = gl.load(SCHEDULE + pattern_start + row)
    row = pattern_start + tile

    dtype: gl.constexpr = Q.dtype.element_ty
    query_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, SIZE], dtype)
    queries = gl.allocate_shared_memory(dtype, [COMPUTING, ROWS, SIZE], query_layout)
    keys = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, SIZE], K.layout)
    values = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, SIZE], V.layout)
    barrier_layout: gl.constexpr = mbarrier.MBarrierLayout()
    keys_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    values_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    keys_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    values_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    for i in gl.static_range(STAGES):
        mbarrier.init(keys_ready.index(i), count=1)
        mbarrier.init(values_ready.index(i), count=1)
        mbarrier.init(keys_free.index(i), count=COMPUTING)
        mbarrier.init(values_free.index(i), count=COMPUTING)
    turns = gl.allocate_shared_memory(gl.int64, [COMPUTING, 1], barrier_layout)
    for i in gl.static_range(COMPUTING):
        mbarrier.init(turns.index(i), count=1)

    barriers = (keys_ready, values_ready, keys_free, values_free, turns)
    tensors = (Q, OUT, LSE, ALLOWED)
    lists = (ORDER, STARTS, PLACES, MASK_IDS, BITS)
    buffers = (queries, keys, values)
    place = (batch, head, part, tile)
    strides = (stride_qb, stride_qs, stride_qh)
    mask_rows: gl.constexpr = PARTS * COMPUTING * ROWS
    begin = gl.load(ROW_PTR + row)
    middle = gl.load(FULL_END + row)
    end = gl.load(ROW_PTR + row + 1)
    visits = (begin, middle, end)
    first_row = (batch * tokens).to(gl.int32)
    gl.warp_specialize(
        [
            (_compute, (0, tensors, lists, buffers, barriers, place, visits, scale, strides,
                tokens, heads, SIZE, BLOCK_N, STAGES, mask_rows, TURNS)),
            (_compute, (1, tensors, lists, buffers, barriers, place, visits, scale, strides,
                tokens, heads, SIZE, BLOCK_N, STAGES, mask_rows, TURNS)),
            (_load, (K, V, PLACES, keys, values, barriers, begin, end, first_row,
                head // group * SIZE, STAGES)),
        ],
        [WARPGROUP, 1],
        [REGISTERS, 24],
    )  # fmt: skip
