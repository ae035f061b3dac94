"""What keeps a call from being sparse: masks that models bring, and transforms of torch.func."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

# torch.func wraps tensors in ones of its own, which have no storage for kernels to read.
TRANSFORMED = "torch.func (vmap, grad, jvp) goes through the call, which only dense attention knows"
_FEATURES = 8  # kernels like head sizes that are multiples of this


@dataclass(frozen=True, eq=False)
class ModelMask:
    """What a mask says, where it can be said token by token.

    Attributes:
        keys: bool (B, S), True where a key may be attended to; None allows all.
        bias: (B, S) numbers m of an additive mask m_i·m_j, or None.
        reason: why the call must be dense, or None.
    """

    keys: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    reason: str | None = None

    def at(self, places: torch.Tensor) -> ModelMask:
        """The same about the tokens in another order, int64 (S,)."""
        keys, bias = (None if x is None else x[:, places] for x in (self.keys, self.bias))
        return ModelMask(keys, bias, self.reason)


def read_mask(k: torch.Tensor, mask: torch.Tensor | None, square: bool) -> ModelMask:
    """Take a mask apart.

    Args:
        k: the keys, (B, S, H, D).
        mask: what the model passes to its attention, or None.
        square: whether square masks of this model are products m_i·m_j of one number a token. Then
            the diagonal is m², and queries of hidden tokens may give anything: nobody sees them.
    """
    if is_transformed(k):
        return ModelMask(reason=TRANSFORMED)
    if mask is None:
        return ModelMask()
    batch, tokens = k.shape[:2]
    if mask.ndim == 4 and mask.stride(1) == mask.stride(2) == 0:  # expanded: all rows are one
        mask = mask[:, :1, :1]
    if mask.shape == (batch, tokens) and batch != tokens:  # Qwen's, up to diffusers 0.37
        mask = mask[:, None, None]
    one_a_key = mask.ndim == 4 and mask.shape[1] == 1 and mask.shape[-1] == tokens
    if one_a_key and mask.shape[2] == 1 and mask.dtype == torch.bool:
        return ModelMask(keys=mask[:, 0, 0].expand(batch, -1))
    if one_a_key and mask.shape[2] == tokens and square:
        diagonal = mask[:, 0].diagonal(dim1=-2, dim2=-1).expand(batch, -1)
        if mask.dtype == torch.bool:
            return ModelMask(keys=diagonal)
        return ModelMask(bias=diagonal.clamp(min=0).sqrt())
    return ModelMask(reason=f"the model's own mask {tuple(mask.shape)} of {mask.dtype}")


def is_transformed(tensor: torch.Tensor) -> bool:
    """Whether a transform of torch.func is going on about a tensor."""
    if torch.compiler.is_compiling():
        return False
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return wrapped


def fold_bias(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """The additive mask m_i·m_j as one more feature of the queries and keys: (q, k, v, scale).

    The output of attention grows by as many features as v does, all of them 0.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    feature = bias.to(q.dtype)[:, :, None, None]
    q = torch.cat([q, feature.expand(-1, -1, q.shape[2], 1)], -1)
    k = torch.cat([k, (feature / scale).expand(-1, -1, k.shape[2], 1)], -1)
    q, k = (F.pad(x, (0, _FEATURES - 1)) for x in (q, k))
    return q, k, F.pad(v, (0, _FEATURES)), scale
