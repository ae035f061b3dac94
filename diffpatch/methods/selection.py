"""What methods share that choose tiles by content: what is always in, how many, what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from diffpatch.kernels.active_tiles.table import TileTable, tile_table
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.selection.choose import Counts, bounds, bounds_by_kind, spread_counts
from diffpatch.methods.base import AttentionCall
from diffpatch.patterns.grid import Grid


def always(blocks: BlockIndex, grid: Grid, frames: int, strip: int = 0) -> torch.Tensor:
    """bool (H or 1, E): pairs of tiles that no decision leaves out.

    These are the rows and columns of text, each tile's view of itself, and the keys of the first
    `frames` frames. With `strip`, keys are cut as in `tile_table`.
    """

    def build(index: BlockIndex) -> torch.Tensor:
        table = tile_table(index, strip)
        is_text, early = grid.is_text(index.order), grid.in_first_frames(index.order, frames)
        of_keys = _any_in(is_text | early, table.strips.first)
        of_queries = _any_in(is_text, index.starts)
        if table.plain:
            own = torch.arange(table.num_tiles, device=index.device)[:, None] == table.strips.tile
            return (of_queries[:, None] | of_keys | own).view(1, -1)
        kept = of_queries[table.query] | of_keys[table.key]
        own = table.query == table.strips.tile[table.key]
        return ((kept | own) & (table.area > 0))[table.pattern]

    return blocks.derived(("always", grid, frames, strip), build)


def text_tiles(blocks: BlockIndex, grid: Grid) -> torch.Tensor:
    """bool (N,): the tiles that hold text."""
    return _any_in(grid.is_text(blocks.order), blocks.starts)


def _any_in(tokens: torch.Tensor, borders: torch.Tensor) -> torch.Tensor:
    """bool (S,) in tile order -> bool (V,): whether a piece between borders holds a True one."""
    before = torch.nn.functional.pad(tokens.long().cumsum(0), (1, 0))
    return before[borders.long()].diff() > 0


def memory(call: AttentionCall, per_branch: bool) -> dict[str, Any]:
    """Where a choice is kept: for all guidance branches, unless each chooses for itself, or has
    tokens of its own."""
    shared = call.shared
    if per_branch or shared is None:
        return call.state
    return shared if shared.get("pattern", call.pattern) is call.pattern else call.state


def remembered(
    call: AttentionCall, state: Mapping[str, Any], q: torch.Tensor
) -> torch.Tensor | None:
    """The bits of an earlier call, uint8 (B, H, ...), if they are about these tokens and heads."""
    bits = state.get("bits")
    if bits is None or state["pattern"] is not call.pattern:
        return None
    same = bits.shape[:2] == (q.shape[0], q.shape[2]) and bits.device == q.device
    return bits if same else None


@dataclass(frozen=True, eq=False)
class Levels:
    """How pairs of tiles are computed: some exactly, others by virtual tokens, or not at all.

    Level 0 is exact; the strips of level l are read as pieces of ``sizes[l]`` tokens. Each level
    takes the best that those before it left over, and what is left by all is dropped.

    Attributes:
        sizes: tokens of a piece, one a level; 1 is exact.
        counts: strips of each row in all levels so far, level by level; the last level takes all
            that is left where there is one count less than there are sizes.
        corrected: whether the mean query of each tile also looks at the keys of the last level.
    """

    sizes: tuple[int, ...]
    counts: tuple[Counts, ...]
    corrected: bool = False

    @property
    def complete(self) -> bool:
        """Whether nothing is dropped."""
        return len(self.counts) < len(self.sizes)


def shares(kept: float, quotas: tuple[tuple[int, float], ...], rest: float | None) -> list[float]:
    """The part of the strips that each level and those before it take, so that `kept` is computed.

    Args:
        kept: fraction of the pairs, a virtual token counted as one key.
        quotas: (tokens of a piece, part of the strips) of each level, to be scaled alike.
        rest: tokens of a piece of what is left over, None to drop it.

    >>> shares(0.25, ((1, 1.0),), None), shares(0.25, ((1, 1.0),), 32)
    ([0.25], [0.22580645161290322])
    """
    total = [sum(part for _, part in quotas[: n + 1]) for n in range(len(quotas))]
    sizes = [size for size, _ in quotas]

    def taken(factor: float) -> list[float]:
        return [min(1.0, factor * part) for part in total]

    def cost(factor: float) -> float:
        parts = taken(factor)
        new = [b - a for a, b in zip([0.0, *parts], parts, strict=False)]
        return sum(part / size for part, size in zip(new, sizes, strict=True)) + (
            (1 - parts[-1]) / rest if rest else 0.0
        )

    if len(quotas) == 1:  # in closed form
        least = 1 / rest if rest else 0.0
        return [min(1.0, max(0.0, (kept - least) / (1 - least)))] if least < 1 else [1.0]
    low, high = 0.0, 1 / quotas[0][1]
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) < kept else (low, middle)
    return taken(high)


def counts_of(
    table: TileTable, fixed: torch.Tensor, text: torch.Tensor, parts: torch.Tensor
) -> Counts:
    """How many strips every row takes: all of text and a part of the others, the rows in turn.

    Args:
        table: of an index where every tile visits every other, on a CPU.
        fixed: bool (1, N, n), pairs that are always in.
        text: bool (N,), the tiles of text, whose rows take everything.
        parts: fp64 (H,), the part of the visual strips that each head takes.
    """
    of_text = text[table.strips.tile]
    visual = int((~of_text).sum())
    wanted = int(of_text.sum()) + parts[:, None] * visual
    wanted = torch.where(text, float(len(of_text)), wanted)
    rows = torch.maximum(spread_counts(wanted), fixed.sum(2))
    return Counts.of(rows, len(parts))


def cost_bounds(
    table: TileTable, fixed: torch.Tensor, levels: Levels, scope: str
) -> tuple[float, float]:
    """The least and the most pairs that a choice computes, as a fraction of all pairs of a head.

    Args:
        table: on a CPU.
        fixed: bool (1, N, n).
        levels: of one head for each pattern; their sums are returned.
        scope: where counts are held.
    """
    sizes = [(size, levels.corrected and size > 1) for size in levels.sizes]
    alike = table.plain and scope == "row"
    if alike:
        lengths, kind = table.strips.first.long().diff().unique(return_inverse=True)
        prices = [price_of(table.sizes, lengths, *size) for size in sizes]
        whole = kind.bincount()
    else:
        prices, whole = [price(table, *size) for size in sizes], torch.ones(1)
    least = most = 0.0
    for number, counts in enumerate(levels.counts):
        step = prices[number]
        if number + 1 < len(prices):
            step = step - prices[number + 1]
        if alike:
            low, high = bounds_by_kind(fixed[0], counts.rows[0], kind, step)
        else:
            low, high = bounds(table, fixed, counts, scope, step)
        least, most = least + low, most + high
    if levels.complete:
        rest = float((prices[-1] * whole).sum())
        least, most = least + rest, most + rest
    pairs = int(table.strips.first[-1]) ** 2
    return least / pairs, most / pairs


def price(table: TileTable, size: int, corrected: bool = False) -> torch.Tensor:
    """fp64 (P, E): query-key pairs of each pair of tiles if keys are read in pieces of `size`, and
    if their mean query looks at the keys too where that is `corrected`."""
    length = table.strips.first.diff().long()
    if table.plain:
        return price_of(table.sizes, length, size, corrected).view(1, -1)
    pieces = -(-length // size)
    pairs = table.area.double() / length[table.key] * pieces[table.key]
    return pairs + (table.area > 0) * length[table.key] if corrected else pairs


def price_of(queries: torch.Tensor, keys: torch.Tensor, size: int, corrected: bool) -> torch.Tensor:
    """fp64 (N, n): `price` of tiles of so many queries and strips of so many keys."""
    pairs = queries.double()[:, None] * (-(-keys // size))
    return pairs + keys if corrected else pairs
