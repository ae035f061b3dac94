"""Tile order with gaps between the tiles, in which kernels with 8-bit values find their keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffpatch.kernels.blocks import BlockIndex

ALIGNED = 16  # keys, of 8 bits: what one instruction copies
LONGEST = 64  # keys of a sub-block


@dataclass(frozen=True, eq=False)
class Apart:
    """Tile order with gaps, where every tile begins at a multiple of `ALIGNED` keys.

    Attributes:
        starts: int32 (N,), the first place of each tile, on the device of the index.
        length: places in all, `LONGEST` more than the last tile has, so that whole sub-blocks can
            be read from everywhere.
    """

    starts: torch.Tensor
    length: int


def apart(blocks: BlockIndex) -> Apart:
    """The tiles of an index with gaps between them; made once."""

    def make(index: BlockIndex) -> Apart:
        sizes = -(-index.to("cpu").sizes // ALIGNED) * ALIGNED
        starts = sizes.cumsum(0) - sizes
        return Apart(starts.int().to(index.device), int(sizes.sum()) + LONGEST)

    return blocks.derived("tiles apart", make)
