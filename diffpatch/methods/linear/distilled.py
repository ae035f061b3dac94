"""What linear attention can learn from dense attention: gates, feature maps, low-rank corrections.

A layer's parameters are a dictionary of tensors, any of them may be missing (see `initial`). The
form is SLA2's (arXiv 2602.12675): ``α near + (1 - α) far``, with α from a gate that starts where
one softmax over both would put it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

CORRECTED = ("q", "k", "v", "out")
LIMIT = 30.0  # of log-odds, beyond which a share is 0 or 1

Learned = Mapping[str, torch.Tensor]


def initial(
    heads: int, key_heads: int, size: int, *, features: bool, rank: int = 0, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Parameters of a layer that change nothing yet, fp32.

    Args:
        heads: H.
        key_heads: K.
        size: D, channels of a head.
        features: whether the layer has a gate (H, 3) and maps `phi_q` (H, D, D) and `phi_k`
            (K, D, D) before the features.
        rank: r of the corrections of q, k, v and the output, 0 for none: `q_down` (r, H·D) and
            `q_up` (H·D, r), and so on.
        seed: of the downward maps, which start random; the upward ones are 0.
    """
    out: dict[str, torch.Tensor] = {}
    if features:
        out["gate"] = torch.zeros(heads, 3, dtype=torch.float32)
        out["phi_q"] = _identity(heads, size)
        out["phi_k"] = _identity(key_heads, size)
    generator = torch.Generator().manual_seed(seed)
    for name in CORRECTED if rank else ():
        inner = size * (key_heads if name in ("k", "v") else heads)
        down = torch.randn(rank, inner, generator=generator, dtype=torch.float32)
        out[name + "_down"] = down * inner**-0.5
        out[name + "_up"] = torch.zeros(inner, rank, dtype=torch.float32)
    return out


def _identity(heads: int, size: int) -> torch.Tensor:
    """Queries and keys of some D^½ a channel, times 2 D^-¼, as Hedgehog starts."""
    return torch.eye(size, dtype=torch.float32).repeat(heads, 1, 1) * (2 * size**-0.25)


def corrected(x: torch.Tensor, name: str, learned: Learned) -> torch.Tensor:
    """x (B, S, H, D) plus a learned low-rank map of all its channels, if the layer has one."""
    down, up = learned.get(name + "_down"), learned.get(name + "_up")
    if down is None or up is None:
        return x
    flat = x.flatten(2)
    return x + (flat @ down.mT.to(x.dtype) @ up.mT.to(x.dtype)).unflatten(2, x.shape[2:])


def mapped(x: torch.Tensor, name: str, learned: Learned) -> torch.Tensor:
    """What the features take: x (B, S, H, D), each head by its own matrix."""
    matrix = learned.get("phi_" + name)
    if matrix is None:
        return x * (2 * x.shape[-1] ** -0.25)
    return torch.einsum("bshd,hde->bshe", x, matrix.to(x.dtype))


def mixed(
    near: torch.Tensor,
    near_lse: torch.Tensor,
    moments: torch.Tensor,
    mass: torch.Tensor,
    features: torch.Tensor,
    learned: Learned,
) -> torch.Tensor:
    """Near and far by their gates.

    The log-odds of the near part are ``exp(a) (near_lse - mass) + b`` for each head, and the far
    part is ``moments + σ(c) (features - moments)``; a, b and c start at 0.

    Args:
        near: (B, S, H, D), exact attention.
        near_lse: (B, S, H), its log-sum-exp, -inf where it saw nothing.
        moments: (B, S, H, D), the far part by its state.
        mass: (B, S, H), the estimated log-sum-exp of the far keys, -inf where there are none.
        features: (B, S, H, D), the far part by feature maps.
        learned: the layer's parameters.
    """
    gate = learned.get("gate")
    slope, offset, blend = near_lse.new_zeros(3, 1) if gate is None else gate.mT
    odds = (near_lse - mass).nan_to_num(0.0).clamp(-LIMIT, LIMIT)
    alpha = (slope.exp() * odds + offset).sigmoid()
    alpha = torch.where(near_lse.isinf(), 0.0, alpha)
    alpha = torch.where(mass.isinf(), 1.0, alpha)[..., None]
    far = moments + blend.sigmoid()[:, None] * (features - moments)
    return (near * alpha + far * (1 - alpha)).to(near.dtype)
