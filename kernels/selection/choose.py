"""From scores to tiles: the best of every row, head or layer, by count or above a threshold."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffpatch.kernels.active_tiles.table import TileTable

SCOPES = ("row", "head", "layer")


@dataclass(frozen=True, eq=False)
class Counts:
    """How many strips each query tile may have, those that are always in included.

    Attributes:
        rows: int64 (H or 1, N).
        most: the largest of them, the largest sum of a head, and the sum of all heads, so that no
            call reads them back.
    """

    rows: torch.Tensor
    most: tuple[int, int, int]

    @classmethod
    def of(cls, rows: torch.Tensor, heads: int) -> Counts:
        """Counts on a CPU, for that many heads."""
        rows = rows.long().expand(heads if len(rows) == 1 else -1, -1)
        by_head = rows.sum(1)
        return cls(rows, (int(rows.max()), int(by_head.max()), int(by_head.sum())))

    def to(self, device: torch.device) -> Counts:
        return Counts(self.rows.to(device), self.most)

    def within(self, scope: str) -> tuple[torch.Tensor, int]:
        """Counts (H, N, 1), (H, 1) or (1,) in a scope, and the largest of them."""
        if scope == "row":
            return self.rows[..., None], self.most[0]
        by_head = self.rows.sum(1, keepdim=True)
        if scope == "head":
            return by_head, self.most[1]
        return by_head.sum(0), self.most[2]


def spread_counts(wanted: torch.Tensor) -> torch.Tensor:
    """Whole numbers whose sums over the first rows are as near to those of fractions as can be.

    Rounding every row up would keep too much where there are few tiles; here rows take turns.

    Args:
        wanted: (..., N), how many each row should have.
    """
    total = (wanted.double().cumsum(-1) + 1e-6).floor()
    return torch.diff(total, dim=-1, prepend=torch.zeros_like(total[..., :1])).long()


def choose(
    scores: torch.Tensor,
    seen: torch.Tensor,
    fixed: torch.Tensor,
    counts: Counts,
    scope: str = "row",
) -> torch.Tensor:
    """The best pairs of every row, head or layer; of equal ones, those that come first.

    Nothing is sorted but the best, and nothing waits for the device.

    Args:
        scores: (B, H, N, n) [query tile, strip].
        seen: bool (B or 1, H or 1, N, n), what can be chosen.
        fixed: bool (H or 1, N, n), what is in whatever its score; it counts.
        counts: how many to choose, on the device of the scores.
        scope: "row", "head" or "layer": where their sum is held.

    Returns:
        bool (B, H, N, n).
    """
    must = (seen & fixed).expand_as(scores)
    value = scores.masked_fill(~seen, -torch.inf).masked_fill_(must, torch.inf)
    first = {"row": 3, "head": 2, "layer": 1}[scope]
    value = value.flatten(first)
    count, most = counts.within(scope)
    most = min(most, value.shape[-1])
    if most == 0:
        return must.clone()
    best = value.topk(most, dim=-1).values
    count = count.expand(*best.shape[:-1], 1)
    last = best.gather(-1, (count - 1).clamp(0, most - 1))
    above, equal = value > last, value == last
    room = count - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))
    return (chosen.view_as(scores) & seen) | must


def above(
    scores: torch.Tensor, seen: torch.Tensor, fixed: torch.Tensor, limit: float
) -> torch.Tensor:
    """Every pair whose score exceeds a limit, and what is in whatever its score."""
    return ((scores > limit) | fixed) & seen


def bounds(
    table: TileTable,
    fixed: torch.Tensor,
    counts: Counts,
    scope: str,
    price: torch.Tensor,
) -> tuple[float, float]:
    """The least and the most that a choice can cost, whatever the scores.

    Args:
        table: the pairs.
        fixed: bool (H or 1, N, n), pairs that are always in.
        counts: how many are chosen, for as many heads.
        scope: where counts are held.
        price: (P, E), what choosing a pair costs.

    Returns:
        Sums over the pairs of all heads, equal where all prices are.
    """
    seen = table.map(table.valid())[None]
    cost = seen.new_zeros(seen.shape, dtype=torch.float64)
    cost.masked_scatter_(seen, price.double()[table.pattern][table.valid()])
    cost = cost.expand(1, len(counts.rows), -1, -1)
    found = [float(cost[choose(x, seen, fixed, counts, scope)].sum()) for x in (-cost, cost)]
    return found[0], found[1]


def bounds_by_kind(
    fixed: torch.Tensor, rows: torch.Tensor, kind: torch.Tensor, price: torch.Tensor
) -> tuple[float, float]:
    """`bounds` by row where strips of a kind cost the same: without a number for every pair.

    Args:
        fixed: bool (N, n), pairs that are always in.
        rows: int64 (N,), how many strips each row has.
        kind: int64 (n,), the kind of each strip, from 0 to K - 1.
        price: fp64 (N, K), what choosing a strip of that kind costs.
    """
    kinds = price.shape[1]
    inside = torch.stack([fixed[:, kind == k].sum(1) for k in range(kinds)], 1)  # (N, K)
    free = kind.bincount(minlength=kinds) - inside
    room = (rows - inside.sum(1)).clamp(min=0)[:, None]
    always = float((inside * price).sum())

    def filled(descending: bool) -> float:
        ordered, order = price.sort(1, descending=descending)
        there = free.gather(1, order)
        taken = (room - (there.cumsum(1) - there)).clamp(min=0).minimum(there)
        return always + float((taken * ordered).sum())

    return filled(False), filled(True)
