"""Tiles that are chosen from the content of a call: what the choice costs, and what it gains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

import diffpatch
from diffpatch.eval.bench.case import Tensors
from diffpatch.eval.bench.checking import CHECKED_ROWS, TOLERANCE, attention_of_rows
from diffpatch.eval.bench.kernels.measurements import Result
from diffpatch.eval.bench.kernels.watch import Watch
from diffpatch.eval.bench.timing import dense_call, interleaved
from diffpatch.eval.medians import quartiles
from diffpatch.eval.quality.metrics import relative_l1
from diffpatch.kernels.active_tiles import api as active_tiles
from diffpatch.kernels.block_sparse.backends import choose_backend
from diffpatch.kernels.block_sparse.operators import OPERATORS
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.selection.api import select
from diffpatch.kernels.selection.choose import Counts
from diffpatch.kernels.selection.tiles import Options, Tiles
from diffpatch.kernels.virtual_tokens import api as virtual_tokens

AGREE = 0.99  # of the tiles that two backends choose: scores that are close may change places
POOL = 32  # tokens of a virtual token


@dataclass(frozen=True)
class ChosenCall:
    """An attention call, and how much of it is chosen.

    Attributes:
        grid: the tokens.
        heads: of the call.
        head_dim: channels of a head.
        kept: fraction of the strips of every row.
        tile: queries of a tile.
        strip: keys of a strip.
    """

    grid: diffpatch.TokenGrid
    heads: int
    head_dim: int
    kept: float
    tile: int = 128
    strip: int = 64


CHOICES = {
    "wan-720p": ChosenCall(diffpatch.TokenGrid(21, 45, 80), 40, 128, 0.1),
    # 64 of the blocks of 128 keys, which h3-sparse-attn chooses: 3.6 and 9.5 times as fast as dense
    # attention by its own account, on another card.
    "h3-38k": ChosenCall(diffpatch.TokenGrid(29, 26, 50), 24, 128, 0.217),
    "h3-104k": ChosenCall(diffpatch.TokenGrid(80, 26, 50), 24, 128, 0.079),
}


def measure_choice(
    choice: ChosenCall, qkv: Tensors, dense: str, repeats: int, watch: Watch
) -> Result:
    """Time the choice, attention to what it chose, and virtual tokens for the rest; checked first.

    Args:
        choice: the call.
        qkv: (1, S, H, D) each.
        dense: the call to beat, a name in `timing.DENSE`.
        repeats: rounds, in each of which everything runs once.
        watch: over every call.
    """
    q, k, v = qkv
    blocks = diffpatch.Dense(tile=choice.tile).pattern(choice.grid).on(q.device)
    table, scale = active_tiles.tile_table(blocks, choice.strip), choice.head_dim**-0.5
    shape = (table.num_tiles, len(table.strips))
    fixed = torch.zeros(1, *shape, dtype=torch.bool, device=q.device)
    number = max(1, round(choice.kept * shape[1]))
    counts = [Counts.of(torch.full((1, shape[0]), number), choice.heads).to(q.device)]

    def chosen(backend: str = "auto") -> torch.Tensor:
        tiles = Tiles(q, k, v, blocks, choice.strip, scale, None, backend, Options())
        return select(tiles, "error", fixed, counts)[0]

    with watch("choosing"):
        maps = chosen()
    flags, left = table.flags(maps), ~maps

    def attending() -> torch.Tensor:
        return active_tiles.attend(q, k, v, blocks, flags, strip=choice.strip).out

    def virtual() -> torch.Tensor:
        tokens = virtual_tokens.pool(k, v, blocks, POOL, strip=choice.strip)
        return virtual_tokens.attend_virtual(q, tokens, blocks, scale, None, shown=left)[0]

    with watch("checking"):
        agree = float((chosen("torch") & maps).sum() / maps.sum())
        rows = torch.randperm(len(q[0]), generator=torch.Generator().manual_seed(0))[:CHECKED_ROWS]
        expected = attention_of_rows(qkv, rows, _visible(maps[0], blocks, table, rows))
        error = relative_l1(attending()[0, rows.to(q.device)].to(expected.device), expected)
    checked = {"agreement": agree, "error": error}
    if not agree >= AGREE:
        return checked | {"failed": f"wrong: {agree:.1%} of the tiles are those of PyTorch"}
    if not error <= TOLERANCE[q.dtype]:  # or NaN
        return checked | {"failed": f"wrong: relative error {error:.2g}"}
    calls: dict[str, Callable[[], Any]] = {
        "dense": dense_call(dense, qkv), "choosing": chosen, "attending": attending,
        "virtual": virtual,
    }  # fmt: skip
    with watch("everything in turns"):
        times = interleaved(calls, repeats, q.device)
    return checked | {
        "tokens": choice.grid.num_tokens,
        "kept": number / shape[1],
        "seconds": {name: quartiles(found) for name, found in times.items()},
        "share": median(_ratios(times, ("choosing",), ("attending",))),
        "speedup": quartiles(_ratios(times, ("dense",), ("choosing", "attending"))),
        "speedup_with_virtual": quartiles(
            _ratios(times, ("dense",), ("choosing", "attending", "virtual"))
        ),
        "backends": {o.name: choose_backend(o, "auto", blocks, q, k, v) for o in OPERATORS},
    }


def _ratios(
    times: dict[str, list[float]], over: Sequence[str], under: Sequence[str]
) -> list[float]:
    """Sums of some calls over those of others, round by round."""
    tops, bottoms = (
        [sum(each) for each in zip(*(times[name] for name in names), strict=True)]
        for names in (over, under)
    )
    return [a / b for a, b in zip(tops, bottoms, strict=True)]


def _visible(
    maps: torch.Tensor,
    blocks: BlockIndex,
    table: active_tiles.TileTable,
    rows: torch.Tensor,
) -> torch.Tensor:
    """bool (H, R, S): the keys that some queries see, by maps (H, N, n) of strips."""

    def owners(first: torch.Tensor) -> torch.Tensor:
        owner = torch.empty_like(blocks.order)
        sizes = first.long().diff()
        owner[blocks.order] = torch.arange(len(sizes), device=first.device).repeat_interleave(sizes)
        return owner

    tile, strip = owners(blocks.starts), owners(table.strips.first)
    return maps[:, tile[rows.to(tile.device)]][:, :, strip]
