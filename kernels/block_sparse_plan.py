"""How the torch backend cuts a block index into a few large attention calls.

SDPA is efficient on hundreds of query rows, a tile has at most 128 or so. So query tiles are put
together: first those that see exactly the same keys, then neighbours in tile order whose key lists
overlap enough that attending to the union, under a mask, costs less than attending separately.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
import torch

from diffpatch.kernels.blocks import BlockIndex

# What SDPA costs, in units of one query-key pair of one head (measured on x86, AVX-512 and AMX):
MASK_COST = 1.15  # an additive mask, per pair
KEY_COST = 200.0  # per key: gathering it, and the kernel's own preparation of it
CALL_COST = 50_000.0  # per call
MAX_ROWS = 2048  # query rows of a group; more gains nothing and makes unions larger
MAX_MASK = 1 << 24  # entries of a group's mask
MAX_SEEN = 1 << 26  # (tile, key) pairs up to which keys of a tile are told apart
MAX_STACKED_KEYS = 2048  # keys of a call that stacks several groups

NOTHING, EVERYTHING = -2, -1  # what stands in a table of mask ids beside rows of `masks`


@dataclass(frozen=True, eq=False)
class TileMask:
    """A group's mask, kept as tile numbers until it is needed.

    Attributes:
        ids: int64 (query tiles, key tiles): rows of `masks`, or NOTHING or EVERYTHING.
        rows: int64, which of the query tiles' T rows are the group's; None: all of them.
        keys: int64, the same for the columns of the key tiles.
        blind: bool (query rows,), the rows that see no key at all; None: there are none.
    """

    ids: torch.Tensor
    rows: torch.Tensor | None
    keys: torch.Tensor | None
    blind: torch.Tensor | None

    def expand(self, table: torch.Tensor) -> torch.Tensor:
        """The mask in full.

        Args:
            table: (M + 2, T, T), `masks` in any form, with nothing and everything appended.

        Returns:
            (query rows, keys) in the dtype of the table.
        """
        height, width = self.ids.shape
        edge = table.shape[-1]
        full = table[self.ids].transpose(1, 2).reshape(height * edge, width * edge)
        full = full if self.rows is None else full[self.rows]
        return full if self.keys is None else full[:, self.keys]


@dataclass(frozen=True, eq=False)
class Call:
    """One attention call over `stack` groups of the same shape.

    Attributes:
        stack: how many groups, side by side in the batch.
        rows: query rows of each group; the call's rows follow the previous call's in plan order.
        num_keys: keys of each group, 0 if its queries see nothing.
        keys: int64 (stack * num_keys,) indices into the plan's key order, or a slice of it.
        mask: None if every row of a group sees every one of its keys.
    """

    stack: int
    rows: int
    num_keys: int
    keys: torch.Tensor | slice
    mask: TileMask | None


@dataclass(frozen=True, eq=False)
class Plan:
    """The calls of one pattern.

    Attributes:
        heads: int64, the heads that follow the pattern; None: all.
        rows: int64 (S,), the sequence index of each query row in plan order; None: plan order is
            sequence order.
        places: int64 (S,), its inverse; None as well.
        keys: int64 (S,), the sequence index of each key in key order; None: sequence order.
        calls: in plan order.
        table: bool (M + 2, T, T), what the calls' masks expand from.
    """

    heads: torch.Tensor | None
    rows: torch.Tensor | None
    places: torch.Tensor | None
    keys: torch.Tensor | None
    calls: tuple[Call, ...]
    table: torch.Tensor

    @cached_property
    def mask_entries(self) -> int:
        """How many entries the distinct masks of all calls have together."""
        sizes = {c.mask: c.rows * c.num_keys for c in self.calls if c.mask is not None}
        return sum(sizes.values())


def plans(blocks: BlockIndex) -> tuple[Plan, ...]:
    """One plan for each pattern that a head follows; made once per index."""
    return blocks.derived("torch plans", _make_plans)


def _make_plans(blocks: BlockIndex) -> tuple[Plan, ...]:
    host = blocks.to("cpu")
    shape = (1, blocks.max_tile, blocks.max_tile)
    ends = blocks.masks.new_zeros(shape), blocks.masks.new_ones(shape)
    table = torch.cat([blocks.masks, *ends])
    if host.head_pattern is None:
        return (_Planner(host, 0, table).plan(None),)
    used = sorted(set(host.head_pattern.tolist()))
    heads = [(blocks.head_pattern == p).nonzero().flatten() for p in used]
    return tuple(_Planner(host, p, table).plan(h) for p, h in zip(used, heads, strict=True))


@dataclass(frozen=True)
class _Group:
    """Query tiles that attend together, to the places (of tile order) that any of them sees."""

    tiles: np.ndarray
    places: np.ndarray
    rows: int
    masked: bool

    @property
    def shape(self) -> tuple[int, int, bool]:
        return self.rows, len(self.places), self.masked


class _Planner:
    """Groups the query tiles of one pattern.

    Keys are told apart by *classes*: the keys of a tile that every query tile sees in the same way.
    So a group leaves out those keys of a partial tile that none of its queries sees.
    """

    def __init__(self, blocks: BlockIndex, pattern: int, table: torch.Tensor) -> None:
        tiles = blocks.num_tiles
        self.table = table
        self.row_sees = table.any(2).cpu()
        self.starts = blocks.starts.numpy()
        self.sizes = np.diff(self.starts)
        self.order = blocks.order.numpy()
        row_ptr = blocks.row_ptr[pattern * tiles : (pattern + 1) * tiles + 1].numpy()
        entries = slice(row_ptr[0], row_ptr[-1])
        query_tile = np.repeat(np.arange(tiles), np.diff(row_ptr))
        self.ids = np.full((tiles, tiles), NOTHING, dtype=np.int64)
        self.ids[query_tile, blocks.cols[entries].numpy()] = blocks.mask_ids[entries].numpy()
        self.masks: dict[tuple[bytes, ...], TileMask] = {}
        self._classify(table.sum(1).float().cpu().numpy())

    def _classify(self, seen_by: np.ndarray) -> None:
        """Find the classes, given how many queries see each key of a mask (M + 2, T)."""
        if self.sizes.shape[0] * self.order.shape[0] > MAX_SEEN:
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
        count = seen_by[self.ids[:, tile_of], column_of]
        self.sees = count > 0  # (tile, class): does any of its queries?
        self.sees_all = count >= self.sizes[:, None]  # do all?

    def plan(self, heads: torch.Tensor | None) -> Plan:
        """The whole plan, for the given heads."""
        groups = [self._group(tiles) for tiles in self._cut(self._same_keys())]
        keys, calls = None, self._calls(groups, self.order)
        # In tile order more key lists are contiguous, but it takes a pass over all keys.
        in_tile_order = self._calls(groups, np.arange(len(self.order)))
        if len(self.order) + _gathered(in_tile_order) < _gathered(calls):
            keys, calls = torch.from_numpy(self.order).to(self.table.device), in_tile_order
        tiles = np.concatenate([group.tiles for group in groups])
        held = np.concatenate([np.arange(self.starts[t], self.starts[t + 1]) for t in tiles])
        rows = torch.from_numpy(self.order[held]).to(self.table.device)
        places = torch.argsort(rows)
        if torch.equal(rows, places) and bool((rows.diff() == 1).all()):
            return Plan(heads, None, None, keys, calls, self.table)
        return Plan(heads, rows, places, keys, calls, self.table)

    def _same_keys(self) -> list[np.ndarray]:
        """Query tiles put together where all their queries see the same keys, by first tile."""
        exact = np.all(self.sees == self.sees_all, axis=1)
        buckets: dict[bytes | int, list[int]] = {}
        for tile, row in enumerate(self.sees):
            buckets.setdefault(row.tobytes() if exact[tile] else tile, []).append(tile)
        units = []
        for tiles in buckets.values():
            rows = int(self.sizes[tiles].sum())
            pieces = min(len(tiles), -(-rows // MAX_ROWS))
            units += np.array_split(np.array(tiles), pieces)
        return sorted(units, key=lambda unit: int(unit[0]))

    def _cut(self, units: list[np.ndarray]) -> list[np.ndarray]:
        """Cut the row of units into the runs that cost least together (dynamic programming)."""
        count = len(units)
        costs = self._run_costs(units)
        best = np.full(count + 1, np.inf)
        best[0] = 0.0
        length_to = np.zeros(count + 1, dtype=np.int64)
        for end in range(1, count + 1):
            for length in range(1, min(end, len(costs)) + 1):
                total = best[end - length] + costs[length - 1][end - length]
                if total < best[end]:
                    best[end], length_to[end] = total, length
        runs = []
        end = count
        while end:
            runs.append(np.concatenate(units[end - length_to[end] : end]))
            end -= length_to[end]
        return runs[::-1]

    def _run_costs(self, units: list[np.ndarray]) -> list[np.ndarray]:
        """What attending runs of units together costs: [length - 1][first unit]."""
        sees = np.stack([self.sees[unit].any(0) for unit in units])
        sees_all = np.stack([self.sees_all[unit].all(0) for unit in units])
        unit_rows = np.array([self.sizes[unit].sum() for unit in units])
        union, common, rows = sees, sees_all, unit_rows
        costs: list[np.ndarray] = []
        while True:
            keys = union.astype(np.float32) @ self.class_sizes
            masked = common.astype(np.float32) @ self.class_sizes < keys
            cost = keys * (rows * np.where(masked, MASK_COST, 1.0) + KEY_COST) + CALL_COST
            if costs:
                cost[(rows > MAX_ROWS) | (masked & (rows * keys > MAX_MASK))] = np.inf
            costs.append(np.where(keys == 0, 0.0, cost))
            length = len(costs)
            if length == len(units) or not np.isfinite(cost).any():
                return costs
            union, common = union[:-1] | sees[length:], common[:-1] & sees_all[length:]
            rows = rows[:-1] + unit_rows[length:]

    def _group(self, tiles: np.ndarray) -> _Group:
        sees = self.sees[tiles].any(0)
        masked = not bool(self.sees_all[tiles][:, sees].all())
        places = sees[self.class_of_place].nonzero()[0]
        return _Group(tiles, places, int(self.sizes[tiles].sum()), masked)

    def _calls(self, groups: list[_Group], key_order: np.ndarray) -> tuple[Call, ...]:
        calls = []
        for (_, num_keys, masked), same in groupby(groups, key=lambda group: group.shape):
            alike = list(same)
            depth = 1 if masked else max(1, MAX_STACKED_KEYS // max(num_keys, 1))
            stacks = [alike[i : i + depth] for i in range(0, len(alike), depth)]
            calls += [self._call(stack, key_order) for stack in stacks]
        return tuple(calls)

    def _call(self, groups: list[_Group], key_order: np.ndarray) -> Call:
        first = groups[0]
        num_keys = len(first.places)
        tokens = key_order[np.concatenate([group.places for group in groups])]
        keys: torch.Tensor | slice = torch.from_numpy(tokens).to(self.table.device)
        if len(groups) == 1:
            if not first.masked and num_keys == len(self.order):
                keys = slice(0, num_keys)  # without a mask their order does not matter
            elif (np.diff(tokens) == 1).all():
                keys = slice(int(tokens[0]), int(tokens[-1]) + 1) if num_keys else slice(0, 0)
        mask = self._mask(first) if first.masked else None
        return Call(len(groups), first.rows, num_keys, keys, mask)

    def _mask(self, group: _Group) -> TileMask:
        edge = self.table.shape[-1]
        tile = np.searchsorted(self.starts, group.places, side="right") - 1
        tiles, nth = np.unique(tile, return_inverse=True)
        columns = nth * edge + group.places - self.starts[tile]
        rows = (np.arange(edge) < self.sizes[group.tiles][:, None]).reshape(-1).nonzero()[0]
        ids = self.ids[np.ix_(group.tiles, tiles)]
        key = tuple(x.tobytes() for x in (ids, rows, columns))
        if key not in self.masks:
            blind = ~self.row_sees[torch.from_numpy(ids)].any(1).flatten()[torch.from_numpy(rows)]
            device = self.table.device
            all_rows, all_columns = len(rows) == len(ids) * edge, len(columns) == len(tiles) * edge
            self.masks[key] = TileMask(
                ids=torch.from_numpy(ids).to(device),
                rows=None if all_rows else torch.from_numpy(rows).to(device),
                keys=None if all_columns else torch.from_numpy(columns).to(device),
                blind=blind.to(device) if blind.any() else None,
            )
        return self.masks[key]


def _gathered(calls: tuple[Call, ...]) -> int:
    """How many keys these calls must copy together."""
    return sum(call.keys.shape[0] for call in calls if isinstance(call.keys, torch.Tensor))
