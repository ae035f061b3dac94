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
    # Only the difference is exponentiated, which cannot overflow. Where neither saw anything it is
    # NaN, and their outputs are both 0 whatever the weights.
    share = (lse - other_lse).nan_to_num(nan=0.0).sigmoid()[..., None]
    return torch.lerp(other.to(share.dtype), out.to(share.dtype), share).to(out.dtype)
