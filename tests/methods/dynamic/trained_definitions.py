"""Attention as VSA, SLA and SLA2 define it, token by token."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F

from diffpatch import TokenGrid


def vsa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: TokenGrid, gate: torch.Tensor,
    kept: float, scale: float,
) -> torch.Tensor:  # fmt: skip
    """VSA as in its paper, token by token: cubes of 4×4×4, the last ones smaller."""
    frames, height, width = grid.shape
    number = -(-height // 4), -(-width // 4)
    cube = torch.tensor([
        (t // 4 * number[0] + h // 4) * number[1] + w // 4
        for t, h, w in itertools.product(range(frames), range(height), range(width))
    ])  # fmt: skip
    cubes = int(cube.max()) + 1
    q_, k_, v_ = (
        torch.stack([x[:, cube == i].mean(1) for i in range(cubes)], 1) for x in (q, k, v)
    )
    scores = torch.einsum("bqhd,bkhd->bhqk", q_, k_) * scale
    coarse = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v_)[:, cube]
    best = scores.topk(math.ceil(kept * cubes), -1).indices
    seen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    mask = seen[:, :, cube][..., cube]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    fine = F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2)
    return gate * coarse + fine


def runs_seen(q_: torch.Tensor, k_: torch.Tensor, kept: float, tokens: int) -> torch.Tensor:
    """bool (B, H, S, S): the keys whose run of 64 scores highest with a query's run of 128."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q_, k_)
    best = scores.topk(max(1, int(kept * k_.shape[1])), -1).indices
    seen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    place = torch.arange(tokens)
    return seen[:, :, place // 128][..., place // 64]


def means(x: torch.Tensor, size: int) -> torch.Tensor:
    return torch.stack([piece.mean(1) for piece in x.split(size, 1)], 1)


def under(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:  # fmt: skip
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2)


def linear(weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    far = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    return far / (weights.sum(-1).transpose(1, 2)[..., None] + 1e-5)


def sla(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor,
    kept: float, scale: float,
) -> torch.Tensor:  # fmt: skip
    """SLA as it was released: runs of 128 queries and 64 keys along the sequence."""
    centred = k - k.mean(1, keepdim=True)
    mask = runs_seen(means(q, 128), means(centred, 64), kept, q.shape[1])
    weights = torch.einsum("bqhd,bkhd->bhqk", q.softmax(-1), k.softmax(-1))
    return under(q, k, v, mask, scale) + linear(weights, v) @ weight.T + bias


def sla2(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, routers: list[torch.Tensor],
    alpha: torch.Tensor, kept: float, scale: float,
) -> torch.Tensor:  # fmt: skip
    """SLA2 as in its paper, token by token: linear attention to the tiles that are left out."""
    q_, k_ = means(q, 128) @ routers[0].T, means(k, 64) @ routers[1].T
    mask = runs_seen(q_, k_, kept, q.shape[1])
    weights = torch.einsum("bqhd,bkhd->bhqk", q.softmax(-1), k.softmax(-1)) * ~mask
    share = (alpha[:, None] if alpha.ndim == 1 else alpha).expand(-1, q_.shape[1])
    share = share[:, torch.arange(q.shape[1]) // 128].T[..., None]
    return share * under(q, k, v, mask, scale) + (1 - share) * linear(weights, v)
