"""Two attentions of the same queries to different keys, joined by their log-sum-exps."""

from __future__ import annotations

import torch


def merge(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two attentions over disjoint keys as one softmax over both.

    Args:
        out: (B, S, H, D).
        lse: natural log-sum-exp (B, S, H); -inf where nothing was seen.
        other: like out.
        other_lse: like lse.

    Returns:
        The joint output in the dtype of `out` and its log-sum-exp.
    """
    return merge_outputs(out, lse, other, other_lse), torch.logaddexp(lse, other_lse)


def merge_outputs(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> torch.Tensor:
    """The output of `merge` alone."""
    # Weights from the joint log-sum-exp are at most 1 and cannot overflow. (Not sigmoid and lerp,
    # whose vector and scalar code round differently: a head's result would depend on how many heads
    # stand beside it.)
    total = torch.logaddexp(lse, other_lse)
    safe = total.masked_fill(total == float("-inf"), 0.0)
    a, b = ((x - safe).exp()[..., None] for x in (lse, other_lse))
    return (out * a + other * b).to(out.dtype)
