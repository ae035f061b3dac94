"""Linear attention in Triton, for GPUs: a state in one pass over the keys, its use in another.

What `linear_attention` computes, with its numerics: values and keys less their mean, states in
fp32. The keys that a tile of queries visits are taken out of the state without a state of their
own: for one query, ``qᵀ (Σ k kᵀ) q`` is the sum of its squared scores and ``qᵀ Σ k vᵀ`` attention
with the scores as weights, so that nothing is stored for each tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from diffpatch.kernels.block_sparse.int8.levels import mean_key
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.gpu.common import MAX_HEAD_SIZE, padded
from diffpatch.kernels.linear.triton_kernel import apply_kernel, state_kernel
from diffpatch.kernels.tile_order import identity_order

PROGRAMS = 512  # that the first pass is cut into, some for every multiprocessor
LEAST = 512  # keys of one of them
MAX_SIZE = MAX_HEAD_SIZE  # channels, or features


class LinearConfig(NamedTuple):
    """How the kernels are cut and scheduled.

    Attributes:
        block_m: queries of a program.
        block_n: keys of a step.
        block_c: channels of the state at a time.
        num_warps: warps of a program.
        num_stages: steps in flight.
        precision: of products with fp32 states.
    """

    block_m: int
    block_n: int
    block_c: int
    num_warps: int
    num_stages: int
    precision: str


# (bytes an element, padded head size) -> configuration of the second pass.
CONFIGS = {
    (2, 64): LinearConfig(64, 32, 16, 8, 2, "tf32"),
    (2, 128): LinearConfig(32, 32, 16, 8, 2, "tf32"),
    (2, 256): LinearConfig(16, 32, 16, 8, 1, "tf32"),
    (4, 64): LinearConfig(32, 32, 16, 8, 1, "ieee"),
    (4, 128): LinearConfig(16, 16, 16, 8, 1, "ieee"),
    (4, 256): LinearConfig(16, 16, 16, 8, 1, "ieee"),
}
# Bytes an element -> configuration of the first pass: blocks of block_m × block_c of the state.
STATE_CONFIGS = {
    2: LinearConfig(64, 64, 64, 8, 2, "tf32"),
    4: LinearConfig(32, 32, 32, 4, 1, "ieee"),
}


class Near(NamedTuple):
    """What each tile of queries visits, without what all tiles visit; on the device of the index.

    Attributes:
        row_ptr: int32 (N + 1,), where each tile's pieces begin.
        places: int32 (n,), the first key of each piece, in tile order.
        lengths: int32 (n,), how many keys it has.
        pool: bool (S,), in tile order: keys that some tile does not visit.
    """

    row_ptr: torch.Tensor
    places: torch.Tensor
    lengths: torch.Tensor
    pool: torch.Tensor


def configuration(dtype: torch.dtype, size: int) -> LinearConfig:
    """The configuration of the second pass for a dtype and a number of channels up to 256."""
    return CONFIGS[dtype.itemsize, padded(size)]


def attend_cumulants(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    scale: float,
    key_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear_attention.attend_cumulants` for fp32, bf16 and fp16 heads of at most 256 channels."""
    centre = mean_key(k, key_mask)
    k, v, weight = _in_tile_order(k, v, blocks, key_mask)
    squares, _, _ = _state(k, k, centre, centre, weight)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return _apply(q, k, v, centre, weight, squares, lse, blocks, scale), lse


def attend_features(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    key_mask: torch.Tensor | None,
) -> torch.Tensor:
    """`linear_attention.attend_features`, of features φ(q) and φ(k) of at most 256 channels."""
    k, v, weight = _in_tile_order(k, v, blocks, key_mask)
    return _apply(q, k, v, None, weight, None, None, blocks, 1.0)


def _apply(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    centre_k: torch.Tensor | None,
    weight: torch.Tensor,
    squares: torch.Tensor | None,
    lse: torch.Tensor | None,
    blocks: BlockIndex,
    scale: float,
) -> torch.Tensor:
    """Both passes, given keys, values and weights (B, S) in tile order."""
    batch, tokens, heads, size = q.shape
    width = v.shape[3]
    config = configuration(q.dtype, max(size, width))
    near = blocks.derived(("near pieces", config.block_n), lambda b: _near(b, config.block_n))
    centre_v = mean_key(v, weight)
    state, key_sum, value_sum = _state(k, v, centre_k, centre_v, weight)
    q = q if q.stride(3) == 1 else q.contiguous()
    out = torch.empty(*q.shape[:3], width, dtype=q.dtype, device=q.device)
    parts = -(-blocks.max_tile // config.block_m)
    apply_kernel[(blocks.num_tiles * parts, batch * heads)](
        q, k, v, centre_k, centre_v, weight.view(torch.uint8), state, squares, key_sum, value_sum,
        weight.sum(1, dtype=torch.float32), out, lse,
        blocks.order, blocks.starts, near.row_ptr, near.places, near.lengths,
        scale, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        tokens, heads, heads // k.shape[2], parts,
        SIZE=size, SIZE_PADDED=padded(size), VALUE_SIZE=width, VALUE_PADDED=padded(width),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_C=config.block_c,
        STAGES=config.num_stages, PRECISION=config.precision,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


def _state(
    left: torch.Tensor,
    right: torch.Tensor,
    left_centre: torch.Tensor | None,
    right_centre: torch.Tensor,
    weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums over the keys that count of left ⊗ right, of left and of right, less their centres.

    Args:
        left: (B, S, K, P).
        right: (B, S, K, R).
        left_centre: fp32 (B, K, P) or None.
        right_centre: fp32 (B, K, R).
        weight: bool (B, S).

    Returns:
        fp32 (B, K, P, R), (B, K, P) and (B, K, R). They are summed in a fixed order.
    """
    batch, tokens, heads, size = left.shape
    width = right.shape[3]
    config = STATE_CONFIGS[left.element_size()]
    pieces = -(-size // config.block_m) * -(-width // config.block_c)
    splits = max(1, min(PROGRAMS // (batch * heads * pieces), tokens // LEAST))
    shape = (splits, batch, heads)
    state, left_sum, right_sum = (
        torch.empty(*shape, *rest, dtype=torch.float32, device=left.device)
        for rest in ((size, width), (size,), (width,))
    )
    state_kernel[(splits, batch * heads, pieces)](
        left, right, left_centre, right_centre, weight.view(torch.uint8),
        state, left_sum, right_sum, *left.stride()[:3], *right.stride()[:3],
        tokens, heads, -(-tokens // splits),
        LEFT_SIZE=size, RIGHT_SIZE=width, BLOCK_LEFT=config.block_m, BLOCK_RIGHT=config.block_c,
        BLOCK_N=config.block_n, STAGES=config.num_stages, PRECISION=config.precision,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return state.sum(0), left_sum.sum(0), right_sum.sum(0)


def _in_tile_order(
    k: torch.Tensor, v: torch.Tensor, blocks: BlockIndex, key_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values in tile order, and which of them count, bool (B, S)."""
    pool = blocks.derived("pool", lambda b: _near(b, 1).pool)
    weight = pool.expand(k.shape[0], -1).contiguous()
    if key_mask is not None:
        weight = weight & key_mask[:, blocks.order]
    if not identity_order(blocks):
        return k.index_select(1, blocks.order), v.index_select(1, blocks.order), weight
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    return k, v, weight


def _near(blocks: BlockIndex, block_n: int) -> Near:
    if blocks.num_patterns > 1:
        raise ValueError(
            f"blocks has {blocks.num_patterns} patterns, linear attention takes one for all heads."
        )
    host = blocks.to("cpu")
    starts, count = host.starts.long(), host.num_tiles
    by_all = host.cols.long().bincount(minlength=count) == count  # rows name a tile once
    row, col = (x[~by_all[host.cols.long()]] for x in (host.rows, host.cols.long()))
    pieces = -(-host.sizes[col] // block_n)
    row, col = row.repeat_interleave(pieces), col.repeat_interleave(pieces)
    number = torch.arange(len(col)) - (pieces.cumsum(0) - pieces).repeat_interleave(pieces)
    row_ptr = torch.zeros(count + 1, dtype=torch.int64)
    row_ptr[1:] = row.bincount(minlength=count).cumsum(0)
    places = starts[col] + number * block_n
    lengths = (starts[col + 1] - places).clamp(max=block_n)
    pool = (~by_all)[host.tile_of_place]
    lists = [x.int() for x in (row_ptr, places, lengths)]
    return Near(*(x.to(blocks.device) for x in (*lists, pool)))
