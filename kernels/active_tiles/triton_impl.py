"""Attention over active tiles as one Triton kernel, which also finds the tiles that matter.

A program owns BLOCK_M queries of one tile and one head. It walks the list of its active key tiles,
BLOCK_N keys at a time, whatever their number: lists are made on the device, so that nothing waits
for it. Keys and values are put in tile order once a call; queries and outputs stay in place.
"""

# mypy: disable-error-code="no-untyped-def"
# (what a kernel takes and returns are Triton's values and has no Python types)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from diffpatch.kernels.active_tiles.table import Result, TileTable, tile_table
from diffpatch.kernels.active_tiles.triton_lists import active_lists
from diffpatch.kernels.bits import pack_words
from diffpatch.kernels.block_sparse.gpu.triton_forward import ForwardConfig
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.gpu.common import ASYNC_TENSOR_CORE, LOG2_E, padded
from diffpatch.kernels.gpu.support import arch
from diffpatch.kernels.tile_order import in_tile_order

# A finite start of the running maximum: exp2(-inf - START) is 0 where -inf - -inf would be NaN.
START = tl.constexpr(-1.0e30)
LN_2 = tl.constexpr(0.6931471805599453)

# (bytes an element, padded head size) -> configuration, chosen so that nothing spills.
CONFIGS = {
    (2, 64): ForwardConfig(128, 64, 8, 3),
    (2, 128): ForwardConfig(128, 64, 8, 3),
    (2, 256): ForwardConfig(64, 32, 8, 2),
    (4, 64): ForwardConfig(64, 32, 8, 2),
    (4, 128): ForwardConfig(16, 32, 16, 2),
    (4, 256): ForwardConfig(32, 32, 16, 1),
}
# Other GPUs hold the operands of tensor cores in registers.
CONFIGS_SMALL = CONFIGS | {(2, 128): ForwardConfig(128, 32, 8, 3)}


def configuration(
    dtype: torch.dtype, size: int, tile: int, arch: int, strip: int | None = None
) -> ForwardConfig:
    """The configuration that ships for a dtype, head size, largest tile and compute capability.

    Args:
        dtype: of the tensors.
        size: channels of a head.
        tile: most queries of a tile.
        arch: the compute capability.
        strip: most keys of a strip; None where tiles are not cut.
    """
    table = CONFIGS if arch in ASYNC_TENSOR_CORE else CONFIGS_SMALL
    config = table[dtype.itemsize, padded(size)]
    if config.block_m == 128 and tile <= 64:
        config = config._replace(block_m=64, num_warps=4)
    if (tile if strip is None else strip) <= 32:
        config = config._replace(block_n=32)
    return config


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    active: torch.Tensor,
    scale: float,
    key_mask: torch.Tensor | None,
    threshold: float | None,
    reverse: bool,
    strip: int = 0,
) -> Result:
    """As `active_tiles.attend`, in one kernel launch; fp32, bf16 or fp16, no gradients."""
    batch, tokens, heads, size = q.shape
    table, tile = tile_table(blocks, strip), blocks.max_tile
    config = configuration(q.dtype, size, tile, arch(q.device), table.strips.longest)
    parts, subs = -(-tile // config.block_m), -(-table.strips.longest // config.block_n)
    lists, counts, at = active_lists(table, active, reverse, places=threshold is not None)
    cut = (config.block_m, config.block_n)
    places, ends, mask_ids, bits = blocks.derived(
        ("active tiles", strip, *cut), lambda _: _narrow(table, *cut)
    )
    q = q if q.stride(3) == 1 else q.contiguous()
    k, v = (in_tile_order(x, blocks) for x in (k, v))
    allowed = None if key_mask is None else in_tile_order(key_mask, blocks).view(torch.uint8)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    hits = None
    if threshold is not None:
        hits = torch.zeros(*lists.shape, parts, dtype=torch.uint8, device=q.device)
    attend_active_kernel[(blocks.num_tiles * parts, batch * heads)](
        q, k, v, out, lse, hits, allowed, blocks.order, blocks.starts, blocks.head_pattern,
        table.row_ptr, lists, counts, places, ends, mask_ids, bits,
        scale * LOG2_E, 0.0 if threshold is None else float(threshold),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        tokens, heads, heads // k.shape[2], blocks.num_tiles, parts, table.length,
        SIZE=size, SIZE_PADDED=padded(size), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        SUBS=subs, STAGES=config.num_stages,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    # The kernel notes hits in the order of its list: an address that was itself loaded would stop
    # the pipelining of its loop.
    if hits is None or at is None:
        return Result(out, lse, None)
    return Result(out, lse, hits.any(-1).gather(2, at) & active)


def _narrow(
    table: TileTable, block_m: int, block_n: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """What the kernel reads of each pair, int32 (P, E): the first place of its keys, where they
    end, and if there are partial tiles its mask, with the masks as `_words`, the last of them full.
    """
    first, masks = table.strips.first, table.masks
    places, ends = first[table.key], first[table.key + 1]
    if not len(masks):
        return places, ends, None, None
    masks = torch.cat([masks, masks.new_ones(1, *masks.shape[1:])])
    ids = torch.where(table.mask_ids < 0, len(table.masks), table.mask_ids)
    return places, ends, ids.int(), _words(masks, block_m, block_n)


def _words(masks: torch.Tensor, block_m: int, block_n: int) -> torch.Tensor:
    """Masks bool (M, T, L) as bits, int32 (M, subs, parts * block_m, block_n / 32)."""
    rows, columns = masks.shape[1:]
    grown = torch.nn.functional.pad(masks, (0, -columns % block_n, 0, -rows % block_m))
    return pack_words(grown.unflatten(2, (-1, block_n)).transpose(1, 2)).contiguous()


@triton.jit
def _seen(words, offsets_n, BLOCK_N: tl.constexpr):
    """The bits of one or two mask words a row, as booleans (rows, BLOCK_N)."""
    word = tl.load(words)[:, None]
    if BLOCK_N == 64:
        word = tl.where((offsets_n < 32)[None, :], word, tl.load(words + 1)[:, None])
    return (word & (1 << (offsets_n % 32))[None, :]) != 0


@triton.jit
def attend_active_kernel(
    Q, K, V, OUT, LSE, HITS, ALLOWED, ORDER, STARTS, HEAD_PATTERN,
    ROW_PTR, LISTS, COUNTS, PLACES, ENDS, MASK_IDS, BITS,
    scale, threshold,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs,
    stride_vh,
    tokens, heads, group, tiles, parts, length,
    SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUBS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one tile, for one head of one batch entry.

    OUT (B, S, H, SIZE) and LSE (B, S, H) are contiguous, and so are the channels of Q, K and V.
    """
    both = tl.program_id(1).to(tl.int64)
    batch = both // heads
    head = tl.program_id(1) % heads
    tile = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    pattern = 0
    if HEAD_PATTERN is not None:
        pattern = tl.load(HEAD_PATTERN + head)
    row = both * (length + 2) + tl.load(ROW_PTR + pattern * (tiles + 1) + tile)
    LISTS += row
    PLACES += pattern * length
    ENDS += pattern * length
    if BITS is not None:
        MASK_IDS += pattern * length
    if HITS is not None:
        HITS += row * parts + part
    if ALLOWED is not None:
        ALLOWED += batch * tokens

    # The queries, through the token order.
    in_tile = part * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.load(STARTS + tile)
    held = in_tile < tl.load(STARTS + tile + 1) - first
    token = tl.load(ORDER + first + in_tile, mask=held, other=0)
    channel = tl.arange(0, SIZE_PADDED)
    stored = held[:, None] & (channel < SIZE)[None, :]
    q_at = Q + batch * stride_qb + head.to(tl.int64) * stride_qh
    q = tl.load(q_at + token[:, None] * stride_qs + channel[None, :], mask=stored, other=0.0)

    offsets_n = tl.arange(0, BLOCK_N)
    key_head = (head // group).to(tl.int64)
    keys = K + batch * stride_kb + key_head * stride_kh
    keys += offsets_n[:, None] * stride_ks + channel[None, :]
    values = V + batch * stride_vb + key_head * stride_vh
    values += offsets_n[:, None] * stride_vs + channel[None, :]

    words_per_mask = parts * BLOCK_M * (BLOCK_N // 32)
    acc = tl.zeros([BLOCK_M, SIZE_PADDED], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], START, tl.float32)
    # What an iteration visits is loaded before it, and what that depends on before that: loads that
    # depend on each other in one iteration would be staged by the pipeliner, or break it.
    pair = tl.load(LISTS)
    place = tl.load(PLACES + pair)
    end = tl.load(ENDS + pair)
    mask = 0
    if BITS is not None:
        mask = tl.load(MASK_IDS + pair)
    next_pair = tl.load(LISTS + 1 // SUBS)
    for i in tl.range(0, tl.load(COUNTS + both * tiles + tile) * SUBS, num_stages=STAGES):
        following = tl.load(LISTS + (i + 2) // SUBS)
        next_place = tl.load(PLACES + next_pair) + (i + 1) % SUBS * BLOCK_N
        next_end = tl.load(ENDS + next_pair)
        if BITS is not None:
            next_mask = tl.load(MASK_IDS + next_pair)

        inside = offsets_n < end - place
        readable = inside[:, None] & (channel < SIZE)[None, :]
        k = tl.load(keys + place.to(tl.int64) * stride_ks, mask=readable, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.where(inside[None, :], scores, -float("inf"))
        if BITS is not None:
            words = BITS + (mask * SUBS + i % SUBS) * words_per_mask
            words += in_tile * (BLOCK_N // 32)
            scores = tl.where(_seen(words, offsets_n, BLOCK_N), scores, -float("inf"))
            mask = next_mask
        if ALLOWED is not None:
            may = tl.load(ALLOWED + place + offsets_n, mask=inside, other=0)
            scores = tl.where((may != 0)[None, :], scores, -float("inf"))
        peak = tl.max(scores, 1) * scale
        if HITS is not None:
            # Later sub-blocks compare with earlier ones of the same tile, which changes nothing:
            # the threshold is not above 0, so whatever raised the maximum was a hit itself.
            # Every row that hits writes the same 1 over a 0: no reduction, which Triton 3.6 cannot
            # compile here for sm_100.
            at_hit = HITS + i // SUBS * parts + tl.zeros([BLOCK_M], tl.int32)
            tl.store(at_hit, 1, mask=held & (peak - top > threshold))
        new_top = tl.maximum(top, peak)
        weights = tl.exp2(scores * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(values + place.to(tl.int64) * stride_vs, mask=readable, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
        place = next_place
        end = next_end
        next_pair = following

    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    at = (batch * tokens + token) * heads + head
    lse = tl.where(blind, -float("inf"), (top + tl.log2(total)) * LN_2)
    tl.store(LSE + at, lse, mask=held)
    out = (acc / total[:, None]).to(OUT.dtype.element_ty)
    tl.store(OUT + at[:, None] * SIZE + channel[None, :], out, mask=stored)
