"""Which query rows the torch backend lets attend together: what costs least by a small model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffpatch.kernels.block_sparse.torch_plan.views import Views

# What SDPA costs, in units of one query-key pair of one head (measured on x86 with AVX-512, alike
# for heads of 64 and 128, fp32 and bf16):
ROW_COSTS = ((768, 1.0), (192, 1.07), (0, 1.22))  # per pair of calls of at least so many query rows
MASK_COST = 1.1  # an additive mask, per pair
KEY_COST = 60.0  # per key: gathering it, and the kernel's own preparation of it
CALL_COST = 25_000.0  # per call
MERGE_COST = 100.0  # per query row, joining two results
MAX_ROWS = 2048  # query rows of a band; more gains nothing and makes unions larger
MAX_MASK = 1 << 24  # entries of a group's mask
LEAST_ROWS = 256  # query rows of a unit; parts are put together up to these
MAX_ORDERED = 2048  # units up to which an order of their own is sought

Units = list[np.ndarray]  # sets of parts of the query rows that are never parted


@dataclass(frozen=True)
class Cut:
    """Units that attend together: to the union of their keys, or (split) to what all see and each
    on its own to the rest."""

    units: Units
    split: bool

    @property
    def parts(self) -> np.ndarray:
        return np.concatenate(self.units)


def cuts(views: Views, *, splitting: bool) -> list[Cut]:
    """Query rows in the groups that cost least together, in the best order that was tried.

    Args:
        views: what they see.
        splitting: whether groups may be split.
    """
    units = _neighbors(views) if views.exact else _same_keys(views)
    best, cost = _cut(views, units, splitting)
    if 2 < len(units) <= MAX_ORDERED:
        other, other_cost = _cut(views, _chain(views, units), splitting)
        best = other if other_cost < cost else best
    return best


def _neighbors(views: Views) -> Units:
    """Parts put together, while they are small, with those of the same tile that see most alike."""
    tile, _ = views.within(views.parts.first)
    pieces = np.split(np.arange(len(tile)), np.diff(tile).nonzero()[0] + 1)
    return [unit for piece in pieces for unit in _halved(views, piece)]


def _halved(views: Views, parts: np.ndarray) -> Units:
    """Parts cut in halves, between two that see least alike, until a half has few rows."""
    rows = views.parts.sizes[parts]
    if len(parts) == 1 or rows.sum() <= LEAST_ROWS:
        return [parts]
    sees = views.sees[parts].astype(np.float32) * np.sqrt(views.classes.sizes, dtype=np.float32)

    def distance(part: int) -> np.ndarray:
        return np.square(sees - sees[part]).sum(1)

    one = int(distance(0).argmax())
    other = int(distance(one).argmax())
    order = np.argsort(distance(one) - distance(other), kind="stable")
    half = int(np.searchsorted(rows[order].cumsum(), rows.sum() / 2)) + 1
    half = min(half, len(parts) - 1)
    return _halved(views, parts[order[:half]]) + _halved(views, parts[order[half:]])


def _same_keys(views: Views) -> Units:
    """Parts put together where all their queries see the same keys, by first part."""
    exact = np.all(views.sees == views.sees_all, axis=1)
    buckets: dict[bytes | int, list[int]] = {}
    for part, row in enumerate(views.sees):
        buckets.setdefault(row.tobytes() if exact[part] else part, []).append(part)
    units = []
    for parts in buckets.values():
        rows = int(views.parts.sizes[parts].sum())
        pieces = min(len(parts), -(-rows // MAX_ROWS))
        units += np.array_split(np.array(parts), pieces)
    return sorted(units, key=lambda unit: int(unit[0]))


def _chain(views: Views, units: Units) -> Units:
    """Units in an order in which each is followed by the one it shares most keys with.

    In tile order, for example, windows move along a row first, but of two windows one above the
    other, or at two times, more may be shared.
    """
    sees = np.stack([views.sees[unit].any(0) for unit in units]).astype(np.float32)
    shared = (sees * views.classes.sizes.astype(np.float32)) @ sees.T
    alike = shared / np.maximum(np.maximum.outer(shared.diagonal(), shared.diagonal()), 1.0)
    order = [0]
    alike[:, 0] = -1.0
    for _ in units[1:]:
        order.append(int(alike[order[-1]].argmax()))
        alike[:, order[-1]] = -1.0
    return [units[i] for i in order]


def _cut(views: Views, units: Units, splitting: bool) -> tuple[list[Cut], float]:
    """Cut the row of units where it costs least (dynamic programming), and what it costs."""
    count = len(units)
    costs = _band_costs(views, units, splitting)
    least = [cost.min(0) for cost in costs]
    best = np.full(count + 1, np.inf)
    best[0] = 0.0
    length_to = np.zeros(count + 1, dtype=np.int64)
    for end in range(1, count + 1):
        for length in range(1, min(end, len(costs)) + 1):
            total = best[end - length] + least[length - 1][end - length]
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


def _band_costs(views: Views, units: Units, splitting: bool) -> list[np.ndarray]:
    """What attending bands of units costs: [length - 1][as a union or split, first unit]."""
    sees = np.stack([views.sees[unit].any(0) for unit in units])
    sees_all = np.stack([views.sees_all[unit].all(0) for unit in units])
    unit_rows = np.array([views.parts.sizes[unit].sum() for unit in units])
    union, common, rows = sees, sees_all, unit_rows
    # Sums over bands of what each unit costs alone, and of what a key less saves it.
    alone, per_key = (np.concatenate([[0.0], x.cumsum()]) for x in _alone(views, units))
    costs: list[np.ndarray] = []
    while True:
        length = len(costs) + 1
        keys, shared = views.count(union), views.count(common)
        masked = shared < keys
        together = keys * (rows * pair_cost(rows, masked) + KEY_COST) + CALL_COST
        together = np.where(keys == 0, 0.0, together)
        apart = np.full_like(together, np.inf)
        if length > 1:
            together[(rows > MAX_ROWS) | (masked & (rows * keys > MAX_MASK))] = np.inf
        if length > 1 and splitting:
            apart = shared * (rows * pair_cost(rows) + KEY_COST) + CALL_COST + rows * MERGE_COST
            apart += alone[length:] - alone[:-length]
            apart -= shared * (per_key[length:] - per_key[:-length])
            apart[(rows > MAX_ROWS) | (shared == 0)] = np.inf
        costs.append(np.stack([together, apart]))
        if length == len(units) or not np.isfinite(costs[-1]).any():
            return costs
        union, common = union[:-1] | sees[length:], common[:-1] & sees_all[length:]
        rows = rows[:-1] + unit_rows[length:]


def _alone(views: Views, units: Units) -> tuple[np.ndarray, np.ndarray]:
    """What each unit costs without others, and for each of its keys."""
    seen = [views.seen(unit) for unit in units]
    keys = views.count(np.stack([classes for classes, _ in seen]))
    masked = np.array([some for _, some in seen])
    rows = np.array([views.parts.sizes[unit].sum() for unit in units])
    per_key = rows * pair_cost(rows, masked) + KEY_COST
    return keys * per_key + CALL_COST, per_key


def pair_cost(rows: np.ndarray, masked: np.ndarray | bool = False) -> np.ndarray:
    """What a pair costs in calls of so many query rows."""
    kinds = [rows >= least for least, _ in ROW_COSTS]
    return np.select(kinds, [cost for _, cost in ROW_COSTS]) * np.where(masked, MASK_COST, 1.0)
