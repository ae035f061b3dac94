"""The attention call that is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import diffpatch

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class AttentionCase:
    """The call that is measured; q, k and v are normal noise, (batch, tokens, heads, head_dim)."""

    grid: diffpatch.TokenGrid
    heads: int = 3
    head_dim: int = 64
    batch: int = 1
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0

    def tensors(self) -> Tensors:
        """q, k and v; the same on every device."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.batch, self.grid.num_tokens, self.heads, self.head_dim)
        q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
        place: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        return q.to(**place), k.to(**place), v.to(**place)

    @property
    def score_bytes(self) -> int:
        """Memory of all scores in fp32, which unfused attention needs."""
        return self.batch * self.heads * self.grid.num_tokens**2 * 4
