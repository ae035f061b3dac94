"""What virtual tokens are made of, and what they miss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.pieces import Pieces


@dataclass(frozen=True, eq=False)
class VirtualTokens:
    """Pooled keys and values of every piece.

    Attributes:
        keys: (B, V, K, D), means in the dtype of the keys.
        values: (B, V, K, D).
        variance: (B, V, K, D), of each key channel within its piece, or None.
        log_count: fp32 (B, V), log of the tokens in the piece; -inf where all are masked.
        pieces: the pieces that they stand for.
    """

    keys: torch.Tensor
    values: torch.Tensor
    variance: torch.Tensor | None
    log_count: torch.Tensor
    pieces: Pieces


class Missed(NamedTuple):
    """Exact less virtual attention of the mean query of each tile.

    Attributes:
        out: (B, H, N, D), fp32 (fp64 for fp64).
        lse: (B, H, N). Both are 0 where a tile sees no virtual token.
    """

    out: torch.Tensor
    lse: torch.Tensor

    def added(
        self, out: torch.Tensor, lse: torch.Tensor, blocks: BlockIndex
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """An attention to virtual tokens, (B, S, H, D) and (B, S, H), and what it missed."""
        tile = blocks.tile_of_place[blocks.place]
        more, longer = (x[:, :, tile].transpose(1, 2) for x in self)
        return (out + more).to(out.dtype), lse + longer
