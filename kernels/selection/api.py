"""Which strips each query tile attends to exactly, from what queries, keys and values hold.

Scores are maps over pairs of tiles, never of tokens, and of some heads at a time where they are
large. They are fp32 whatever the tensors are: ties of 16 bits would favour the first tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from diffpatch.kernels.block_sparse.backends import run
from diffpatch.kernels.block_sparse.operators import SELECTION
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.selection.choose import Counts, above, choose
from diffpatch.kernels.selection.rules import RULES, Rule
from diffpatch.kernels.selection.tiles import Options, Tiles

MAX_PAIRS = 1 << 26  # entries of a map at a time
MAPS = 5  # that a rule holds at a time, about


def tile_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    scale: float,
    *,
    rule: str = "error",
    rest: str = "virtual",
    strip: int = 0,
    key_mask: torch.Tensor | None = None,
    backend: str = "auto",
    piece: int = 0,
    guard: float = -0.1,
    stride: int = 8,
) -> torch.Tensor:
    """How much each strip of keys matters to each query tile, by one of the `RULES`.

    Args:
        q: (B, S, H, D), fp32, bf16 or fp16 (torch and reference also fp64).
        k: (B, S, K, D) after any rotary embedding, where K divides H.
        v: like k.
        blocks: the tiles, and which pairs of them count at all.
        scale: the factor on q·k.
        rule: a name in `RULES`.
        rest: "drop" or "virtual", what becomes of the tiles that are not chosen ("error" only).
        strip: most keys of a strip; 0 for whole tiles.
        key_mask: bool (B, S), True where a key counts; None counts all.
        backend: "auto", "triton", "torch" or "reference" (which is torch), of the tiles' moments.
        piece: most tokens that stand for one query, and for one key; 0 for whole tiles ("mass" and
            "error").
        guard: self-similarity below which tiles are always in ("sparge").
        stride: of "xattention".

    Returns:
        fp32 (fp64 for fp64) (B, H, N, n) [query tile, strip]; anything where a pair is not seen.
    """
    options = Options(rest, piece, guard, stride)
    tiles = Tiles(q, k, v, blocks, strip, scale, key_mask, backend, options)
    return RULES[rule].score(tiles)


@torch.no_grad()
def select(
    tiles: Tiles,
    rule: str,
    fixed: torch.Tensor,
    counts: Sequence[Counts],
    threshold: float | None = None,
) -> list[torch.Tensor]:
    """The strips of every query tile, for each of some counts, the larger ones with the smaller.

    A choice has no gradients, and nothing is kept for any: under autograd, too, kernels choose.

    Args:
        tiles: the call.
        rule: a name in `RULES`.
        fixed: bool (1, N, n), or (H, N, n) if heads differ in what they visit: pairs that are in
            whatever their score.
        counts: how many to choose, for H heads.
        threshold: choose what exceeds it instead, whatever the count; the rule must have one.

    Returns:
        bool (B, H, N, n) each.
    """
    scope = RULES[rule].scope
    pairs = tiles.q.shape[0] * tiles.table.num_tiles * len(tiles.table.strips)
    groups = tiles.heads // tiles.k.shape[2]
    step = max(1, MAX_PAIRS // (pairs * groups)) * groups
    if step >= tiles.heads or scope == "layer" or tiles.blocks.head_pattern is not None:
        return _select(tiles, rule, fixed, counts, threshold)
    parts = []
    for first in range(0, tiles.heads, step):
        heads = slice(first, first + step)
        own = slice(first // groups, (first + step) // groups)
        some = replace(tiles, q=tiles.q[:, :, heads], k=tiles.k[:, :, own], v=tiles.v[:, :, own])
        limits = [Counts(count.rows[heads], count.most) for count in counts]
        parts.append(_select(some, rule, fixed, limits, threshold))
    return [torch.cat(maps, 1) for maps in zip(*parts, strict=True)]


def _select(
    tiles: Tiles,
    name: str,
    fixed: torch.Tensor,
    counts: Sequence[Counts],
    threshold: float | None,
) -> list[torch.Tensor]:
    rule = RULES[name]
    by_count = threshold is None or rule.cut is None

    def compute(backend: str) -> list[torch.Tensor]:
        if backend == "triton" and by_count and rule.scope == "row":
            from diffpatch.kernels.selection import triton_impl as kernels

            if kernels.supports(tiles):
                scores = kernels.scores(tiles, name)
                scores = rule.score(tiles) if scores is None else scores
                return kernels.choose(scores, tiles.seen, fixed, counts)
        return _select_torch(tiles, rule, fixed, counts, threshold)

    inputs = (tiles.q, tiles.k, tiles.v)
    return run(SELECTION, tiles.backend, tiles.blocks, inputs, compute)[0]


def _select_torch(
    tiles: Tiles,
    rule: Rule,
    fixed: torch.Tensor,
    counts: Sequence[Counts],
    threshold: float | None,
) -> list[torch.Tensor]:
    scores = rule.score(tiles)
    if threshold is None or rule.cut is None:
        return [choose(scores, tiles.seen, fixed, count, rule.scope) for count in counts]
    return [above(scores, tiles.seen, fixed, rule.cut(threshold))]
