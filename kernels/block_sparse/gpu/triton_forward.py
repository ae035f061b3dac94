"""Block-sparse attention as one Triton kernel: forward pass, for GPUs.

A program owns BLOCK_M queries of one tile and one head. It visits the key sub-blocks (BLOCK_N keys)
of its row: first those that every query sees, without any mask arithmetic, then the others, under
a bit mask. Queries and outputs stay in place. Keys and values are put in tile order once a call,
where a sub-block is one box of memory that a tensor descriptor (TMA) can fetch, or are read where
they are ("gather"), which saves the copy and costs an index for every key and visit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from diffpatch.kernels.block_sparse.apart import Apart, apart
from diffpatch.kernels.block_sparse.fp8.triton_values import quantize_values
from diffpatch.kernels.block_sparse.gpu.lists import sub_blocks
from diffpatch.kernels.block_sparse.gpu.triton_kernel import attend_kernel
from diffpatch.kernels.block_sparse.int8.levels import mean_key, mean_score
from diffpatch.kernels.block_sparse.int8.triton_keys import quantize_keys
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.gpu.common import ASYNC_TENSOR_CORE, LOG2_E, MAX_HEAD_SIZE, padded
from diffpatch.kernels.gpu.support import arch
from diffpatch.kernels.tile_order import in_tile_order

LOADS = ("auto", "pointer", "tma", "gather")
# Compute capabilities whose tensor cores sum products of 8-bit floats in fp32. Others keep 14 bits
# (SageAttention2, arXiv 2411.10958, section 3.4), or nobody has said what they keep.
EXACT_SUMS = (100,)


class ForwardConfig(NamedTuple):
    """How the kernel is cut and scheduled.

    Attributes:
        block_m: queries of a program.
        block_n: keys of a sub-block.
        num_warps: warps of a program, those that `specialize` adds not counted.
        num_stages: sub-blocks of keys and values in flight.
        loads: how keys and values are read: "pointer" and "tma" from tile order, "gather" from
            where they are.
        specialize: whether extra warps do the loading.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    loads: str = "pointer"
    specialize: bool = False


# (bytes an element, padded head size) -> configuration, chosen so that nothing spills. fp32 has no
# tensor cores at full precision and needs a small block to stay in registers.
CONFIGS = {
    (2, 64): ForwardConfig(128, 64, 4, 3),
    (2, 128): ForwardConfig(128, 64, 8, 3),
    (2, 256): ForwardConfig(64, 64, 8, 2),
    (4, 64): ForwardConfig(64, 32, 8, 2),
    (4, 128): ForwardConfig(16, 32, 8, 1),
    (4, 256): ForwardConfig(32, 32, 16, 2),
}
# Other GPUs hold the operands of tensor cores in registers; some have 99 KiB of shared memory.
CONFIGS_SMALL = CONFIGS | {
    (2, 64): ForwardConfig(128, 64, 8, 3),
    (2, 128): ForwardConfig(128, 32, 8, 3),
    (2, 256): ForwardConfig(64, 32, 8, 2),
    (4, 128): ForwardConfig(16, 32, 16, 2),
    (4, 256): ForwardConfig(32, 32, 16, 1),
}
# Compute capabilities where Triton gives loads warps of their own and nothing spills.
SPECIALIZED = (100,)


def configuration(
    dtype: torch.dtype,
    size: int,
    tile: int,
    arch: int,
    *,
    int8: bool = False,
    fp8: bool = False,
    loads: str = "auto",
    specialize: bool = False,
) -> ForwardConfig:
    """The configuration that ships for a case.

    "auto" takes tensor descriptors from compute capability 9.0 on, for 16-bit heads of 64, 128 or
    256 channels: one thread then issues a copy where all of them computed addresses, which frees 15
    to 50 registers a thread on every architecture it compiles for. Older GPUs have no such copies,
    fp32 is bound by arithmetic, and other head sizes would fetch the next head's channels.

    Args:
        dtype: of q, k and v.
        size: the head size.
        tile: the largest tile of the block index, in tokens.
        arch: the compute capability as `support.arch` gives it, 90 for 9.0.
        int8: whether scores are computed in 8 bits.
        fp8: whether values are 8-bit floats besides.
        loads: one of `LOADS`.
        specialize: whether to leave the loads to warps of their own, on `SPECIALIZED`.

    Raises:
        ValueError: the loads do not exist or cannot work in this case.
    """
    table = CONFIGS if arch in ASYNC_TENSOR_CORE else CONFIGS_SMALL
    config = table[dtype.itemsize, padded(size)]
    if int8 and table is CONFIGS_SMALL and padded(size) == 128:
        config = config._replace(block_m=64, num_warps=4)  # spills otherwise
    if int8 and arch == 100 and padded(size) == 64 and not fp8:
        config = config._replace(num_warps=8)  # as well, with Triton 3.6
    if fp8 and table is CONFIGS_SMALL:
        config = {128: config._replace(num_warps=8), 256: config._replace(block_m=32)}.get(
            padded(size), config
        )  # as well
    if config.block_m == 128 and tile <= 64:
        config = config._replace(block_m=64, num_warps=4)
    if loads not in LOADS:
        raise ValueError(f"loads is {loads!r}, expected one of {', '.join(LOADS)}.")
    if loads == "gather" and int8:
        raise ValueError("loads is 'gather', but keys are put in tile order as they are quantized.")
    boxes = arch >= 90 and size == padded(size) and dtype.itemsize == 2
    if loads == "tma" and not boxes:
        raise ValueError(
            f"loads is 'tma', which needs a GPU of compute capability 9.0 or above and 16-bit heads"
            f" of 64, 128 or 256 channels; this is {dtype}, {size} channels, {arch / 10}."
        )
    if loads == "auto":
        loads = "tma" if boxes else "pointer"
    spacious = size == config.block_m == 128 and not int8  # others spill
    if specialize and not (arch in SPECIALIZED and loads == "tma" and spacious):
        raise ValueError(
            f"specialize is for heads of 128 channels in tiles above 64 tokens, read by descriptors"
            f" on compute capability 10.0 or 10.3, not for 8-bit scores; this is {size} channels,"
            f" {tile} tokens, loads={loads!r}, {arch / 10}, {'8' if int8 else '16'}-bit scores."
        )
    if fp8 and arch == 90 and loads == "pointer" and padded(size) == 128:
        config = config._replace(block_n=32)  # spills otherwise
    return config._replace(loads=loads, specialize=specialize)


def unsupported_reason(q: torch.Tensor, blocks: BlockIndex) -> str | None:
    """Why the kernel cannot run, or None. Takes the queries (B, S, H, D) and the blocks."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the triton backend computes fp32, bf16 and fp16, and q is {q.dtype}"
    if q.shape[-1] > MAX_HEAD_SIZE:
        return f"the triton backend takes heads up to {MAX_HEAD_SIZE} channels, q has {q.shape[-1]}"
    if q.shape[0] * q.shape[2] > 65535:
        return f"batch times heads is {q.shape[0] * q.shape[2]}, a launch takes 65535"
    return None


def attend_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    scale: float,
    key_mask: torch.Tensor | None,
    return_lse: bool,
    *,
    loads: str = "auto",
    specialize: bool = False,
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
        loads: how keys and values are read, see `configuration`.
        specialize: whether extra warps do the loading, see `configuration`.

    Returns:
        The output (B, S, H, D) in the dtype of q and the natural log-sum-exp, fp32 (B, S, H).
    """
    config = _configured(q, blocks, loads, specialize=specialize)
    if config.loads == "gather":
        k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    else:
        k, v = (in_tile_order(x, blocks) for x in (k, v))
    return _launch(q, k, v, blocks, scale, key_mask, config)


def attend_triton_int8(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    scale: float,
    key_mask: torch.Tensor | None,
    return_lse: bool,
    *,
    loads: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend_triton` with q·k on 8-bit tensor cores, for bf16 and fp16; `int8.levels` says how.

    The log-sum-exp is that of the true scores, but for the rounding, and only made if asked for.
    """
    config = _configured(q, blocks, loads, int8=True)
    mean = mean_key(k, key_mask)
    keys, scales = quantize_keys(k, mean, blocks, key_mask)
    v = in_tile_order(v, blocks)
    out, lse = _launch(q, keys, v, blocks, scale, key_mask, config, Rounded(scales))
    return out, lse + mean_score(q, mean, scale) if return_lse else lse


def attend_triton_fp8(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    scale: float,
    key_mask: torch.Tensor | None,
    return_lse: bool,
    *,
    loads: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend_triton_int8` with weights and values in 8-bit floats, from compute capability 8.9 on.

    `fp8.levels` says how. The log-sum-exp is that of the scores, whatever becomes of the weights.
    """
    config = _configured(q, blocks, loads, int8=True, fp8=True)
    key, value, places = mean_key(k, key_mask), mean_key(v, key_mask), apart(blocks)
    keys, scales = quantize_keys(k, key, blocks, key_mask, places)
    values, of_channel = quantize_values(v, value, blocks, places, key_mask)
    rounded = Rounded(scales, of_channel, value, places)
    out, lse = _launch(q, keys, values, blocks, scale, key_mask, config, rounded)
    return out, lse + mean_score(q, key, scale) if return_lse else lse


class Rounded(NamedTuple):
    """What keys, and perhaps values, were rounded by, as the quantizing kernels return it.

    Attributes:
        keys: the scale of every key, or None.
        values: that of every channel of the values, or None.
        mean: the mean of the values, likewise.
        places: where rounded values lie, and their keys.
    """

    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    places: Apart | None = None


def _configured(q: torch.Tensor, blocks: BlockIndex, loads: str, **options: bool) -> ForwardConfig:
    gpu = arch(q.device)
    return configuration(q.dtype, q.shape[-1], blocks.max_tile, gpu, loads=loads, **options)


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    scale: float,
    key_mask: torch.Tensor | None,
    config: ForwardConfig,
    rounded: Rounded = Rounded(),  # noqa: B008  (a tuple of None)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel on queries in sequence order, keys and values in the order of the loads."""
    batch, tokens, heads, size = q.shape
    places = rounded.places
    lists = sub_blocks(blocks, config.block_m, config.block_n, gaps=places is not None)
    q = q if q.stride(3) == 1 else q.contiguous()
    allowed = None if key_mask is None else in_tile_order(key_mask, blocks).view(torch.uint8)
    if allowed is not None and places is not None:
        allowed = _spread(allowed, blocks, places)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    sides: Sequence[Any] = (k, v)
    if config.loads == "tma":
        sides = [_boxes(k, config, size), _boxes(v, config, size, places is not None)]
    by_token = v if places is None else v.transpose(1, 2)  # its strides, or those by channel
    grid = (blocks.num_tiles * lists.parts, batch * heads)
    attend_kernel[grid](
        q, *sides, out, lse, *rounded[:3],
        allowed, blocks.order, blocks.starts, blocks.head_pattern,
        lists.schedule, lists.row_ptr, lists.full_end, lists.places, lists.mask_ids, lists.bits,
        scale * LOG2_E,
        *q.stride()[:3], *k.stride()[:3], *by_token.stride()[:3],
        tokens, None if places is None else places.length, heads, heads // k.shape[2],
        blocks.num_tiles, lists.parts,
        SIZE=size, SIZE_PADDED=padded(size),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, STAGES=config.num_stages,
        LOADS=config.loads, SPECIALIZE=config.specialize, EXACT=arch(q.device) in EXACT_SUMS,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out, lse


def _boxes(
    x: torch.Tensor, config: ForwardConfig, size: int, channels_first: bool = False
) -> TensorDescriptor:
    """What fetches a sub-block of keys or values, or of values (B, K, D, length)."""
    if channels_first:
        return TensorDescriptor.from_tensor(x.flatten(0, 2), [size, config.block_n])
    return TensorDescriptor.from_tensor(side_by_side(x), [config.block_n, size])


def _spread(x: torch.Tensor, blocks: BlockIndex, places: Apart) -> torch.Tensor:
    """(B, S) in tile order, with 0 in the gaps: (B, length)."""

    def find(index: BlockIndex) -> torch.Tensor:
        moved = places.starts - index.starts[:-1]
        return torch.arange(index.num_tokens, device=index.device) + moved[index.tile_of_place]

    out = x.new_zeros(len(x), places.length)
    return out.index_copy_(1, blocks.derived("places apart", find), x)


def side_by_side(x: torch.Tensor) -> torch.Tensor:
    """(B, S, heads, D) as (B * S, heads * D), of which descriptors can fetch boxes: channels and
    heads side by side, rows that begin at 16 bytes; without a copy if they lie so."""
    batch, tokens, heads, size = x.shape
    flat = x.reshape(batch * tokens, heads * size)
    step = flat.stride(0) * flat.itemsize
    if flat.stride(1) != 1 or flat.stride(0) < heads * size or (step | flat.data_ptr()) % 16:
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat
