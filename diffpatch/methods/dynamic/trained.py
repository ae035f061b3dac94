"""Attention as checkpoints were trained with it: VSA and SLA, tile by tile as published.

Both choose, for each head and tile of queries, the tiles of keys whose mean scores highest against
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
from diffpatch.methods.learned.checkpoint import SLA, VSA
from diffpatch.patterns.build import from_tiles
from diffpatch.patterns.grid import TokenGrid
from diffpatch.patterns.pattern import BlockPattern
from diffpatch.patterns.tiles import Tiling, step_cuts

KEPT = 0.1  # of the tiles, as both are released
CUBE = (4, 4, 4)  # VSA's tiles
RUN, PAIR = (
    64,
    2,
)  # SLA's: tokens of a tile along the sequence, and tiles whose queries choose as one
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
    if f"{kind}.weight" not in call.learned:
        raise BadParameter("dynamic: weights belong to the layers of a model: use diffpatch.patch")
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    if k.shape[2] != q.shape[2]:
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    run = _vsa if kind == VSA else _sla
    return run(q, k, v, call, kept, scale)


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
    pairs = torch.cat([blocks.starts[:-1:PAIR], blocks.starts[-1:]])
    centred = k - k.mean(1, keepdim=True)
    q_, k_ = _means(q, blocks.order, pairs), _means(centred, blocks.order, blocks.starts)
    scores = torch.einsum("bqhd,bkhd->bhqk", q_, k_).repeat_interleave(PAIR, 2)
    scores = scores[:, :, : blocks.num_tiles]
    near = _chosen(q, k, v, call, scores, count(SLA, kept, blocks.num_tiles), scale)
    x, y = q.softmax(-1), k.softmax(-1)
    state = torch.einsum("bshd,bshe->bhde", y, v)
    total = torch.einsum("bshd,bhd->bsh", x, y.sum(1))[..., None]
    far = torch.einsum("bshd,bhde->bshe", x, state) / (total + _TINY)
    far = linear(far, call.learned, SLA)
    return Attended(near.out + far, near.kept, near.backend)


def linear(x: torch.Tensor, learned: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """A learned projection of the last axis, in the dtype of what is projected."""
    bias = learned.get(f"{name}.bias")
    weight = learned[f"{name}.weight"].to(x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _means(x: torch.Tensor, order: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """(B, N, H, D): the mean of every piece, in at least fp32; `first` is where each begins."""
    wide = torch.promote_types(x.dtype, torch.float32)
    sizes = first.long().diff()
    piece = torch.repeat_interleave(torch.arange(len(sizes), device=x.device), sizes)
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
