"""FlexAttention and NATTEN with the same mask as ours, to be measured beside the kernels."""

from __future__ import annotations

import functools
from typing import Any

import torch

from diffpatch.eval.bench.case import Tensors
from diffpatch.eval.bench.timing import Call
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.methods.base import Method
from diffpatch.methods.neighborhood import Neighborhood
from diffpatch.patterns.grid import TokenGrid

FLEX_BLOCK = 128  # queries and keys of FlexAttention's blocks


def flex_call(qkv: Tensors, blocks: BlockIndex, compiled: bool) -> Call:
    """FlexAttention over the same pairs, the permutation of the tokens included.

    Args:
        qkv: (B, S, H, D) each.
        blocks: one pattern for all heads.
        compiled: False runs it eagerly, which materializes the scores; for tests. True drops what
            else was compiled in this process.
    """
    from torch.nn.attention.flex_attention import flex_attention

    place = blocks.order.argsort()

    @functools.cache
    def prepared() -> tuple[Any, Any]:
        """The function and the mask, made in the first call: what fails there fails as this one."""
        if not compiled:
            return flex_attention, flex_mask(blocks)
        # All compiled versions count as one function's, and beyond the eighth torch would run the
        # unfused one instead; with fullgraph that would be an error.
        torch.compiler.reset()
        attend = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        return attend, flex_mask(blocks)

    def call() -> torch.Tensor:
        attend, mask = prepared()
        q, k, v = (x[:, blocks.order].transpose(1, 2) for x in qkv)
        out: torch.Tensor = attend(q, k, v, block_mask=mask)
        return out.transpose(1, 2)[:, place]

    return call


def flex_mask(blocks: BlockIndex) -> Any:
    """The pairs of a block index as FlexAttention's BlockMask, tokens in tile order.

    Its blocks are 128 consecutive tokens of that order, whatever the tiles: one that only meets
    full tiles is full, one that meets none is left out, any other looks its pairs up.
    """
    from torch.nn.attention.flex_attention import BlockMask

    tiles, edge = blocks.num_tiles, blocks.masks.shape[1]
    ends = blocks.masks.new_zeros(1, edge, edge), blocks.masks.new_ones(1, edge, edge)
    table = torch.cat([*ends, blocks.masks])  # nothing, everything, and the masks from 2 on
    # Looked up for every score of a block that is not full, so in as few bytes as can be.
    ids = torch.zeros(tiles, tiles, dtype=torch.int32, device=blocks.device)
    row = torch.arange(tiles, device=blocks.device).repeat_interleave(blocks.row_ptr.diff())
    ids[row, blocks.cols.long()] = blocks.mask_ids + 2
    start = blocks.starts.long()
    tile = torch.arange(tiles, device=blocks.device).repeat_interleave(start.diff())
    inside = (torch.arange(blocks.num_tokens, device=blocks.device) - start[tile]).int()
    tile_of = tile.int()

    def mask_mod(b: Any, h: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return table[ids[tile_of[q], tile_of[k]], inside[q], inside[k]]

    # How many pairs of tiles of each kind a block meets, by products with (blocks, tiles).
    block = torch.arange(blocks.num_tokens, device=blocks.device) // FLEX_BLOCK
    meets = torch.zeros(int(block[-1]) + 1, tiles, device=blocks.device)
    meets[block, tile] = 1.0
    some = (meets @ (ids > 0).float() @ meets.T) > 0
    full = (meets @ (ids != 1).float() @ meets.T) == 0

    def listed(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        counts = chosen.sum(1, dtype=torch.int32)[None, None]
        return counts, chosen.int().argsort(dim=1, descending=True, stable=True).int()[None, None]

    lists = (*listed(some & ~full), *listed(full))
    lengths = blocks.num_tokens, blocks.num_tokens
    return BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask_mod, seq_lengths=lengths
    )


def natten_call(qkv: Tensors, grid: TokenGrid, method: Method) -> Call | None:
    """NATTEN's operator, tokens permuted by it as it needs; None if it is not installed or knows
    no such mask: text, windows rounded to our tiles, heads or layers of their own."""
    if not isinstance(method, Neighborhood) or method.heads or method.layers:
        return None
    if method.stride == "auto" or grid.text_before or grid.text_after:
        return None
    try:
        from natten import na3d
    except ImportError:
        return None
    window = method.window if isinstance(method.window, tuple) else (method.window,) * 3
    if any(isinstance(size, float) for size in window):
        return None
    sizes = [n if size == -1 else size for size, n in zip(window, grid.shape, strict=True)]
    options: dict[str, Any] = {
        "kernel_size": tuple(sizes),
        "stride": method.stride,
        "dilation": method.dilation,
        "is_causal": method.causal,
    }

    def call() -> torch.Tensor:
        q, k, v = (x.unflatten(1, grid.shape) for x in qkv)
        out: torch.Tensor = na3d(q, k, v, **options)
        return out.flatten(1, 3)

    return call
