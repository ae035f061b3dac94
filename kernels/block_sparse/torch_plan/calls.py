"""How the torch backend cuts a block index into a few large attention calls.

SDPA is efficient on hundreds of query rows, and fewer see exactly the same keys. So rows whose keys
overlap are put together: either they attend to the union under a mask, or together to the keys that
all of them see and in smaller groups to the rest, merged by log-sum-exp. The costs in
`grouping` decide, from what `views` finds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby

import numpy as np
import torch

from diffpatch.kernels.block_sparse.torch_plan.grouping import Cut, cuts
from diffpatch.kernels.block_sparse.torch_plan.views import Views
from diffpatch.kernels.blocks import BlockIndex

MAX_STACKED_KEYS = 2048  # keys of a call that stacks several groups


@dataclass(frozen=True, eq=False)
class TileMask:
    """A group's mask, kept as tile numbers until it is needed.

    Attributes:
        ids: int64 (query tiles, key tiles): rows of `masks`, or NOTHING or EVERYTHING.
        rows: int64 (kinds of query rows,), which of the query tiles' T rows; one of each kind.
        keys: int64 (keys,), which of the columns of the key tiles; None: all of them.
        row_kinds: int64 (query rows,), the kind of each row; None: each row is of its own.
        blind: whether some rows may see no key at all.
    """

    ids: torch.Tensor
    rows: torch.Tensor
    keys: torch.Tensor | None
    row_kinds: torch.Tensor | None
    blind: bool

    def compact(self, table: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The mask of one row of each kind, (kinds of query rows, keys): 1 where the key is seen.

        Args:
            table: bool (M + 2, T, T), `masks` with nothing and everything appended.
            dtype: of the result.
        """
        height, width = self.ids.shape
        edge = table.shape[-1]
        full = table[self.ids].transpose(1, 2).reshape(height * edge, width * edge)
        seen = full.index_select(0, self.rows).view(torch.uint8)
        # Columns of fp32 are selected several times faster than those of smaller types.
        return (seen if self.keys is None else seen.float().index_select(1, self.keys)).to(dtype)

    def expand(self, table: torch.Tensor) -> torch.Tensor:
        """The mask in full, bool (query rows, keys), by such a table."""
        compact = self.compact(table, torch.bool)
        return compact if self.row_kinds is None else compact[self.row_kinds]


@dataclass(frozen=True, eq=False)
class SdpaCall:
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
class Band:
    """Some query rows, next to each other in plan order.

    Attributes:
        common: one call of all the rows to keys that `rest` leaves out, whose result is merged with
            theirs; None: there is none.
        rest: calls that follow each other and have all the rows together.
    """

    common: SdpaCall | None
    rest: tuple[SdpaCall, ...]

    @property
    def rows(self) -> int:
        return sum(call.stack * call.rows for call in self.rest)


@dataclass(frozen=True, eq=False)
class SdpaPlan:
    """The calls of one pattern.

    Attributes:
        heads: int64, the heads that follow the pattern; None: all.
        rows: int64 (S,), the sequence index of each query row in plan order; None: plan order is
            sequence order.
        places: int64 (S,), its inverse; None as well.
        keys: int64 (S,), the sequence index of each key in key order; None: sequence order.
        bands: in plan order.
        table: bool (M + 2, T, T), what the calls' masks expand from.
    """

    heads: torch.Tensor | None
    rows: torch.Tensor | None
    places: torch.Tensor | None
    keys: torch.Tensor | None
    bands: tuple[Band, ...]
    table: torch.Tensor

    @cached_property
    def calls(self) -> tuple[SdpaCall, ...]:
        """Every call of every band."""
        return tuple(call for band in self.bands for call in (band.common, *band.rest) if call)

    @cached_property
    def mask_entries(self) -> int:
        """How many entries the distinct masks of all calls have together, of a row of each kind."""
        sizes = {c.mask: len(c.mask.rows) * c.num_keys for c in self.calls if c.mask is not None}
        return sum(sizes.values())


def plans(blocks: BlockIndex, *, merging: bool = False) -> tuple[SdpaPlan, ...]:
    """One plan for each pattern that a head follows; made once per index.

    Args:
        blocks: the index.
        merging: whether bands may have a common call, whose result must then be merged.
    """
    return blocks.derived(("torch plans", merging), partial(_make_plans, merging=merging))


def _make_plans(blocks: BlockIndex, merging: bool) -> tuple[SdpaPlan, ...]:
    host = blocks.to("cpu")
    table = blocks.mask_table()
    if host.head_pattern is None:
        return (_Planner(host, 0, table, merging).plan(None),)
    used = sorted(set(host.head_pattern.tolist()))
    heads = [(blocks.head_pattern == p).nonzero().flatten() for p in used]
    return tuple(
        _Planner(host, p, table, merging).plan(h) for p, h in zip(used, heads, strict=True)
    )


@dataclass(frozen=True, eq=False)
class _Group:
    """Parts that attend together, to the keys of the classes that any of them sees."""

    parts: np.ndarray
    classes: np.ndarray
    rows: int
    num_keys: int
    masked: bool

    @property
    def shape(self) -> tuple[int, int, bool]:
        return self.rows, self.num_keys, self.masked


class _Planner:
    """What writes the calls of one pattern."""

    def __init__(
        self, blocks: BlockIndex, pattern: int, table: torch.Tensor, merging: bool
    ) -> None:
        self.views = Views(blocks, pattern, table)
        self.table, self.merging = table, merging
        self.order = blocks.order.numpy()
        self.masks: dict[tuple[bytes, ...], TileMask] = {}

    def plan(self, heads: torch.Tensor | None) -> SdpaPlan:
        """The whole plan, for the given heads."""
        found = cuts(self.views, splitting=self.merging)
        keys, bands = None, self._bands(found, self.order)
        # In tile order more key lists are contiguous, but it takes a pass over all keys.
        in_tile_order = self._bands(found, np.arange(len(self.order)))
        if len(self.order) + _gathered(in_tile_order) < _gathered(bands):
            keys, bands = torch.from_numpy(self.order).to(self.table.device), in_tile_order
        held = self.views.parts.places(np.concatenate([cut.parts for cut in found]))
        rows = torch.from_numpy(self.order[held]).to(self.table.device)
        places = torch.argsort(rows)
        if torch.equal(rows, places) and bool((rows.diff() == 1).all()):
            return SdpaPlan(heads, None, None, keys, bands, self.table)
        return SdpaPlan(heads, rows, places, keys, bands, self.table)

    def _group(self, parts: np.ndarray, without: np.ndarray | None = None) -> _Group:
        """Parts that attend to whatever any of them sees, but for some classes, bool (C,)."""
        classes, masked = self.views.seen(parts, without)
        return self._group_of(parts, classes, masked)

    def _group_of(self, parts: np.ndarray, classes: np.ndarray, masked: bool) -> _Group:
        rows, num_keys = self.views.parts.sizes[parts].sum(), self.views.count(classes)
        return _Group(parts, classes, int(rows), int(num_keys), masked)

    def _bands(self, found: list[Cut], key_order: np.ndarray) -> tuple[Band, ...]:
        bands = []
        for split, alike in groupby(found, key=lambda cut: cut.split):
            if not split:
                groups = [self._group(cut.parts) for cut in alike]
                bands += [Band(None, (call,)) for call in self._calls(groups, key_order)]
                continue
            for cut in alike:
                common = self.views.common(cut.parts)
                rest = [self._group(unit, common) for unit in cut.units]
                shared = self._group_of(cut.parts, common, False)
                bands.append(Band(self._call([shared], key_order), self._calls(rest, key_order)))
        return tuple(bands)

    def _calls(self, groups: list[_Group], key_order: np.ndarray) -> tuple[SdpaCall, ...]:
        calls = []
        for (_, num_keys, masked), same in groupby(groups, key=lambda group: group.shape):
            alike = list(same)
            depth = 1 if masked else max(1, MAX_STACKED_KEYS // max(num_keys, 1))
            stacks = [alike[i : i + depth] for i in range(0, len(alike), depth)]
            calls += [self._call(stack, key_order) for stack in stacks]
        return tuple(calls)

    def _call(self, groups: list[_Group], key_order: np.ndarray) -> SdpaCall:
        first = groups[0]
        places = [group.classes[self.views.classes.of_place].nonzero()[0] for group in groups]
        tokens = key_order[np.concatenate(places)]
        keys: torch.Tensor | slice = torch.from_numpy(tokens).to(self.table.device)
        if len(groups) == 1:
            if not first.masked and first.num_keys == len(self.order):
                keys = slice(0, first.num_keys)  # without a mask their order does not matter
            elif (np.diff(tokens) == 1).all():
                keys = slice(int(tokens[0]), int(tokens[-1]) + 1) if len(tokens) else slice(0, 0)
        mask = self._mask(first, places[0]) if first.masked else None
        return SdpaCall(len(groups), first.rows, first.num_keys, keys, mask)

    def _mask(self, group: _Group, key_places: np.ndarray) -> TileMask:
        parts = self.views.parts
        exact = self.views.exact  # then one row of a part stands for all
        row_tiles, rows = self._within(
            parts.first[group.parts] if exact else parts.places(group.parts)
        )
        kinds = np.repeat(np.arange(len(group.parts)), parts.sizes[group.parts])
        key_tiles, keys = self._within(key_places)
        ids = self.views.ids[np.ix_(row_tiles, key_tiles)]
        key = tuple(x.tobytes() for x in (ids, rows, keys, kinds))
        if key not in self.masks:
            device = self.table.device
            every_key = len(keys) == ids.shape[1] * self.table.shape[-1]
            always_seen = self.views.sees_all[np.ix_(group.parts, group.classes)].any(1)
            self.masks[key] = TileMask(
                ids=torch.from_numpy(ids).to(device),
                rows=torch.from_numpy(rows).to(device),
                keys=None if every_key else torch.from_numpy(keys).to(device),
                row_kinds=torch.from_numpy(kinds).to(device) if exact else None,
                blind=not always_seen.all(),
            )
        return self.masks[key]

    def _within(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tiles that places lie in, and where among all the rows of these, T each."""
        tile, row = self.views.within(places)
        tiles, nth = np.unique(tile, return_inverse=True)
        return tiles, nth * self.table.shape[-1] + row


def _gathered(bands: tuple[Band, ...]) -> int:
    """How many keys these bands must copy together."""
    calls = (call for band in bands for call in (band.common, *band.rest) if call)
    return sum(call.keys.shape[0] for call in calls if isinstance(call.keys, torch.Tensor))
