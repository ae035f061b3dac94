"""Which query tiles the torch backend lets attend together: what costs least by a small model.

Keys are told apart by *classes*: the keys of a tile that every query tile sees in the same way. So
a group leaves out those keys of a partial tile that none of its queries sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from diffpatch.kernels.blocks import BlockIndex

# What SDPA costs, in units of one query-key pair of one head (measured on x86, AVX-512 and AMX):
ROW_COSTS = ((768, 1.0), (192, 1.1), (0, 1.3))  # per pair of a call of at least so many query rows
MASK_COST = 1.15  # an additive mask, per pair
KEY_COST = 100.0  # per key: gathering it, and the kernel's own preparation of it
CALL_COST = 25_000.0  # per call
MERGE_COST = 150.0  # per query row, joining two results
MAX_ROWS = 2048  # query rows of a run; more gains nothing and makes unions larger
MAX_MASK = 1 << 24  # entries of a group's mask
MAX_SEEN = 1 << 26  # (tile, key) pairs up to which keys of a tile are told apart
MAX_ORDERED = 2048  # units of tiles up to which an order of their own is sought

NOTHING, EVERYTHING = -2, -1  # what stands in a table of mask ids beside rows of `masks`

Units = list[np.ndarray]  # sets of query tiles that are never parted


@dataclass(frozen=True)
class Cut:
    """Units that attend together: to the union of their keys, or (split) to what all see and each
    on its own to the rest."""

    units: Units
    split: bool

    @property
    def tiles(self) -> np.ndarray:
        return np.concatenate(self.units)


class KeyLists:
    """What the query tiles of one pattern see.

    Attributes:
        starts: (N + 1,), the first place of each tile.
        sizes: (N,), its tokens.
        ids: int64 (N, N), rows of `masks`, or NOTHING or EVERYTHING: [query tile, key tile].
        sees: bool (N, C), whether any query of the tile sees the class.
        sees_all: bool (N, C), whether all do.
        class_of_place: int64 (S,), the class of the key at each place.
        class_sizes: fp32 (C,), its keys.
    """

    def __init__(self, blocks: BlockIndex, pattern: int, table: torch.Tensor) -> None:
        tiles = blocks.num_tiles
        self.starts = blocks.starts.numpy()
        self.sizes = np.diff(self.starts)
        row_ptr = blocks.row_ptr[pattern * tiles : (pattern + 1) * tiles + 1].numpy()
        entries = slice(row_ptr[0], row_ptr[-1])
        query_tile = np.repeat(np.arange(tiles), np.diff(row_ptr))
        self.ids = np.full((tiles, tiles), NOTHING, dtype=np.int64)
        self.ids[query_tile, blocks.cols[entries].numpy()] = blocks.mask_ids[entries].numpy()
        self._classify(table.sum(1).float().cpu().numpy())

    def _classify(self, seen_by: np.ndarray) -> None:
        """Find the classes, given how many queries see each key of a mask (M + 2, T)."""
        if self.sizes.shape[0] * int(self.starts[-1]) > MAX_SEEN:
            seen_by[:-2] = 0.5  # tell no keys of a tile apart: some are seen, not by all
        tile_of: list[int] = []
        column_of: list[int] = []
        class_of: list[np.ndarray] = []
        for tile, size in enumerate(self.sizes):
            seen = seen_by[np.unique(self.ids[:, tile]), :size]
            _, first, inverse = np.unique(seen, axis=1, return_index=True, return_inverse=True)
            class_of.append(inverse.reshape(-1) + len(tile_of))
            tile_of += [tile] * len(first)
            column_of += first.tolist()
        self.class_of_place = np.concatenate(class_of)
        self.class_sizes = np.bincount(self.class_of_place).astype(np.float32)
        self._first_class = np.searchsorted(tile_of, np.arange(len(self.sizes)))
        count = seen_by[self.ids[:, tile_of], column_of]
        self.sees = count > 0
        self.sees_all = count >= self.sizes[:, None]

    def whole(self, classes: np.ndarray) -> np.ndarray:
        """The tiles of which every class is in the set: bool (..., C) -> (..., N)."""
        tiles: np.ndarray = np.logical_and.reduceat(classes, self._first_class, axis=-1)
        return tiles

    def common(self, tiles: np.ndarray) -> np.ndarray:
        """bool (S,), the places of those key tiles that every query of some tiles sees whole."""
        return np.repeat(self.whole(self.sees_all[tiles].all(0)), self.sizes)

    def seen(self, tiles: np.ndarray, without: np.ndarray | None) -> tuple[np.ndarray, bool]:
        """The places that any of the tiles sees, and whether some of their queries do not.

        Args:
            tiles: query tiles.
            without: bool (S,), places to leave out.
        """
        sees = self.sees[tiles].any(0)
        places = sees[self.class_of_place]
        if without is not None:
            places &= ~without
            sees = np.bincount(self.class_of_place, places, len(sees)) > 0
        return places.nonzero()[0], not bool(self.sees_all[tiles][:, sees].all())


def cuts(lists: KeyLists, *, splitting: bool) -> list[Cut]:
    """Query tiles in the groups that cost least together, in the best order that was tried.

    Args:
        lists: what they see.
        splitting: whether groups may be split.
    """
    units = _same_keys(lists)
    best, cost = _cut(lists, units, splitting)
    if 2 < len(units) <= MAX_ORDERED:
        other, other_cost = _cut(lists, _chain(lists, units), splitting)
        best = other if other_cost < cost else best
    return best


def _same_keys(lists: KeyLists) -> Units:
    """Query tiles put together where all their queries see the same keys, by first tile."""
    exact = np.all(lists.sees == lists.sees_all, axis=1)
    buckets: dict[bytes | int, list[int]] = {}
    for tile, row in enumerate(lists.sees):
        buckets.setdefault(row.tobytes() if exact[tile] else tile, []).append(tile)
    units = []
    for tiles in buckets.values():
        rows = int(lists.sizes[tiles].sum())
        pieces = min(len(tiles), -(-rows // MAX_ROWS))
        units += np.array_split(np.array(tiles), pieces)
    return sorted(units, key=lambda unit: int(unit[0]))


def _chain(lists: KeyLists, units: Units) -> Units:
    """Units in an order in which each is followed by the one it shares most keys with.

    In tile order, for example, windows move along a row first, but of two windows one above the
    other, or at two times, more may be shared.
    """
    sees = np.stack([lists.sees[unit].any(0) for unit in units]).astype(np.float32)
    shared = (sees * lists.class_sizes) @ sees.T
    alike = shared / np.maximum(np.maximum.outer(shared.diagonal(), shared.diagonal()), 1.0)
    order = [0]
    alike[:, 0] = -1.0
    for _ in units[1:]:
        order.append(int(alike[order[-1]].argmax()))
        alike[:, order[-1]] = -1.0
    return [units[i] for i in order]


def _cut(lists: KeyLists, units: Units, splitting: bool) -> tuple[list[Cut], float]:
    """Cut the row of units where it costs least (dynamic programming), and what it costs."""
    count = len(units)
    costs = _run_costs(lists, units, splitting)
    best = np.full(count + 1, np.inf)
    best[0] = 0.0
    length_to = np.zeros(count + 1, dtype=np.int64)
    for end in range(1, count + 1):
        for length in range(1, min(end, len(costs)) + 1):
            total = best[end - length] + costs[length - 1].min(0)[end - length]
            if total < best[end]:
                best[end], length_to[end] = total, length
    found = []
    end = count
    while end:
        length = length_to[end]
        union, split = costs[length - 1][:, end - length]
        found.append(Cut(units[end - length : end], bool(split < union)))
        end -= length
    return found[::-1], float(best[-1])


def _run_costs(lists: KeyLists, units: Units, splitting: bool) -> list[np.ndarray]:
    """What attending runs of units costs: [length - 1][as a union or split, first unit]."""
    sees = np.stack([lists.sees[unit].any(0) for unit in units])
    sees_all = np.stack([lists.sees_all[unit].all(0) for unit in units])
    unit_rows = np.array([lists.sizes[unit].sum() for unit in units])
    union, common, rows = sees, sees_all, unit_rows
    # Sums over runs of what each unit costs alone, and of what a key less saves it.
    alone, per_key = (np.concatenate([[0.0], x.cumsum()]) for x in _alone(lists, units))
    costs: list[np.ndarray] = []
    while True:
        length = len(costs) + 1
        keys = union.astype(np.float32) @ lists.class_sizes
        masked = common.astype(np.float32) @ lists.class_sizes < keys
        together = keys * (rows * pair_cost(rows, masked) + KEY_COST) + CALL_COST
        together = np.where(keys == 0, 0.0, together)
        apart = np.full_like(together, np.inf)
        if length > 1:
            together[(rows > MAX_ROWS) | (masked & (rows * keys > MAX_MASK))] = np.inf
        if length > 1 and splitting:
            shared = lists.whole(common) @ lists.sizes
            apart = shared * (rows * pair_cost(rows) + KEY_COST) + CALL_COST + rows * MERGE_COST
            apart += alone[length:] - alone[:-length]
            apart -= shared * (per_key[length:] - per_key[:-length])
            apart[(rows > MAX_ROWS) | (shared == 0)] = np.inf
        costs.append(np.stack([together, apart]))
        if length == len(units) or not np.isfinite(costs[-1]).any():
            return costs
        union, common = union[:-1] | sees[length:], common[:-1] & sees_all[length:]
        rows = rows[:-1] + unit_rows[length:]


def _alone(lists: KeyLists, units: Units) -> tuple[np.ndarray, np.ndarray]:
    """What each unit costs without others, and for each of its keys."""
    seen = [lists.seen(unit, None) for unit in units]
    keys, masked = (np.array(x) for x in ([len(p) for p, _ in seen], [m for _, m in seen]))
    rows = np.array([lists.sizes[unit].sum() for unit in units])
    per_key = rows * pair_cost(rows, masked) + KEY_COST
    return keys * per_key + CALL_COST, per_key


def pair_cost(rows: np.ndarray, masked: np.ndarray | bool = False) -> np.ndarray:
    """What a pair costs in calls of so many query rows."""
    kinds = [rows >= least for least, _ in ROW_COSTS]
    return np.select(kinds, [cost for _, cost in ROW_COSTS]) * np.where(masked, MASK_COST, 1.0)
