"""Means and variances of pieces of the sequence: all that most rules know of queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffpatch.kernels.block_sparse.backends import run
from diffpatch.kernels.block_sparse.operators import VIRTUAL_TOKENS
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.pieces import Pieces
from diffpatch.kernels.virtual_tokens import torch_impl


@dataclass(frozen=True, eq=False)
class Moments:
    """Of every piece, over the tokens that count, in fp32 (fp64 for fp64).

    Attributes:
        mean: (B, K, V, D).
        variance: (B, K, V, D), of each channel, about the mean.
        count: (B, V), how many tokens there are; where there are none, moments are 0.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    count: torch.Tensor

    @property
    def square(self) -> torch.Tensor:
        """The mean of the squares, which is not the square of the mean."""
        return self.variance + self.mean.square()

    def for_heads(self, heads: int) -> Moments:
        """Each head of keys once for every head of queries that reads it."""
        groups = heads // self.mean.shape[1]
        if groups == 1:
            return self
        mean, variance = (x.repeat_interleave(groups, 1) for x in (self.mean, self.variance))
        return Moments(mean, variance, self.count)


def moments(
    x: torch.Tensor,
    blocks: BlockIndex,
    pieces: Pieces,
    key_mask: torch.Tensor | None = None,
    backend: str = "auto",
) -> Moments:
    """The moments of (B, S, K, D) over pieces of its tokens.

    Args:
        x: queries, keys or values.
        blocks: the tiles that were cut.
        pieces: V of them.
        key_mask: bool (B, S), True where a token counts; None counts all.
        backend: "triton", "torch", "reference" (which is torch), or "auto".
    """

    def compute(name: str) -> Moments:
        if name != "triton":
            mean, variance, count = torch_impl.moments(x, pieces, key_mask, True)
            assert variance is not None  # they were asked for
            return Moments(mean.transpose(1, 2), variance.transpose(1, 2), count.to(mean.dtype))
        from diffpatch.kernels.virtual_tokens import triton_impl as kernels

        mean, variance, log_count = kernels.moments(x, blocks, pieces.first, key_mask)
        return Moments(mean.transpose(1, 2), variance.transpose(1, 2), log_count.exp().round())

    return run(VIRTUAL_TOKENS, backend, blocks, (x,), compute)[0]
