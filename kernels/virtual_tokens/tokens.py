"""What virtual tokens are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffpatch.kernels.pieces import Pieces


@dataclass(frozen=True, eq=False)
class VirtualTokens:
    """Pooled keys and values of every run of tokens.

    Attributes:
        keys: (B, V, K, D), means in the dtype of the keys.
        values: (B, V, K, D).
        variance: (B, V, K, D), of each key channel within its run, or None.
        log_count: fp32 (B, V), log of the tokens a run stands for; -inf where all are masked.
        runs: the runs of tokens that they stand for.
    """

    keys: torch.Tensor
    values: torch.Tensor
    variance: torch.Tensor | None
    log_count: torch.Tensor
    runs: Pieces
