"""How much of its attention a query tile gives to each strip, estimated from fewer tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffpatch.kernels.pieces import Pieces, cut
from diffpatch.kernels.selection.moments import Moments
from diffpatch.kernels.selection.tiles import Tiles

MAX_SCORES = 1 << 25  # scores held at a time


@dataclass(frozen=True, eq=False)
class Points:
    """Few vectors that stand for many queries, or for many keys.

    Attributes:
        vectors: (B, H, R, E).
        owner: int64 (R,), the query tile, or the strip, of each.
        weight: (R,), how much each counts in its tile. Of keys: (B, R), the log of that.
    """

    vectors: torch.Tensor
    owner: torch.Tensor
    weight: torch.Tensor


def spread(queries: Moments, keys: Moments, scale: float) -> torch.Tensor:
    """The variance of the scores inside a pair of pieces: s² Σ_c mean(q_c²) var(k_c)."""
    return (queries.square @ keys.variance.mT).mul_(scale**2)


def logits(tiles: Tiles, queries: Moments, keys: Moments) -> torch.Tensor:
    """The log of the sum of exponentials of a pair of pieces, to second order, capped (PWT):
    s q̄·k̄ + min(x / 2, ln n) + ln n, x the `spread`, n the keys that count; -inf without any."""
    count = keys.count.log()[:, None, None]  # (B, 1, 1, n)
    out = torch.minimum(spread(queries, keys, tiles.scale).mul_(0.5), count.clamp(min=0))
    return out.add_(queries.mean @ keys.mean.mT, alpha=tiles.scale).add_(count)


def mass(tiles: Tiles) -> torch.Tensor:
    """(B, H, N, n): rows sum to 1 where anything is seen.

    With ``piece=0`` a tile and a strip are a point each. Otherwise they are cut into pieces of that
    many tokens; ``piece=1`` gives the mean of the softmax itself (SparseD, arXiv 2509.24014).
    """
    size = tiles.options.piece
    if not size:
        whole = logits(tiles, tiles.queries, tiles.keys)
        return whole.masked_fill_(~tiles.seen, -torch.inf).softmax(-1).nan_to_num_()
    of_queries, of_keys = cut(tiles.blocks, size), cut(tiles.blocks, size, tiles.strip)
    queries, keys = tiles.of_queries(of_queries), tiles.of_keys(of_keys)

    def scores(rows: slice) -> torch.Tensor:
        some = Moments(queries.mean[:, :, rows], queries.variance[:, :, rows], queries.count)
        return logits(tiles, some, keys)

    return _summed(tiles, scores, of_queries.tile, of_queries.first.diff(), of_keys.whole)


def mass_of_points(tiles: Tiles, queries: Points, keys: Points, scale: float) -> torch.Tensor:
    """(B, H, N, n): the softmax over points of the keys, summed by strip and averaged by tile."""

    def scores(rows: slice) -> torch.Tensor:
        found = (queries.vectors[:, :, rows] @ keys.vectors.mT).mul_(scale)
        return found.add_(keys.weight[:, None, None])

    return _summed(tiles, scores, queries.owner, queries.weight, keys.owner)


def _summed(
    tiles: Tiles,
    scores: Callable[[slice], torch.Tensor],
    query: torch.Tensor,
    weight: torch.Tensor,
    key: torch.Tensor,
) -> torch.Tensor:
    """The softmax of scores between points, summed by strip and the mean by query tile.

    Args:
        tiles: the call.
        scores: a range of the query points -> fp32 (B, H, r, C).
        query: int64 (R,), the tile of each query point.
        weight: (R,), how much it counts there.
        key: int64 (C,), the strip of each key point.
    """
    count = tiles.table.num_tiles
    to_strip = one_hot(key, len(tiles.table.strips))
    share = one_hot(query, count) * weight.float()[:, None]
    share = share / share.sum(0)
    out: torch.Tensor | None = None
    step = max(1, MAX_SCORES // (len(tiles.q) * tiles.heads * len(key)))
    for first in range(0, len(query), step):
        rows = slice(first, first + step)
        found = scores(rows)
        if not tiles.table.complete:
            found.masked_fill_(~tiles.visited[:, query[rows]][:, :, key], -torch.inf)
        weights = found.softmax(-1).nan_to_num_() @ to_strip.to(found.dtype)
        part = share[rows].T.to(found.dtype) @ weights
        out = part if out is None else out.add_(part)
    assert out is not None
    return out


def one_hot(owner: torch.Tensor, count: int) -> torch.Tensor:
    """fp32 (R, count): sums by owner as a product, whose order is the same in every run."""
    return torch.nn.functional.one_hot(owner, count).float()


def sampled(tiles: Tiles, x: torch.Tensor, pieces: Pieces) -> torch.Tensor:
    """The middle token of every piece, (B, H, V, D) in the dtype of sums."""
    size = pieces.first.diff()
    index = pieces.index.gather(1, (size // 2).long()[:, None])[:, 0]
    wide = x.index_select(1, index).to(torch.promote_types(x.dtype, torch.float32)).transpose(1, 2)
    return wide.repeat_interleave(tiles.heads // wide.shape[1], 1)
