"""Block-sparse attention as one Triton kernel: forward pass, for GPUs.

A program owns BLOCK_M queries of one tile and one head. It visits the key sub-blocks (BLOCK_N keys)
of its row: first those that every query sees, without any mask arithmetic, then the others, under
a bit mask. Keys and values are put in tile order once a call; queries and outputs stay in place.
"""

# mypy: disable-error-code="no-untyped-def"
# (what a kernel takes and returns are Triton's values and has no Python types)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from diffpatch.kernels.block_sparse_lists import identity_order, sub_blocks
from diffpatch.kernels.blocks import BlockIndex

MAX_HEAD_SIZE = 256
LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)
# A finite start of the running maximum: exp2(-inf - START) is 0 where -inf - -inf would be NaN.
START = tl.constexpr(-1.0e30)


class Config(NamedTuple):
    """How the kernel is cut and scheduled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (bytes an element, padded head size) -> configuration, chosen so that nothing spills. fp32 has no
# tensor cores at full precision and needs a small block to stay in registers.
CONFIGS = {
    (2, 64): Config(128, 64, 4, 3),
    (2, 128): Config(128, 64, 8, 3),
    (2, 256): Config(64, 64, 8, 2),
    (4, 64): Config(64, 32, 8, 2),
    (4, 128): Config(16, 32, 8, 2),
    (4, 256): Config(32, 32, 16, 2),
}
# Other GPUs hold the operands of tensor cores in registers; some have 99 KiB of shared memory.
CONFIGS_SMALL = CONFIGS | {
    (2, 64): Config(128, 64, 8, 3),
    (2, 128): Config(128, 32, 8, 3),
    (2, 256): Config(64, 32, 8, 2),
    (4, 256): Config(32, 32, 16, 1),
}
ASYNC_TENSOR_CORE = (90, 100, 103)  # compute capabilities whose tensor cores read shared memory


def configuration(dtype: torch.dtype, size: int, tile: int, arch: int) -> Config:
    """The configuration that ships for a case.

    Args:
        dtype: of q, k and v.
        size: the head size.
        tile: the largest tile of the block index, in tokens.
        arch: the compute capability, 90 for 9.0.
    """
    table = CONFIGS if arch in ASYNC_TENSOR_CORE else CONFIGS_SMALL
    config = table[dtype.itemsize, padded(size)]
    if config.block_m == 128 and tile <= 64:
        config = config._replace(block_m=64, num_warps=4)
    return config


def padded(size: int) -> int:
    """The channels the kernel computes for a head size: a power of two, 64 at least."""
    return max(64, triton.next_power_of_2(size))


def unsupported_reason(q: torch.Tensor, blocks: BlockIndex) -> str | None:
    """Why the kernel cannot run, or None. Takes the queries (B, S, H, D) and the blocks."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the triton backend computes fp32, bf16 and fp16, and q is {q.dtype}"
    if q.shape[-1] > MAX_HEAD_SIZE:
        return f"the triton backend takes heads up to {MAX_HEAD_SIZE} channels, q has {q.shape[-1]}"
    if q.shape[0] * q.shape[2] > 65535:
        return f"batch times heads is {q.shape[0] * q.shape[2]}, a launch takes 65535"
    return None


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    scale: float,
    key_mask: torch.Tensor | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the kept pairs in one kernel launch.

    Args:
        q: (B, S, H, D), fp32, bf16 or fp16.
        k: (B, S, K, D), where K divides H.
        v: (B, S, K, D).
        blocks: which pairs to keep.
        scale: the factor on q·k, above 0.
        key_mask: bool (B, S), False for keys nobody may attend to, or None.
        return_lse: ignored, the log-sum-exp is always returned.

    Returns:
        The output (B, S, H, D) in the dtype of q and the natural log-sum-exp, fp32 (B, S, H).
    """
    batch, tokens, heads, size = q.shape
    config = configuration(q.dtype, size, blocks.max_tile, arch(q.device))
    lists = sub_blocks(blocks, config.block_m, config.block_n)
    q = q if q.stride(3) == 1 else q.contiguous()
    k, v = (_in_tile_order(x, blocks) for x in (k, v))
    allowed = None if key_mask is None else _in_tile_order(key_mask, blocks).view(torch.uint8)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    grid = (blocks.num_tiles * lists.parts, batch * heads)
    attend_kernel[grid](
        q, k, v, out, lse, allowed, blocks.order, blocks.starts, blocks.head_pattern,
        lists.schedule, lists.row_ptr, lists.full_end, lists.places, lists.mask_ids, lists.bits,
        scale * LOG2_E,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        tokens, heads, heads // k.shape[2], blocks.num_tiles, lists.parts,
        SIZE=size, SIZE_PADDED=padded(size),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, STAGES=config.num_stages,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out, lse


def _in_tile_order(x: torch.Tensor, blocks: BlockIndex) -> torch.Tensor:
    if not identity_order(blocks):
        return x.index_select(1, blocks.order)
    return x if x.stride(-1) == 1 else x.contiguous()


def arch(device: torch.device) -> int:
    """The compute capability of a GPU, 90 for 9.0; 0 for anything that is not CUDA or ROCm."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


@triton.jit
def _load(at, inside, channel_ok, BOUNDED: tl.constexpr, EVEN: tl.constexpr):
    """Rows of keys or values, zero past the last key and past the head size."""
    if BOUNDED:
        rows = tl.load(at, mask=inside[:, None] & channel_ok[None, :], other=0.0)
    elif EVEN:
        rows = tl.load(at)
    else:
        rows = tl.load(at, mask=channel_ok[None, :], other=0.0)
    return rows


@triton.jit
def _seen(words, offsets_n, BLOCK_N: tl.constexpr):
    """The bits of one or two mask words a row, as booleans (rows, BLOCK_N)."""
    word = tl.load(words)[:, None]
    if BLOCK_N == 64:
        word = tl.where((offsets_n < 32)[None, :], word, tl.load(words + 1)[:, None])
    return (word & (1 << (offsets_n % 32))[None, :]) != 0


@triton.jit
def _step(
    acc, total, top, q, keys, values, allowed, words, place, offsets_n, stride_kn, stride_vn,
    tokens, scale, channel_ok,
    MASKED: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attend to one sub-block of keys: the new accumulator, sum and maximum of each row."""
    key_at = keys + place.to(tl.int64) * stride_kn
    value_at = values + place.to(tl.int64) * stride_vn
    inside = offsets_n < tokens - place  # only a masked sub-block may reach past the last key
    k = _load(key_at, inside, channel_ok, MASKED, EVEN)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        scores = tl.where(_seen(words, offsets_n, BLOCK_N), scores, -float("inf"))
    if allowed is not None:
        may = tl.load(allowed + place + offsets_n, mask=inside, other=0)
        scores = tl.where((may != 0)[None, :], scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    v = _load(value_at, inside, channel_ok, MASKED, EVEN)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, total, new_top


@triton.jit
def attend_kernel(
    Q, K, V, OUT, LSE, ALLOWED, ORDER, STARTS, HEAD_PATTERN,
    SCHEDULE, ROW_PTR, FULL_END, PLACES, MASK_IDS, BITS,
    scale,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs,
    stride_vh,
    tokens, heads, group, tiles, parts,
    SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one tile, for one head of one batch entry.

    OUT (B, S, H, SIZE) and LSE (B, S, H) are contiguous, and so are the channels of Q, K and V.
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
    keys = K + batch * stride_kb + key_head * stride_kh
    keys += offsets_n[:, None] * stride_ks + channel[None, :]
    values = V + batch * stride_vb + key_head * stride_vh
    values += offsets_n[:, None] * stride_vs + channel[None, :]
    if ALLOWED is not None:
        ALLOWED += batch * tokens
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
    for i in tl.range(begin, middle, num_stages=STAGES):
        following = tl.load(PLACES + i + 1)
        acc, total, top = _step(
            acc, total, top, q, keys, values, ALLOWED, words, place, offsets_n, stride_ks,
            stride_vs, tokens, scale, channel_ok,
            False, SIZE == SIZE_PADDED, BLOCK_N,
        )  # fmt: skip
        place = following
    mask = tl.load(MASK_IDS + middle)
    for i in tl.range(middle, end, num_stages=STAGES):
        following = tl.load(PLACES + i + 1)
        following_mask = tl.load(MASK_IDS + i + 1)
        acc, total, top = _step(
            acc, total, top, q, keys, values, ALLOWED, words + mask * words_per_mask, place,
            offsets_n, stride_ks, stride_vs, tokens, scale, channel_ok,
            True, SIZE == SIZE_PADDED, BLOCK_N,
        )  # fmt: skip
        place = following
        mask = following_mask

    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    at = (batch * tokens + token) * heads + head
    out = (acc / total[:, None]).to(OUT.dtype.element_ty)
    tl.store(OUT + at[:, None] * SIZE + channel[None, :], out, mask=stored)
    lse = tl.where(blind, -float("inf"), (top + tl.log2(total)) * LN_2)
    tl.store(LSE + at, lse, mask=held)
