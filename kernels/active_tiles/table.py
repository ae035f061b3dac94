"""The pairs of tiles that a block index visits, in a row, each of which can be switched off.

Keys can be cut finer than queries: a *strip* is a piece of a tile (see `pieces.cut`) that is
visited or left out as a whole. Large query tiles keep a kernel busy, small key tiles leave out more
at the same error.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.pieces import Pieces, cut


class Pairs(NamedTuple):
    """The pairs of a table.

    Attributes:
        query: int64 (P, E), the query tile of each pair.
        key: int64 (P, E), the strip, or tile where tiles are not cut.
        mask_ids: int64 (P, E), the row of `masks` of a partial pair, -1 for a full one.
        area: int64 (P, E), the query-key pairs of tokens in it.
    """

    query: torch.Tensor
    key: torch.Tensor
    mask_ids: torch.Tensor
    area: torch.Tensor


@dataclass(frozen=True, eq=False)
class TileTable:
    """The pairs of a query tile and a key strip: by query tile, then by strip.

    Patterns with fewer pairs than the longest are filled up with pairs of area 0.

    Attributes:
        make: makes the pairs, once they are asked for: plans of a million tokens need only what
            follows.
        length: E, flags a head.
        sizes: int64 (N,), the tokens of each query tile.
        row_ptr: int32 (P, N + 1), where the pairs of each query tile begin.
        pattern: int64 (H,), the pattern of each head, or (1,) where all heads share one.
        strips: the strips, n of them.
        masks: bool (M, T, L), element masks [query in tile, key in strip].
        complete: whether every query tile visits every strip, so that E is N * n in their order.
    """

    make: Callable[[], Pairs]
    length: int
    sizes: torch.Tensor
    row_ptr: torch.Tensor
    pattern: torch.Tensor
    strips: Pieces
    masks: torch.Tensor
    complete: bool

    @cached_property
    def pairs(self) -> Pairs:
        """All pairs."""
        return self.make()

    @property
    def query(self) -> torch.Tensor:
        """Of the pairs, as are the next three."""
        return self.pairs.query

    @property
    def key(self) -> torch.Tensor:
        return self.pairs.key

    @property
    def mask_ids(self) -> torch.Tensor:
        return self.pairs.mask_ids

    @property
    def area(self) -> torch.Tensor:
        return self.pairs.area

    @property
    def plain(self) -> bool:
        """Whether every query sees every key, so that the area of a pair is a product of sizes."""
        return self.complete and not len(self.masks)

    @property
    def num_tiles(self) -> int:
        """N, the query tiles."""
        return self.row_ptr.shape[1] - 1

    def valid(self) -> torch.Tensor:
        """bool (H or 1, E), which flags of each head mean anything."""
        if self.plain:
            return torch.ones(1, self.length, dtype=torch.bool, device=self.row_ptr.device)
        return (self.area > 0)[self.pattern]

    def flags(self, map_: torch.Tensor) -> torch.Tensor:
        """What a map (..., H, N, n) [query tile, strip] says of each pair, (..., H, E).

        Pairs that only fill up get what it says of some other pair.
        """
        flat = map_.flatten(-2)
        if self.complete:
            return flat
        place = (self.query * len(self.strips) + self.key)[self.pattern]
        return flat.gather(-1, place.expand(*flat.shape[:-1], -1))

    def map(self, flags: torch.Tensor) -> torch.Tensor:
        """The inverse: flags bool (..., H or 1, E) as bool (..., H or 1, N, n)."""
        shape = (self.num_tiles, len(self.strips))
        if self.complete:
            return flags.unflatten(-1, shape)
        # Pairs that only fill up go to a place of their own.
        everywhere = shape[0] * shape[1]
        place = self.query * shape[1] + self.key
        place = place.masked_fill(self.area == 0, everywhere)[self.pattern]
        out = flags.new_zeros(*flags.shape[:-1], everywhere + 1)
        out.scatter_(-1, place.expand_as(flags), flags)
        return out[..., :-1].unflatten(-1, shape)


def tile_table(blocks: BlockIndex, strip: int = 0) -> TileTable:
    """The table of a block index, on its device; made once.

    Args:
        blocks: the index.
        strip: most keys of a strip; 0 for whole tiles.
    """
    return blocks.derived(("tile table", strip), lambda b: _table(b, strip))


def _table(blocks: BlockIndex, strip: int) -> TileTable:
    host = blocks.to("cpu")
    patterns, tiles = host.num_patterns, host.num_tiles
    strips = cut(host, strip)
    if patterns == 1 and not len(host.masks) and len(host.cols) == tiles**2:
        return _plain(blocks, cut(blocks, strip))
    row = host.rows
    order = (row * tiles + host.cols).argsort()
    # Every pair of tiles once for each strip of its keys.
    per_tile = strips.tile.bincount(minlength=tiles)
    times = per_tile[host.cols.long()[order]]
    order = order.repeat_interleave(times)
    nth = torch.arange(len(order)) - (times.cumsum(0) - times).repeat_interleave(times)
    tile = host.cols.long()[order]
    row, key = row[order], (per_tile.cumsum(0) - per_tile)[tile] + nth
    first = strips.first.long()
    offset = first[:-1] - host.starts.long()[strips.tile]
    mask_ids, masks = _cut_masks(
        host.masks, host.mask_ids.long()[order], offset[key], first.diff()[key], strips.longest
    )
    area = host.sizes[row % tiles] * first.diff()[key]
    partial = mask_ids >= 0
    area[partial] = masks.sum((1, 2))[mask_ids[partial]]
    ends = row.bincount(minlength=patterns * tiles).cumsum(0)
    begins = torch.nn.functional.pad(ends, (1, 0))[::tiles]  # (P + 1,)
    length = int(begins.diff().max())

    def padded(values: torch.Tensor, fill: int) -> torch.Tensor:
        out = values.new_full((patterns, length), fill)
        for p, (a, b) in enumerate(itertools.pairwise(begins.tolist())):
            out[p, : b - a] = values[a:b]
        return out.to(blocks.device)

    within = torch.nn.functional.pad(ends.view(patterns, tiles) - begins[:-1, None], (1, 0))
    heads = torch.zeros(1, dtype=torch.int64) if host.head_pattern is None else host.head_pattern
    pairs = Pairs(
        padded(row % tiles, 0), padded(key, 0), padded(mask_ids, -1), padded(area, 0)
    )  # fmt: skip
    return TileTable(
        lambda: pairs, length, blocks.sizes.long(), within.int().to(blocks.device),
        heads.long().to(blocks.device), cut(blocks, strip), masks.to(blocks.device),
        complete=patterns == 1 and length == tiles * len(strips),
    )  # fmt: skip


def _plain(blocks: BlockIndex, strips: Pieces) -> TileTable:
    """The table where every query tile visits every strip, and all of it."""
    tiles, n, device = blocks.num_tiles, len(strips), blocks.device
    sizes, length = blocks.sizes.long(), strips.first.long().diff()

    def make() -> Pairs:
        number = torch.arange(tiles * n, device=device)[None]
        return Pairs(
            number // n, number % n, torch.full_like(number, -1),
            (sizes[:, None] * length).view(1, -1),
        )  # fmt: skip

    return TileTable(
        make, tiles * n, sizes, (torch.arange(tiles + 1, device=device) * n).int()[None],
        torch.zeros(1, dtype=torch.int64, device=device), strips, blocks.masks, complete=True,
    )  # fmt: skip


def _cut_masks(
    masks: torch.Tensor,
    ids: torch.Tensor,
    offset: torch.Tensor,
    size: torch.Tensor,
    longest: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of the strips: (their numbers, -1 where full; bool (M, T, longest), each once).

    Args:
        masks: bool (M, T, T), of whole tiles.
        ids: int64 (n,), the mask of each pair, -1 for none.
        offset: int64 (n,), where in its tile each strip begins.
        size: int64 (n,), how many keys it has.
        longest: the most of them.
    """
    edge = masks.shape[-1]
    if not len(masks) or longest == edge:
        return ids, masks
    partial = ids >= 0
    code = (ids * edge + offset) * (edge + 1) + size
    distinct, number = code[partial].unique(return_inverse=True)
    ids = ids.masked_scatter(partial, number)
    size = distinct % (edge + 1)
    which, offset = distinct // (edge + 1) // edge, distinct // (edge + 1) % edge
    column = torch.arange(longest)
    place = (offset[:, None] + column).clamp(max=edge - 1)
    own = masks[which].gather(2, place[:, None].expand(-1, edge, -1))
    return ids, own & (column < size[:, None])[:, None]


class Result(NamedTuple):
    """What attention over active tiles returns.

    Attributes:
        out: (B, S, H, D), 0 for queries that see nothing.
        lse: the natural log-sum-exp of each query's scores, fp32 (fp64 for fp64) (B, S, H), -inf
            for queries that see nothing.
        hits: bool (B, H, E), the active tiles that were hit, or None.
    """

    out: torch.Tensor
    lse: torch.Tensor
    hits: torch.Tensor | None
