"""Attention as checkpoints were trained with it: VSA, SLA and SLA2, tile by tile as published.

All choose, for each head and tile of queries, the tiles of keys whose mean scores highest against
the mean of the queries, and add what the layer learned to make of all the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from diffpatch.errors import BadParameter
from diffpatch.kernels.active_tiles import api as active_tiles
from diffpatch.kernels.active_tiles.table import tile_table
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.methods.base import Attended, AttentionCall
from diffpatch.methods.learned.checkpoint import SLA, SLA2, VSA
from diffpatch.patterns.build import from_tiles
from diffpatch.patterns.grid import TokenGrid
from diffpatch.patterns.pattern import BlockPattern
from diffpatch.patterns.tiles import Tiling, step_cuts

KEPT = 0.1  # of the tiles, as VSA and SLA are released
CUBE = (4, 4, 4)  # VSA's tiles
RUN = 64  # tokens of a tile of SLA and SLA2, along the sequence
PAIR = 2  # tiles of theirs whose queries choose as one
_TINY = 1e-5  # added to SLA's denominator


def pattern(kind: str, grid: TokenGrid) -> BlockPattern:
    """All pairs of the tiles that a checkpoint was trained with.

    Raises:
        BadParameter: the sequence holds text, for which neither is defined.
    """
    if grid.text_before or grid.text_after:
        raise BadParameter(
            f"dynamic: weights were trained for sequences without text, and this one is {grid}"
        )
    if kind == VSA:
        sides = zip(grid.shape, CUBE, strict=True)
        time, rows, columns = (step_cuts(length, side) for length, side in sides)
        tiling = Tiling(grid, (time, rows, columns))
    else:
        line = TokenGrid(1, 1, grid.num_tokens)
        tiling = Tiling(line, ((0, 1), (0, 1), step_cuts(grid.num_tokens, RUN)))
    every = torch.ones((tiling.num_visual,) * 2, dtype=torch.bool)
    return from_tiles(grid, tiling, every)


def count(kind: str, kept: float, tiles: int) -> int:
    """How many tiles of keys a row computes; each rounds as published, and one is the least."""
    number = math.ceil(kept * tiles - 1e-9) if kind == VSA else int(kept * tiles + 1e-9)
    return min(max(number, 1), tiles)


def bounds(kind: str, pattern: BlockPattern, kept: float) -> tuple[float, float]:
    """The least and the most that a call keeps: tiles at the edges are smaller than others."""
    sizes = pattern.blocks.sizes.double().cpu().sort().values
    number = count(kind, kept, len(sizes))
    least, most = sizes[:number].sum(), sizes[-number:].sum()
    return float(least / sizes.sum()), float(most / sizes.sum())


def attend(
    kind: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, kept: float
) -> Attended:
    """One call, (B, S, H, D) in and out.

    Raises:
        BadParameter: the model hides keys, or nothing was learned.
    """
    if call.key_mask is not None:
        raise BadParameter("dynamic: weights were trained without masks, and the model brings one")
    if f"{kind}.weight" not in call.learned and kind not in call.learned:
        raise BadParameter("dynamic: weights belong to the layers of a model: use diffpatch.patch")
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    if k.shape[2] != q.shape[2]:
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    return {VSA: _vsa, SLA: _sla, SLA2: _sla2}[kind](q, k, v, call, kept, scale)


def _vsa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, kept: float,
    scale: float,
) -> Attended:  # fmt: skip
    """The fine part, over the chosen tiles, and the gated coarse one, over the means of all.

    VSA, arXiv 2505.13389, section 3: O = G ⊙ softmax(Q̄K̄ᵀ·scale) V̄ + O_fine.
    """
    blocks = call.pattern.on(q.device)
    q_, k_, v_ = (_means(x, blocks.order, blocks.starts) for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q_, k_) * scale
    fine = _chosen(q, k, v, call, scores, count(VSA, kept, blocks.num_tiles), scale)
    coarse = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v_).to(q.dtype)
    tile = torch.empty_like(blocks.order)
    tile[blocks.order] = blocks.tile_of_place.to(tile.dtype)
    return Attended(fine.out + call.learned["gate"] * coarse[:, tile], fine.kept, fine.backend)


def _sla(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, kept: float,
    scale: float,
) -> Attended:  # fmt: skip
    """Chosen tiles, and a projection of linear attention to all tokens.

    SLA, arXiv 2509.24006, as released: O = O_sparse + proj_l(O_linear), with φ the softmax over the
    channels; tiles are chosen by keys less their mean.
    """
    blocks = call.pattern.on(q.device)
    scores = _scored(q, k - k.mean(1, keepdim=True), blocks)[:, :, : blocks.num_tiles]
    near = _chosen(q, k, v, call, scores, count(SLA, kept, blocks.num_tiles), scale)
    x, y = q.softmax(-1), k.softmax(-1)
    state = torch.einsum("bshd,bshe->bhde", y, v)
    total = torch.einsum("bshd,bhd->bsh", x, y.sum(1))[..., None]
    far = torch.einsum("bshd,bhde->bshe", x, state) / (total + _TINY)
    far = linear(far, call.learned, SLA)
    return Attended(near.out + far, near.kept, near.backend)


def _sla2(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, kept: float,
    scale: float,
) -> Attended:  # fmt: skip
    """A learned mixture of the chosen tiles and linear attention to all the others.

    SLA2, arXiv 2602.12675: O = α ⊙ O_sparse + (1 - α) ⊙ O_linear, with φ the softmax over the
    channels, and α of each head and tile of 128 queries; tiles are chosen by projected means.

    Raises:
        BadParameter: α is of another number of tiles than the sequence has.
    """
    blocks = call.pattern.on(q.device)
    scores = _scored(q, k, blocks, *(call.learned[f"proj_{name}.weight"] for name in "qk"))
    scores = scores[:, :, : blocks.num_tiles]
    number = count(SLA2, kept, blocks.num_tiles)
    near = _chosen(q, k, v, call, scores, number, scale)
    left = torch.ones_like(scores).scatter_(-1, scores.topk(number, -1).indices, 0.0)
    far = _linear_rest(q.softmax(-1), k.softmax(-1), v, left, blocks)
    share = call.learned[SLA2].to(q.device)
    pairs = -(-blocks.num_tiles // PAIR)
    if share.ndim > 1 and share.shape[1] != pairs:
        raise BadParameter(
            f"dynamic: alpha is of {share.shape[1]} tiles of {PAIR * RUN} queries, and this"
            f" sequence has {pairs}: use the size that the weights were trained at"
        )
    share = share.reshape(len(share), -1).expand(-1, pairs).repeat_interleave(PAIR * RUN, 1)
    alpha = share[:, : q.shape[1]].T[..., None].to(q.dtype)
    return Attended(alpha * near.out + (1 - alpha) * far.to(q.dtype), near.kept, near.backend)


def _scored(
    q: torch.Tensor, k: torch.Tensor, blocks: BlockIndex, *projections: torch.Tensor
) -> torch.Tensor:
    """(B, H, N or one more, N): a row for each tile of queries; those of a pair are the same."""
    pairs = torch.cat([blocks.starts[:-1:PAIR], blocks.starts[-1:]])
    means = [_means(q, blocks.order, pairs), _means(k, blocks.order, blocks.starts)]
    for i, weight in enumerate(projections):
        means[i] = means[i] @ weight.to(means[i]).T
    return torch.einsum("bqhd,bkhd->bhqk", *means).repeat_interleave(PAIR, 2)


def _linear_rest(
    x: torch.Tensor, y: torch.Tensor, v: torch.Tensor, left: torch.Tensor, blocks: BlockIndex
) -> torch.Tensor:
    """(B, S, H, D): linear attention of features to the tiles of keys that a row leaves out.

    Args:
        x: features of the queries, (B, S, H, D).
        y: features of the keys.
        v: values.
        left: (B, H, N, N), 1 for those tiles and 0 for the others.
        blocks: the tiles, in the order of the sequence.
    """
    tile = blocks.tile_of_place.long()
    out = torch.empty_like(x, dtype=left.dtype)
    for head in range(x.shape[2]):  # one at a time: its states are N matrices of D × D
        keys, values = y[:, :, head].to(left.dtype), v[:, :, head].to(left.dtype)
        states = torch.zeros(len(x), blocks.num_tiles, *2 * [x.shape[3]]).to(left)
        states.index_add_(1, tile, keys[..., None] * values[..., None, :])
        sums = torch.zeros(len(x), blocks.num_tiles, x.shape[3]).to(left)
        sums.index_add_(1, tile, keys)
        rows = left[:, head, ::PAIR]
        seen = torch.einsum("bqn,bnde->bqde", rows, states), rows @ sums
        for row, at in enumerate(range(0, x.shape[1], PAIR * RUN)):
            queries = x[:, at : at + PAIR * RUN, head].to(left.dtype)
            total = (queries @ seen[1][:, row, :, None]) + _TINY
            out[:, at : at + PAIR * RUN, head] = queries @ seen[0][:, row] / total
    return out


def linear(x: torch.Tensor, learned: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """A learned projection of the last axis, in the dtype of what is projected."""
    bias = learned.get(f"{name}.bias")
    weight = learned[f"{name}.weight"].to(x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _means(x: torch.Tensor, order: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """(B, N, H, D): the mean of every piece, in at least fp32; `first` is where each begins."""
    wide = torch.promote_types(x.dtype, torch.float32)
    sizes = first.long().diff()
    piece = torch.arange(len(sizes), device=x.device)
    piece = piece.repeat_interleave(sizes, output_size=x.shape[1])  # not read from the device
    out = torch.zeros(x.shape[0], len(sizes), *x.shape[2:], dtype=wide, device=x.device)
    return out.index_add(1, piece, x[:, order].to(wide)) / sizes[:, None, None]


def _chosen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, scores: torch.Tensor,
    number: int, scale: float,
) -> Attended:  # fmt: skip
    """Attention to so many tiles of each row, those that score highest."""
    blocks: BlockIndex = call.pattern.on(q.device)
    best = scores.topk(number, -1).indices
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    flags = tile_table(blocks).flags(chosen)
    found, used = active_tiles.attend_on(q, k, v, blocks, flags, scale=scale, backend=call.backend)
    return Attended(found.out, active_tiles.kept(blocks, flags), used)
