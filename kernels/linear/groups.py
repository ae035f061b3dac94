"""Query tiles that visit the same key tiles: what linear forms of attention share among them."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass

import torch

from diffpatch.kernels.blocks import NOTHING, BlockIndex


@dataclass(frozen=True, eq=False)
class Batch:
    """Groups of equally many query tiles. Places past an end repeat a token and do not count.

    Attributes:
        rows: int64 (G, M), the queries of each group, as sequence indices.
        rows_ok: bool (G, M), which places of `rows` count.
        near: int64 (G, L), the keys that its queries visit and not every query does.
        near_ok: bool (G, L), likewise. L may be 0.
        even: whether every place counts.
    """

    rows: torch.Tensor
    rows_ok: torch.Tensor
    near: torch.Tensor
    near_ok: torch.Tensor
    even: bool


@dataclass(frozen=True, eq=False)
class Groups:
    """The query tiles of an index by the key tiles they visit, even partly.

    Attributes:
        pool: int64 (F,), the keys that some query does not visit: what a state is made of.
        batches: every query with something left to see belongs to one group of one batch.
    """

    pool: torch.Tensor
    batches: tuple[Batch, ...]


def groups(blocks: BlockIndex) -> Groups:
    """The groups of an index, made once.

    Raises:
        ValueError: heads follow different patterns.
    """
    if blocks.num_patterns > 1:
        raise ValueError(
            f"blocks has {blocks.num_patterns} patterns, linear attention takes one for all heads."
        )
    return blocks.derived("groups", _make)


def _make(blocks: BlockIndex) -> Groups:
    host = blocks.to("cpu")
    count, starts = host.num_tiles, host.starts.tolist()
    visits = host.mask_map()[0] != NOTHING
    by_all = visits.all(0)
    tokens = [host.order[a:b] for a, b in itertools.pairwise(starts)]
    members: dict[bytes, list[int]] = defaultdict(list)
    for tile in range(count):
        if not visits[tile].all():
            members[visits[tile].numpy().tobytes()].append(tile)
    sized: dict[int, list[list[int]]] = defaultdict(list)
    for tiles in members.values():
        sized[len(tiles)].append(tiles)

    def table(lists: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        joined = [torch.cat([tokens[t] for t in tiles] or [host.order[:0]]) for tiles in lists]
        longest = max(map(len, joined))
        index = torch.stack([_padded(x, longest) for x in joined])
        ok = torch.arange(longest) < torch.tensor([len(x) for x in joined])[:, None]
        return index.to(blocks.device), ok.to(blocks.device)

    batches = []
    for _, chosen in sorted(sized.items()):
        seen = [(visits[tiles[0]] & ~by_all).nonzero().flatten().tolist() for tiles in chosen]
        rows, keys = table(chosen), table(seen)
        even = bool(rows[1].all()) and bool(keys[1].all())
        batches.append(Batch(*rows, *keys, even))
    pool = [tokens[t] for t in (~by_all).nonzero().flatten().tolist()]
    return Groups(torch.cat(pool or [host.order[:0]]).to(blocks.device), tuple(batches))


def _padded(x: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat([x, x.new_zeros(length - len(x)) + (x[0] if len(x) else 0)])
