"""What virtual tokens are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
