"""What tiles are chosen by: our rule and the published ones, each one small function.

A rule gives every pair of a query tile and a key strip a number, the larger the rather it is
computed, and says among which pairs the numbers compete: those of one row of tiles, of one head, or
of one layer. Where a paper cuts at a threshold instead of a count, `cut` says what number that is.
All rules are here as they choose tiles; tiles, dense steps and what becomes of the rest are options
of their own, and the same for all.

Others are settings of these, or cannot be. BiFormer (arXiv 2303.08810): "pooled" with the rest
dropped and strips as large as tiles. VMoBA (2506.23858): every query chooses for itself, which
leaves no tile to a kernel; "draft" once the queries of a tile choose together. HiP (2406.09827):
searches a tree for the tiles that "pooled" finds by looking at all of them. AnchorAttention
(2505.23520): cuts at a distance from the score of the first and the own tile, as "sol" does from
another anchor, and takes single keys, which strips here do not hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from diffpatch.kernels.pieces import Pieces, cut, gathered
from diffpatch.kernels.selection.limits import MOST_MASS, MOST_SPREAD
from diffpatch.kernels.selection.mass import (
    Points,
    mass,
    mass_of_points,
    one_hot,
    sampled,
    spread,
)
from diffpatch.kernels.selection.moments import Moments, moments
from diffpatch.kernels.selection.tiles import Tiles

PARTS = 4  # of a tile, in SubBlock
SAMPLED = 4  # tokens of which PSA takes one


@dataclass(frozen=True)
class Rule:
    """One way to choose tiles.

    Attributes:
        score: the call's tiles -> fp32 (B, H, N, n).
        scope: "row", "head" or "layer": among which pairs a number of tiles is chosen.
        source: where it is from.
        cut: a published threshold -> what scores have to exceed; None where there is none.
        threshold: the published one.
    """

    score: Callable[[Tiles], torch.Tensor]
    scope: str
    source: str
    cut: Callable[[float], float] | None = None
    threshold: float | None = None


def error(tiles: Tiles) -> torch.Tensor:
    """The error that leaving a strip out makes, to first order.

    Dropping: with P the mass of each strip and O_S the output without strips U, the error is
    Σ_{j∈U} P_j (O_S - o_j) exactly, hence P_j ‖v̄_j - ō‖. That takes O_S for ō, so a strip of more
    than half of the mass, which alone makes ō what it is, is in before all others. A virtual token
    has the right mass and mean to second order and misses the covariance of values and scores
    inside the strip: P_j times the spread of the scores times the spread of the values.
    """
    share = mass(tiles)
    mean = tiles.values.mean
    if tiles.options.rest == "drop":
        mean = mean - mean.mean(2, keepdim=True)  # distances stay, and cancel less
        average = share @ mean  # (B, H, N, D)
        squares = mean.square().sum(-1)[:, :, None] + average.square().sum(-1, keepdim=True)
        distance = squares.sub_(average @ mean.mT, alpha=2).clamp_(min=0).sqrt_()
        return (share * distance).masked_fill_(share > MOST_MASS, torch.inf)
    deviation = spread(tiles.queries, tiles.keys, tiles.scale).sqrt_().clamp_(max=MOST_SPREAD)
    return share.mul_(deviation).mul_(tiles.values.variance.sum(-1).sqrt()[:, :, None])


def pooled(tiles: Tiles) -> torch.Tensor:
    """The score of the mean query and the mean key."""
    return (tiles.queries.mean @ tiles.keys.mean.mT).mul_(tiles.scale)


def sol(tiles: Tiles) -> torch.Tensor:
    """The score of the means less that of the mean of all tiles, in its standard deviations."""
    alive = (tiles.keys.count > 0)[:, None, :, None]
    keys = tiles.keys.mean
    count = alive.sum(2, keepdim=True).clamp(min=1)
    centred = (keys - keys.sum(2, keepdim=True) / count) * alive
    variance = centred.square().sum(2, keepdim=True) / count  # (B, H, 1, D)
    deviation = (tiles.queries.mean.square() * variance).sum(-1, keepdim=True).sqrt()
    return (tiles.queries.mean @ centred.mT) / deviation.clamp(min=1e-30)


def subblock(tiles: Tiles) -> torch.Tensor:
    """log Σ exp of the scores of the means of four parts of either tile."""
    of_queries = cut(tiles.blocks, -(-tiles.blocks.max_tile // PARTS))
    of_keys = cut(tiles.blocks, -(-tiles.table.strips.longest // PARTS), tiles.strip)
    keys = tiles.of_keys(of_keys)
    scores = (tiles.of_queries(of_queries).mean @ keys.mean.mT).mul_(tiles.scale)
    scores.masked_fill_((keys.count == 0)[:, None, None], -torch.inf)
    scores = _log_sum_exp(scores, of_keys.whole, len(tiles.table.strips))
    return _log_sum_exp(scores.mT, of_queries.tile, tiles.table.num_tiles).mT


def sparge(tiles: Tiles) -> torch.Tensor:
    """Less the mass of a tile and all larger ones; tiles that are not alike are always in."""
    unlike_q, unlike_k = (
        (x.mean.square().sum(-1) < tiles.options.guard)
        for x in (_directions(tiles, tiles.q, True), _directions(tiles, tiles.k, False))
    )
    scores = pooled(tiles).masked_fill_(~tiles.seen | unlike_k[:, :, None], -torch.inf)
    share = scores.softmax(-1).nan_to_num_()
    before = _mass_before(share)
    always = unlike_q[..., None] | unlike_k[:, :, None]
    return (-(before + share)).masked_fill(always, torch.inf)


def xattention(tiles: Tiles) -> torch.Tensor:
    """Less the mass of all larger tiles, from sums along strided antidiagonals."""
    stride = tiles.options.stride
    of_queries, of_keys = cut(tiles.blocks, stride), cut(tiles.blocks, stride, tiles.strip)
    q, k = _strided(tiles, tiles.q, of_queries), _strided(tiles, tiles.k, of_keys)
    queries = Points(q.flip(3).flatten(3), of_queries.tile, q.new_ones(len(of_queries)))
    dead = (tiles.of_keys(of_keys).count == 0).to(k.dtype)
    keys = Points(k.flatten(3), of_keys.whole, dead.masked_fill(dead > 0, -torch.inf))
    return -_mass_before(mass_of_points(tiles, queries, keys, tiles.scale / stride))


def nabla(tiles: Tiles) -> torch.Tensor:
    """Less the mass of all larger tiles, from the scores of the means."""
    return -_mass_before(pooled(tiles).masked_fill_(~tiles.seen, -torch.inf).softmax(-1))


def psa(tiles: Tiles) -> torch.Tensor:
    """The attention between every fourth token of either tile (PSA draws them at random)."""
    of_queries, of_keys = cut(tiles.blocks, SAMPLED), cut(tiles.blocks, SAMPLED, tiles.strip)
    q, k = sampled(tiles, tiles.q, of_queries), sampled(tiles, tiles.k, of_keys)
    hidden = k.new_zeros(len(k), len(of_keys))
    if tiles.key_mask is not None:
        hidden.masked_fill_(tiles.of_keys(of_keys).count == 0, -torch.inf)
    queries = Points(q, of_queries.tile, q.new_ones(len(of_queries)))
    return mass_of_points(tiles, queries, Points(k, of_keys.whole, hidden), tiles.scale)


def _mass_before(share: torch.Tensor) -> torch.Tensor:
    """For each entry, the sum of the entries of its row that are larger, or as large and first."""
    value, order = share.nan_to_num().sort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(value).scatter_(-1, order, value.cumsum(-1) - value)


def _log_sum_exp(scores: torch.Tensor, owner: torch.Tensor, count: int) -> torch.Tensor:
    """(B, H, R, C) -> (B, H, R, count): over the columns of each owner."""
    at = owner.expand_as(scores)
    shape = (*scores.shape[:3], count)
    top = scores.new_full(shape, -torch.inf).scatter_reduce_(3, at, scores, "amax")
    safe = top.masked_fill(top == -torch.inf, 0.0)
    weights = (scores - safe.gather(3, at)).exp_()
    return (weights @ one_hot(owner, count).to(weights.dtype)).log_().add_(safe)


def _directions(tiles: Tiles, x: torch.Tensor, queries: bool) -> Moments:
    """Moments of tokens of length 1: the squared length of their mean is their mean cosine."""
    x = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
    pieces = cut(tiles.blocks) if queries else tiles.table.strips
    found = moments(x, tiles.blocks, pieces, None if queries else tiles.key_mask, "torch")
    return found.for_heads(tiles.heads)


def _strided(tiles: Tiles, x: torch.Tensor, pieces: Pieces) -> torch.Tensor:
    """(B, H, V, stride, D): the tokens of each piece, 0 past its end and where keys are hidden."""
    real = pieces.valid.expand(len(x), -1, -1)
    if x is tiles.k and tiles.key_mask is not None:
        real = real & tiles.key_mask[:, pieces.index]
    x = gathered(x, pieces).to(torch.promote_types(x.dtype, torch.float32))
    x = x.masked_fill(~real[..., None, None], 0.0).permute(0, 3, 1, 2, 4)
    x = F.pad(x, (0, 0, 0, tiles.options.stride - x.shape[3]))
    return x.repeat_interleave(tiles.heads // x.shape[1], 1)


RULES = {
    "error": Rule(error, "row", "diffpatch: the error of leaving a tile out"),
    "mass": Rule(mass, "row", "SparseD, arXiv 2509.24014, with the second order of PWT"),
    "pooled": Rule(pooled, "row", "VSA, arXiv 2505.13389; SLA, arXiv 2509.24006"),
    "sol": Rule(sol, "layer", "Sol-Attn, arXiv 2607.24027", float, 1.0),
    "subblock": Rule(subblock, "row", "SubBlock of SGLang, pull request 34148"),
    "sparge": Rule(sparge, "layer", "SpargeAttn, arXiv 2502.18137, as in xDiT", lambda c: -c, 0.92),
    "xattention": Rule(xattention, "layer", "XAttention, arXiv 2503.16428", lambda c: -c, 0.9),
    "draft": Rule(pooled, "head", "DraftAttention, arXiv 2505.14708"),
    "nabla": Rule(nabla, "layer", "NABLA, arXiv 2507.13546", lambda c: -c, 0.9),
    "psa": Rule(psa, "row", "Pyramid Sparse Attention, arXiv 2512.04025"),
}
