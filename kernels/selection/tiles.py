"""What a rule may look at: the queries, keys and values of one call, cut into tiles."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from diffpatch.kernels.active_tiles.table import TileTable, tile_table
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.pieces import Pieces, cut
from diffpatch.kernels.selection.moments import Moments, moments


@dataclass(frozen=True)
class Options:
    """What rules can be told; each reads what it knows.

    Attributes:
        rest: what becomes of the tiles that are not chosen: "drop" or "virtual".
        piece: most neighbouring tokens that count as one query, and as one key; 0 for a whole tile.
        guard: self-similarity below which SpargeAttn keeps a tile in every case.
        stride: XAttention's.
    """

    rest: str = "virtual"
    piece: int = 0
    guard: float = -0.1
    stride: int = 8


@dataclass(frozen=True, eq=False)
class Tiles:
    """One call: N query tiles, n strips of keys. Maps are (B, H, N, n).

    Attributes:
        q: (B, S, H, D).
        k: (B, S, K, D), where K divides H.
        v: like k.
        blocks: the tiles.
        strip: most keys of a strip; 0 for whole tiles.
        scale: the factor on q·k.
        key_mask: bool (B, S), True where a key counts; or None.
        backend: of `moments`.
        options: what the rule was told.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    blocks: BlockIndex
    strip: int
    scale: float
    key_mask: torch.Tensor | None
    backend: str
    options: Options

    @property
    def heads(self) -> int:
        return self.q.shape[2]

    @property
    def table(self) -> TileTable:
        return tile_table(self.blocks, self.strip)

    @cached_property
    def queries(self) -> Moments:
        """Of the query tiles, (B, H, N, D)."""
        return self.of_queries(cut(self.blocks))

    @cached_property
    def keys(self) -> Moments:
        """Of the strips, (B, H, n, D)."""
        return self.of_keys(self.table.strips)

    @cached_property
    def values(self) -> Moments:
        """Of the strips, (B, H, n, D)."""
        found = moments(self.v, self.blocks, self.table.strips, self.key_mask, self.backend)
        return found.for_heads(self.heads)

    def of_queries(self, pieces: Pieces) -> Moments:
        return moments(self.q, self.blocks, pieces, None, self.backend)

    def of_keys(self, pieces: Pieces) -> Moments:
        found = moments(self.k, self.blocks, pieces, self.key_mask, self.backend)
        return found.for_heads(self.heads)

    @cached_property
    def visited(self) -> torch.Tensor:
        """bool (H or 1, N, n): what the index visits at all."""
        if self.table.complete:
            return self.q.new_ones(1, self.table.num_tiles, len(self.table.strips)).bool()
        return self.blocks.derived(
            ("visited", self.strip), lambda _: self.table.map(self.table.valid())
        )

    @cached_property
    def seen(self) -> torch.Tensor:
        """bool (B or 1, H or 1, N, n): what is visited and has keys that count."""
        if self.key_mask is None:
            return self.visited[None]
        return self.visited & (self.keys.count > 0)[:, None, None]
