"""How the torch backend cuts a block index into a few large attention calls.

SDPA is efficient on hundreds of query rows, a tile has at most 128 or so. So query tiles are put
together: first those that see exactly the same keys, then neighbours in tile order whose key lists
overlap: either they attend to the union under a mask, or together to the keys that all of them see
and each on its own to the rest, merged by log-sum-exp. Which of it is what the costs below decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby

import numpy as np
import torch

from diffpatch.kernels.blocks import BlockIndex

# What SDPA costs, in units of one query-key pair of one head (measured on x86, AVX-512 and AMX):
ROW_COSTS = ((768, 1.0), (192, 1.1), (0, 1.3))  # per pair of a call of at least so many query rows
MASK_COST = 1.15  # an additive mask, per pair
KEY_COST = 100.0  # per key: gathering it, and the kernel's own preparation of it
CALL_COST = 25_000.0  # per call
MERGE_COST = 150.0  # per query row, joining two results
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
class Run:
    """Some query rows, next to each other in plan order.

    Attributes:
        common: one call of all the rows to keys that `rest` leaves out, whose result is merged with
            theirs; None: there is none.
        rest: calls that follow each other and have all the rows together.
    """

    common: Call | None
    rest: tuple[Call, ...]

    @property
    def rows(self) -> int:
        return sum(call.stack * call.rows for call in self.rest)


@dataclass(frozen=True, eq=False)
class Plan:
    """The calls of one pattern.

    Attributes:
        heads: int64, the heads that follow the pattern; None: all.
        rows: int64 (S,), the sequence index of each query row in plan order; None: plan order is
            sequence order.
        places: int64 (S,), its inverse; None as well.
        keys: int64 (S,), the sequence index of each key in key order; None: sequence order.
        runs: in plan order.
        table: bool (M + 2, T, T), what the calls' masks expand from.
    """

    heads: torch.Tensor | None
    rows: torch.Tensor | None
    places: torch.Tensor | None
    keys: torch.Tensor | None
    runs: tuple[Run, ...]
    table: torch.Tensor

    @cached_property
    def calls(self) -> tuple[Call, ...]:
        """Every call of every run."""
        return tuple(call for run in self.runs for call in (run.common, *run.rest) if call)

    @cached_property
    def mask_entries(self) -> int:
        """How many entries the distinct masks of all calls have together."""
        sizes = {c.mask: c.rows * c.num_keys for c in self.calls if c.mask is not None}
        return sum(sizes.values())


def plans(blocks: BlockIndex, *, merging: bool = False) -> tuple[Plan, ...]:
    """One plan for each pattern that a head follows; made once per index.

    Args:
        blocks: the index.
        merging: whether runs may have a common call, whose result must then be merged.
    """
    return blocks.derived(("torch plans", merging), partial(_make_plans, merging=merging))


def _make_plans(blocks: BlockIndex, merging: bool) -> tuple[Plan, ...]:
    host = blocks.to("cpu")
    shape = (1, blocks.max_tile, blocks.max_tile)
    ends = blocks.masks.new_zeros(shape), blocks.masks.new_ones(shape)
    table = torch.cat([blocks.masks, *ends])
    if host.head_pattern is None:
        return (_Planner(host, 0, table, merging).plan(None),)
    used = sorted(set(host.head_pattern.tolist()))
    heads = [(blocks.head_pattern == p).nonzero().flatten() for p in used]
    return tuple(
        _Planner(host, p, table, merging).plan(h) for p, h in zip(used, heads, strict=True)
    )


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

    def __init__(
        self, blocks: BlockIndex, pattern: int, table: torch.Tensor, merging: bool
    ) -> None:
        tiles = blocks.num_tiles
        self.table, self.merging = table, merging
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
        self.first_class = np.searchsorted(tile_of, np.arange(len(self.sizes)))
        self.class_sizes = np.bincount(self.class_of_place).astype(np.float32)
        count = seen_by[self.ids[:, tile_of], column_of]
        self.sees = count > 0  # (tile, class): does any of its queries?
        self.sees_all = count >= self.sizes[:, None]  # do all?

    def plan(self, heads: torch.Tensor | None) -> Plan:
        """The whole plan, for the given heads."""
        cuts = self._cut(self._same_keys())
        keys, runs = None, self._runs(cuts, self.order)
        # In tile order more key lists are contiguous, but it takes a pass over all keys.
        in_tile_order = self._runs(cuts, np.arange(len(self.order)))
        if len(self.order) + _gathered(in_tile_order) < _gathered(runs):
            keys, runs = torch.from_numpy(self.order).to(self.table.device), in_tile_order
        tiles = np.concatenate([tile for units, _ in cuts for tile in units])
        held = np.concatenate([np.arange(self.starts[t], self.starts[t + 1]) for t in tiles])
        rows = torch.from_numpy(self.order[held]).to(self.table.device)
        places = torch.argsort(rows)
        if torch.equal(rows, places) and bool((rows.diff() == 1).all()):
            return Plan(heads, None, None, keys, runs, self.table)
        return Plan(heads, rows, places, keys, runs, self.table)

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

    def _cut(self, units: list[np.ndarray]) -> list[tuple[list[np.ndarray], bool]]:
        """Cut the row of units into the runs that cost least together (dynamic programming).

        Returns:
            The units of each run, and whether they share a common call.
        """
        count = len(units)
        costs = self._run_costs(units)
        best = np.full(count + 1, np.inf)
        best[0] = 0.0
        length_to = np.zeros(count + 1, dtype=np.int64)
        for end in range(1, count + 1):
            for length in range(1, min(end, len(costs)) + 1):
                total = best[end - length] + costs[length - 1].min(0)[end - length]
                if total < best[end]:
                    best[end], length_to[end] = total, length
        runs = []
        end = count
        while end:
            length = length_to[end]
            union, split = costs[length - 1][:, end - length]
            runs.append((units[end - length : end], bool(split < union)))
            end -= length
        return runs[::-1]

    def _run_costs(self, units: list[np.ndarray]) -> list[np.ndarray]:
        """What attending runs of units costs: [length - 1][as a union or split, first unit]."""
        sees = np.stack([self.sees[unit].any(0) for unit in units])
        sees_all = np.stack([self.sees_all[unit].all(0) for unit in units])
        unit_rows = np.array([self.sizes[unit].sum() for unit in units])
        union, common, rows = sees, sees_all, unit_rows
        # Sums over runs of what each unit costs alone, and of what a key less saves it.
        alone, per_key = (np.concatenate([[0.0], x.cumsum()]) for x in self._alone(units))
        costs: list[np.ndarray] = []
        while True:
            length = len(costs) + 1
            keys = union.astype(np.float32) @ self.class_sizes
            masked = common.astype(np.float32) @ self.class_sizes < keys
            together = keys * (rows * _pair_cost(rows, masked) + KEY_COST) + CALL_COST
            together = np.where(keys == 0, 0.0, together)
            apart = np.full_like(together, np.inf)
            if length > 1:
                together[(rows > MAX_ROWS) | (masked & (rows * keys > MAX_MASK))] = np.inf
            if length > 1 and self.merging:
                shared = self._whole(common) @ self.sizes
                apart = shared * (rows * _pair_cost(rows) + KEY_COST) + CALL_COST
                apart += rows * MERGE_COST + alone[length:] - alone[:-length]
                apart -= shared * (per_key[length:] - per_key[:-length])
                apart[(rows > MAX_ROWS) | (shared == 0)] = np.inf
            costs.append(np.stack([together, apart]))
            if length == len(units) or not np.isfinite(costs[-1]).any():
                return costs
            union, common = union[:-1] | sees[length:], common[:-1] & sees_all[length:]
            rows = rows[:-1] + unit_rows[length:]

    def _alone(self, units: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """What each unit costs without others, and for each of its keys."""
        groups = [self._group(unit) for unit in units]
        rows = np.array([group.rows for group in groups])
        per_key = rows * _pair_cost(rows, np.array([group.masked for group in groups])) + KEY_COST
        return np.array([len(group.places) for group in groups]) * per_key + CALL_COST, per_key

    def _whole(self, classes: np.ndarray) -> np.ndarray:
        """The tiles of which every class is in the set: bool (..., classes) -> (..., tiles)."""
        whole: np.ndarray = np.logical_and.reduceat(classes, self.first_class, axis=-1)
        return whole

    def _group(self, tiles: np.ndarray, without: np.ndarray | None = None) -> _Group:
        """One group of the given tiles; `without` leaves out some places, bool (S,)."""
        sees = self.sees[tiles].any(0)
        seen = sees[self.class_of_place]
        if without is not None:
            seen = seen & ~without
            sees = np.bincount(self.class_of_place, seen, len(sees)) > 0
        masked = not bool(self.sees_all[tiles][:, sees].all())
        return _Group(tiles, seen.nonzero()[0], int(self.sizes[tiles].sum()), masked)

    def _runs(
        self, cuts: list[tuple[list[np.ndarray], bool]], key_order: np.ndarray
    ) -> tuple[Run, ...]:
        runs = []
        for split, several in groupby(cuts, key=lambda cut: cut[1]):
            if not split:
                groups = [self._group(np.concatenate(units)) for units, _ in several]
                runs.append(Run(None, self._calls(groups, key_order)))
                continue
            for units, _ in several:
                tiles = np.concatenate(units)
                shared = np.repeat(self._whole(self.sees_all[tiles].all(0)), self.sizes)
                common = _Group(tiles, shared.nonzero()[0], int(self.sizes[tiles].sum()), False)
                rest = self._calls([self._group(unit, shared) for unit in units], key_order)
                runs.append(Run(self._call([common], key_order), rest))
        return tuple(runs)

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


def _pair_cost(rows: np.ndarray, masked: np.ndarray | bool = False) -> np.ndarray:
    """Per pair, in calls of so many query rows."""
    kinds = [rows >= least for least, _ in ROW_COSTS]
    return np.select(kinds, [cost for _, cost in ROW_COSTS]) * np.where(masked, MASK_COST, 1.0)


def _gathered(runs: tuple[Run, ...]) -> int:
    """How many keys these runs must copy together."""
    calls = (call for run in runs for call in (run.common, *run.rest) if call)
    return sum(call.keys.shape[0] for call in calls if isinstance(call.keys, torch.Tensor))
