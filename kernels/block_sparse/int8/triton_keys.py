"""Keys into tile order and 8 bits in one pass, in Triton; the definition is in `levels`."""

# mypy: disable-error-code="no-untyped-def"
# (what a kernel takes and returns are Triton's values and has no Python types)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from diffpatch.kernels.block_sparse.apart import Apart
from diffpatch.kernels.block_sparse.int8 import levels
from diffpatch.kernels.blocks import BlockIndex

STRIP = tl.constexpr(levels.STRIP)
LEVELS = tl.constexpr(levels.LEVELS)
SMALLEST = tl.constexpr(levels.SMALLEST)


def quantize_keys(
    k: torch.Tensor,
    mean: torch.Tensor,
    blocks: BlockIndex,
    key_mask: torch.Tensor | None = None,
    places: Apart | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`levels.quantize_keys` in one kernel launch, for fp32, bf16 and fp16 keys.

    With `places` they lie as these say, and anything lies in the gaps.
    """
    batch, tokens, heads, size = k.shape
    starts, length = (blocks.starts, tokens) if places is None else (places.starts, places.length)
    k = k if k.stride(3) == 1 else k.contiguous()
    keys = torch.empty(batch, length, heads, size, dtype=torch.int8, device=k.device)
    scales = torch.empty(batch, heads, length, dtype=torch.float32, device=k.device)
    allowed = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
    parts = -(-blocks.max_tile // levels.STRIP)
    quantize_kernel[blocks.num_tiles * parts, batch * heads](
        k, mean, keys, scales, allowed, blocks.order, blocks.starts, starts,
        *k.stride()[:3], tokens, length, heads, parts,
        SIZE=size, SIZE_PADDED=triton.next_power_of_2(size),
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return keys, scales


@triton.jit
def quantize_kernel(
    K, MEAN, KEYS, SCALES, ALLOWED, ORDER, STARTS, PLACES,
    stride_kb, stride_ks, stride_kh, tokens, length, heads, parts,
    SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr,
):  # fmt: skip
    """One program: a strip of keys of one tile, for one head of one batch entry.

    MEAN (B, heads, SIZE), KEYS (B, length, heads, SIZE) and SCALES (B, heads, length) are
    contiguous. PLACES says where the keys of each tile begin there.
    """
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    tile = tl.program_id(0) // parts
    in_tile = tl.program_id(0) % parts * STRIP + tl.arange(0, STRIP)
    first = tl.load(STARTS + tile)
    held = in_tile < tl.load(STARTS + tile + 1) - first
    token = tl.load(ORDER + first + in_tile, mask=held, other=0)
    channel = tl.arange(0, SIZE_PADDED)
    channel_ok = channel < SIZE
    used = held
    if ALLOWED is not None:
        used = held & (tl.load(ALLOWED + batch * tokens + token, mask=held, other=0) != 0)
    loaded = used[:, None] & channel_ok[None, :]
    at = K + batch * stride_kb + head.to(tl.int64) * stride_kh
    k = tl.load(at + token[:, None] * stride_ks + channel[None, :], mask=loaded, other=0.0)
    mean = tl.load(MEAN + (batch * heads + head) * SIZE + channel, mask=channel_ok, other=0.0)
    k = tl.where(loaded, k.to(tl.float32) - mean[None, :], 0.0)
    scale = tl.maximum(tl.max(tl.max(tl.abs(k), 1), 0), SMALLEST) / LEVELS
    rounded = tl.floor(k / scale + 0.5).to(tl.int8)
    place = tl.load(PLACES + tile) + in_tile
    row = (batch * length + place) * heads + head
    stored = held[:, None] & channel_ok[None, :]
    tl.store(KEYS + row[:, None] * SIZE + channel[None, :], rounded, mask=stored)
    scales = tl.zeros([STRIP], tl.float32) + scale
    tl.store(SCALES + (batch * heads + head) * length + place, scales, mask=held)
