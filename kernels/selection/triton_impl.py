"""The choice of tiles on a GPU: nothing is read back, and no tensor is over pairs of tokens.

Scores are written once and read once. To keep them in registers instead would save some 0.2 % of an
attention call (see `kernels/README.md`) and tie every rule to the way it chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from diffpatch.kernels.gpu.common import padded
from diffpatch.kernels.selection.choose import Counts
from diffpatch.kernels.selection.moments import Moments
from diffpatch.kernels.selection.tiles import Tiles
from diffpatch.kernels.selection.triton_kernel import choose_kernel, drop_kernel, score_kernel

MAX_STRIPS = 1 << 12  # of a row, which one program holds
SCORED = ("error", "mass", "pooled")  # rules whose scores have a kernel


class SelectionConfig(NamedTuple):
    """Query tiles, strips and channels of a step, and warps of a program."""

    block_m: int
    block_n: int
    block_c: int
    num_warps: int
    num_stages: int


SCORES = SelectionConfig(64, 64, 16, num_warps=8, num_stages=2)
DROP = SelectionConfig(32, 32, 32, num_warps=8, num_stages=1)


def row_config(strips: int) -> SelectionConfig:
    """Of a program that chooses from a row: all of it, 8 strips a thread."""
    held = max(32, 1 << (strips - 1).bit_length())
    return SelectionConfig(1, held, 1, num_warps=max(1, held // 256), num_stages=1)


def supports(tiles: Tiles) -> bool:
    """Whether rows are short enough."""
    return len(tiles.table.strips) <= MAX_STRIPS and tiles.q.dtype != torch.float64


def scores(tiles: Tiles, rule: str) -> torch.Tensor | None:
    """fp32 (B, H, N, n), in the order of those of the rule along every row; None without a kernel.

    Scores of pairs that are not seen mean nothing.
    """
    if rule not in SCORED or (rule != "pooled" and tiles.options.piece):
        return None
    dropped = rule == "error" and tiles.options.rest == "drop"
    queries, keys = _aligned(tiles.queries), _aligned(tiles.keys)
    batch, heads, count, size = queries.mean.shape
    strips = keys.mean.shape[2]
    shape = (batch, heads, count, strips)
    out = torch.empty(shape, dtype=torch.float32, device=queries.mean.device)
    config = DROP if dropped else SCORES
    given = (
        queries.mean, queries.variance, keys.mean, keys.variance, keys.count.float().log(),
    )  # fmt: skip
    strides = (*queries.mean.stride()[:3], *keys.mean.stride()[:3])
    options = {
        "SIZE": size, "SIZE_PADDED": padded(size), "BLOCK_C": config.block_c,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    blocks = -(-count // config.block_m)
    if dropped:
        values = tiles.values.mean
        values = (values - values.mean(2, keepdim=True)).contiguous()
        seen = tiles.seen.contiguous()
        drop_kernel[(blocks, batch * heads)](
            *given, values, seen.view(torch.uint8), out, tiles.scale, *strides,
            *_strides(seen), count, strips, heads, **options,
        )  # fmt: skip
        return out
    spread = None
    if rule == "error":
        spread = tiles.values.variance.sum(-1).clamp(min=1e-37).log().mul_(0.5).contiguous()
    score_kernel[(blocks, -(-strips // config.block_n), batch * heads)](
        *given, spread, out, tiles.scale, *strides, count, strips, heads,
        PLAIN=rule == "pooled", **options,
    )  # fmt: skip
    return out


def choose(
    scores: torch.Tensor, seen: torch.Tensor, fixed: torch.Tensor, counts: Sequence[Counts]
) -> list[torch.Tensor]:
    """The best pairs of every row, as `choose.choose` with scope "row"."""
    batch, heads, tiles, strips = scores.shape
    config = row_config(strips)
    scores, seen, fixed = scores.float().contiguous(), seen.contiguous(), fixed.contiguous()
    found = []
    for count in counts:
        rows = count.rows.contiguous()
        out = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
        choose_kernel[(tiles, batch * heads)](
            scores, seen.view(torch.uint8), fixed.view(torch.uint8), rows, out.view(torch.uint8),
            *_strides(seen), _strides(fixed[None])[1], tiles if len(rows) > 1 else 0,
            tiles, strips, heads, BLOCK_N=config.block_n, num_warps=config.num_warps,
        )  # fmt: skip
        found.append(out)
    return found


def _strides(maps: torch.Tensor) -> tuple[int, int]:
    """From entry to entry and from head to head of maps (B or 1, H or 1, N, n); 0 if shared."""
    by_entry, by_head = maps.stride()[:2]
    return by_entry if maps.shape[0] > 1 else 0, by_head if maps.shape[1] > 1 else 0


def _aligned(moments: Moments) -> Moments:
    """In fp32, with one set of strides and contiguous channels."""
    mean, variance = moments.mean.float(), moments.variance.float()
    if mean.stride() != variance.stride() or mean.stride(3) != 1:
        mean, variance = mean.contiguous(), variance.contiguous()
    return Moments(mean, variance, moments.count)
