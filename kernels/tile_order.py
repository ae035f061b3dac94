"""Tokens from the order of the sequence into tile order, and back."""

from __future__ import annotations

import torch

from diffpatch.kernels.blocks import BlockIndex


def identity_order(blocks: BlockIndex) -> bool:
    """Whether tile order is sequence order."""

    def compare(index: BlockIndex) -> bool:
        return bool((index.order == torch.arange(index.num_tokens, device=index.device)).all())

    return blocks.derived("identity order", compare)


def in_tile_order(x: torch.Tensor, blocks: BlockIndex) -> torch.Tensor:
    """Rows of (B, S, ...) in tile order; a copy only if they are not, or far apart in memory."""
    if not identity_order(blocks):
        return x.index_select(1, blocks.order)
    # Within a sub-block the kernels count in 32 bits.
    return x if x.stride(-1) == 1 and x.stride(1) < 2**24 else x.contiguous()


def in_sequence_order(x: torch.Tensor, blocks: BlockIndex) -> torch.Tensor:
    """Rows of (B, S, ...) from tile order back into the order of the sequence."""
    return x if identity_order(blocks) else x.index_select(1, blocks.place)
