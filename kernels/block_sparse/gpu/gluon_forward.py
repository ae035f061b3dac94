"""Block-sparse attention in Gluon, for Hopper GPUs (compute capability 9.0): forward pass.

The same attention as `triton_forward`, with loads, products and softmax overlapped by hand
where Triton's own pipelining leaves tensor cores idle.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from diffpatch.kernels.bits import WORD, pack_words
from diffpatch.kernels.block_sparse.gpu import triton_forward
from diffpatch.kernels.block_sparse.gpu.gluon_kernel import (
    COMPUTING,
    LANES,
    ROWS,
    WARPGROUP,
    attend_kernel,
)
from diffpatch.kernels.block_sparse.gpu.lists import sub_blocks
from diffpatch.kernels.block_sparse.gpu.triton_forward import side_by_side
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.gpu.common import LOG2_E
from diffpatch.kernels.gpu.support import arch
from diffpatch.kernels.tile_order import in_tile_order

HOPPER = 90
TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
# Registers of a thread: what 384 threads can have when they start, and those that compute, after
# the loading warps (24) have given theirs away.
REGISTERS = 168
COMPUTING_REGISTERS = 240


class HopperConfig(NamedTuple):
    """How the kernel is cut.

    Attributes:
        block_n: keys of a sub-block, 64 or 128.
        num_stages: sub-blocks of keys and values in the ring, 2 at least.
        turns: whether the two warpgroups take turns at the tensor cores.
    """

    block_n: int
    num_stages: int
    turns: bool = True

    @property
    def block_m(self) -> int:
        """Queries of a program."""
        return int(COMPUTING.value * ROWS.value)

    @property
    def num_warps(self) -> int:
        """Warps of a program when it starts, to which others are added."""
        return int(WARPGROUP.value)


# Head size -> configuration. 128 keys make the longest products that leave enough registers; the
# ring takes what shared memory is left by the queries, up to 4 sub-blocks.
CONFIGS = {64: HopperConfig(128, 4), 128: HopperConfig(128, 2)}
CONFIG_KEY_MASK = HopperConfig(64, 4)  # with a key mask, which takes registers too, heads of 128


def configuration(size: int, key_mask: bool) -> HopperConfig:
    """The configuration that ships for a head size, with or without a key mask."""
    return CONFIG_KEY_MASK if key_mask and size == 128 else CONFIGS[size]


def lane_words(bits: torch.Tensor) -> torch.Tensor:
    """Mask words (K, rows, n / 32), a bit for every key in turn, as (K, rows, 4), one for each of
    the four threads that share a row of scores: of every 8 keys each has 2."""
    keys = torch.arange(32 * bits.shape[-1], device=bits.device)
    seen = (bits[..., keys // WORD] >> keys % WORD) & 1
    of_lane = seen.unflatten(-1, (-1, LANES.value, 2)).transpose(-2, -3).flatten(-2)
    return pack_words(of_lane).squeeze(-1)


def alternatives(size: int) -> dict[str, HopperConfig]:
    """Other configurations that fit and do not spill, to be measured beside the one that ships."""
    shipped = configuration(size, key_mask=False)
    return {
        "no turns": shipped._replace(turns=False),
        "64 keys": HopperConfig(64, 4),
        "64 keys, no turns": HopperConfig(64, 4, turns=False),
    }


def boxes(config: HopperConfig, size: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How shared memory holds the keys of a sub-block."""
    return gl.NVMMASharedLayout.get_default_for([config.block_n, size], TYPES[dtype])


def unsupported_reason(q: torch.Tensor, blocks: BlockIndex) -> str | None:
    """Why the kernel cannot run, or None. Takes the queries (B, S, H, D) and the blocks."""
    found = arch(q.device)
    if found != HOPPER:
        return f"the gluon backend is for compute capability 9.0, this GPU has {found / 10}"
    if q.dtype not in TYPES:
        return f"the gluon backend computes bf16 and fp16, and q is {q.dtype}"
    if q.shape[-1] not in CONFIGS:
        return f"the gluon backend takes heads of 64 or 128 channels, q has {q.shape[-1]}"
    if blocks.max_tile <= ROWS.value:
        return f"the gluon backend needs tiles above {ROWS.value} tokens, not {blocks.max_tile}"
    return triton_forward.unsupported_reason(q, blocks)  # a launch is as large


def attend_gluon(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    scale: float,
    key_mask: torch.Tensor | None,
    return_lse: bool,
    *,
    config: HopperConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the kept pairs in one kernel launch; without gradients.

    Args:
        q: (B, S, H, D), bf16 or fp16, D 64 or 128.
        k: (B, S, K, D), where K divides H.
        v: (B, S, K, D).
        blocks: which pairs to keep.
        scale: the factor on q·k, above 0.
        key_mask: bool (B, S), False for keys nobody may attend to, or None.
        return_lse: ignored, the log-sum-exp is always returned.
        config: in place of the one that ships.

    Returns:
        The output (B, S, H, D) in the dtype of q and the natural log-sum-exp, fp32 (B, S, H).
    """
    batch, tokens, heads, size = q.shape
    config = config or configuration(size, key_mask is not None)
    lists = sub_blocks(blocks, config.block_m, config.block_n)
    q = q if q.stride(3) == 1 else q.contiguous()
    allowed = None if key_mask is None else in_tile_order(key_mask, blocks).view(torch.uint8)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    layout = boxes(config, size, q.dtype)
    sides = [
        TensorDescriptor.from_tensor(
            side_by_side(in_tile_order(x, blocks)), [config.block_n, size], layout
        )
        for x in (k, v)
    ]
    words = blocks.derived(("lane words", config.block_n), lambda _: lane_words(lists.bits))
    grid = (blocks.num_tiles * lists.parts, batch * heads)
    attend_kernel[grid](
        q, *sides, out, lse, allowed, blocks.order, blocks.starts, blocks.head_pattern,
        lists.schedule, lists.row_ptr, lists.full_end, lists.places, lists.mask_ids, words,
        scale * LOG2_E,
        *q.stride()[:3],
        tokens, heads, heads // k.shape[2], blocks.num_tiles,
        SIZE=size, BLOCK_N=config.block_n, STAGES=config.num_stages, PARTS=lists.parts,
        TURNS=config.turns, REGISTERS=COMPUTING_REGISTERS,
        num_warps=config.num_warps, maxnreg=REGISTERS, enable_fp_fusion=True,
    )  # fmt: skip
    return out, lse
