"""Values into 8-bit floats, channel by channel, in Triton; the definition is in `levels`."""

# mypy: disable-error-code="no-untyped-def"
# (what a kernel takes and returns are Triton's values and has no Python types)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from diffpatch.kernels.block_sparse.apart import LONGEST, Apart
from diffpatch.kernels.block_sparse.fp8 import levels
from diffpatch.kernels.block_sparse.int8.levels import SMALLEST
from diffpatch.kernels.blocks import BlockIndex

ROWS = 64  # tokens of a program


def quantize_values(
    v: torch.Tensor,
    mean: torch.Tensor,
    blocks: BlockIndex,
    places: Apart,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`levels.quantize_values` as the kernel reads them, for fp32, bf16 and fp16 values.

    Tensor cores take 8-bit values with their tokens side by side, so that channels come first; and
    weights from where the product of queries and keys leaves them: a thread then holds two numbers
    of every eight, and should hold four in a row. Within 16 tokens the order is therefore not that
    of their places: token 8a + 2t + b comes at 4t + 2a + b, as weights do in `attend_kernel`.

    Args:
        v: (B, S, K, D).
        mean: fp32 (B, K, D), what is subtracted.
        blocks: the tiles.
        places: where their tokens begin.
        key_mask: bool (B, S), False for values that become 0; or None.

    Returns:
        e4m3 (B, K, D, length), 0 in the gaps, and the scale of every channel, fp32 (B, K, D).
    """
    batch, tokens, heads, size = v.shape
    v = v if v.stride(3) == 1 else v.contiguous()
    low, high = _range(v, key_mask)
    largest = torch.maximum(high.float() - mean, mean - low.float())
    scales = largest.clamp(min=SMALLEST) / levels.LARGEST
    values = torch.empty(batch, heads, size, places.length, dtype=levels.FORMAT, device=v.device)
    values[..., -LONGEST:] = 0
    allowed = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
    parts = -(-blocks.max_tile // ROWS)
    values_kernel[blocks.num_tiles * parts, batch * heads](
        v, mean, scales, values, allowed, blocks.order, blocks.starts, places.starts,
        *v.stride()[:3], tokens, places.length, heads, parts,
        ROWS=ROWS, SIZE=size, SIZE_PADDED=triton.next_power_of_2(size),
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return values, scales


def _range(v: torch.Tensor, key_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest value (B, K, D) of each channel, of the tokens that count."""
    if key_mask is None:
        low, high = v.aminmax(dim=1)
        return low, high
    hidden = ~key_mask[:, :, None, None]
    return v.masked_fill(hidden, torch.inf).amin(1), v.masked_fill(hidden, -torch.inf).amax(1)


@triton.jit
def values_kernel(
    V, MEAN, SCALES, VALUES, ALLOWED, ORDER, STARTS, PLACES,
    stride_vb, stride_vs, stride_vh, tokens, length, heads, parts,
    ROWS: tl.constexpr, SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr,
):  # fmt: skip
    """One program: ROWS values of one tile, for one head of one batch entry.

    MEAN and SCALES (B, heads, SIZE) and VALUES (B, heads, SIZE, length) are contiguous.
    """
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    tile = tl.program_id(0) // parts
    begin = tl.program_id(0) % parts * ROWS
    at = tl.arange(0, ROWS)
    of_16 = at % 16
    in_tile = begin + at - of_16 + of_16 % 4 // 2 * 8 + of_16 // 4 * 2 + of_16 % 2
    first = tl.load(STARTS + tile)
    size = tl.load(STARTS + tile + 1) - first
    held = in_tile < size
    token = tl.load(ORDER + first + in_tile, mask=held, other=0)
    channel = tl.arange(0, SIZE_PADDED)
    channel_ok = channel < SIZE
    used = held
    if ALLOWED is not None:
        used = held & (tl.load(ALLOWED + batch * tokens + token, mask=held, other=0) != 0)
    loaded = used[:, None] & channel_ok[None, :]
    from_ = V + batch * stride_vb + head.to(tl.int64) * stride_vh
    v = tl.load(from_ + token[:, None] * stride_vs + channel[None, :], mask=loaded, other=0.0)
    row = (batch * heads + head) * SIZE + channel
    mean = tl.load(MEAN + row, mask=channel_ok, other=0.0)
    scale = tl.load(SCALES + row, mask=channel_ok, other=1.0)
    v = tl.where(loaded, (v.to(tl.float32) - mean[None, :]) / scale[None, :], 0.0)
    to = VALUES + row[None, :] * length + (tl.load(PLACES + tile) + begin + at)[:, None]
    stored = (begin + at < (size + 15) // 16 * 16)[:, None] & channel_ok[None, :]
    tl.store(to, v.to(tl.float8e4nv), mask=stored)
