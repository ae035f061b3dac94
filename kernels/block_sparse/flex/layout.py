"""A block index as FlexAttention wants it: tiles filled up to whole blocks, lists of blocks.

Every tile begins a block of its own, so that a pair of blocks lies in one pair of tiles and one
element mask says all about it. What is computed for nothing in return is counted by `flex_work`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffpatch.kernels.bits import pack_words
from diffpatch.kernels.block_sparse.work import Work
from diffpatch.kernels.blocks import BlockIndex

BLOCK = 128  # queries, and keys, of a block


@dataclass(frozen=True, eq=False)
class FlexLayout:
    """The places of the padded layout, L of them in NB blocks, on the device of the index.

    Attributes:
        token: int64 (L,), the sequence index of the token at each place. What fills up a tile
            repeats its last token.
        real: bool (L,), False for what fills up.
        place: int64 (S,), the place of each token.
        tile: int32 (L,), the tile of each place.
        within: int32 (L,), where in its tile each place is.
        words: int32 (M + 2, A * 128, A * 4), the rows of `BlockIndex.mask_table` as mask words, up
            to the end of the A blocks of the largest tile.
        ids: int32 (P, N, N), the row of `words` for every pair of tiles.
        some: bool (P, NB, NB), whether any pair of a query block and a key block is kept.
        all: bool (P, NB, NB), whether every query of the tile sees every place of the key block.
    """

    token: torch.Tensor
    real: torch.Tensor
    place: torch.Tensor
    tile: torch.Tensor
    within: torch.Tensor
    words: torch.Tensor
    ids: torch.Tensor
    some: torch.Tensor
    all: torch.Tensor


def flex_layout(blocks: BlockIndex) -> FlexLayout:
    """The layout of an index; made once."""
    return blocks.derived("flex layout", _layout)


def flex_work(blocks: BlockIndex) -> Work:
    """The work of one head: blocks that are visited, padding included, and what is copied."""
    layout = flex_layout(blocks)
    visited, whole = (
        float(x.sum((1, 2)).cpu().double() @ blocks.share) * BLOCK**2
        for x in (layout.some, layout.all)
    )
    places = float(len(layout.token))
    return Work(1, places, 4 * places, visited, masked=visited - whole)


def _layout(blocks: BlockIndex) -> FlexLayout:
    host = blocks.to("cpu")
    parts = -(-host.sizes // BLOCK)
    tile = torch.arange(host.num_tiles).repeat_interleave(parts * BLOCK)
    first = (parts.cumsum(0) - parts) * BLOCK  # the first place of each tile
    within = torch.arange(len(tile)) - first[tile]
    real = within < host.sizes[tile]
    token = host.order[host.starts.long()[tile] + within.minimum(host.sizes[tile] - 1)]
    place = torch.empty(host.num_tokens, dtype=torch.int64)
    place[token[real]] = real.nonzero()[:, 0]

    table = host.mask_table()
    ids = host.mask_map() % len(table)
    of_block, part = tile[::BLOCK], within[::BLOCK] // BLOCK
    pairs = ids[:, of_block[:, None], of_block]  # (P, NB, NB)
    seen, whole = (x[pairs, part[:, None], part] for x in _cut(table))
    whole &= real.view(-1, BLOCK).all(1)
    found = FlexLayout(
        token,
        real,
        place,
        tile.int(),
        within.int(),
        pack_words(_grown(table)),
        ids.int(),
        seen,
        whole,
    )
    return FlexLayout(*(x.to(blocks.device) for x in vars(found).values()))


def _cut(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether masks (M, T, T) hold any pair, and every pair, of each block: bool (M, A, A)."""

    def blocked(grown: torch.Tensor) -> torch.Tensor:
        return grown.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))  # (M, A, 128, A, 128)

    # Past the end of a tile there is no key to see, and no query that would have to see.
    return (
        blocked(_grown(table)).any(4).any(2),
        blocked(_grown(table, rows=True)).all(4).all(2),
    )


def _grown(table: torch.Tensor, rows: bool = False) -> torch.Tensor:
    """Masks (M, T, T) up to the end of a block: no keys there, and rows that are all `rows`."""
    short = -table.shape[-1] % BLOCK
    table = torch.nn.functional.pad(table, (0, short))
    return torch.nn.functional.pad(table, (0, 0, 0, short), value=rows)
