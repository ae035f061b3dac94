"""Two attentions of the same queries to different keys, joined by their log-sum-exps."""

from __future__ import annotations

import torch

PIECE = 1 << 16  # elements that a CPU widens at a time, so that they stay in its cache


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
    tensors = (out, a, other, b)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if out.device.type != "cpu" or out.dtype == a.dtype or needs_grad:
        return (out * a + other * b).to(out.dtype)
    return _in_pieces(*tensors)


def _in_pieces(
    out: torch.Tensor, a: torch.Tensor, other: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    """``out * a + other * b`` in the dtype of a, rounded to that of `out`, some tokens at a time.

    Widened as a whole, 16-bit outputs would cost several passes over fresh memory.
    """
    joint = torch.empty_like(out)
    tokens = max(1, PIECE // max(1, out[:, :1].numel()))
    pieces = (x.split(tokens, 1) for x in (out, a, other, b, joint))
    for x, y, z, w, target in zip(*pieces, strict=True):
        target.copy_(x.to(a.dtype).mul_(y).add_(z.to(a.dtype).mul_(w)))
    return joint
