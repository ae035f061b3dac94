"""Attention over active tiles in PyTorch: work goes with the number of active tiles, on any device.

Without hits and gradients a CPU attends in rows, whatever head they belong to (`torch_rows`). Here
the softmax is written out, because the largest score of every tile is needed. Heads that visit
about as many tiles of a row go together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from diffpatch.kernels.active_tiles import torch_rows
from diffpatch.kernels.active_tiles.table import Result, TileTable, tile_table
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.gpu.common import LOG2_E
from diffpatch.kernels.pieces import Pieces

MAX_SCORES = 1 << 23  # scores held at a time
ALIKE = 0.75  # heads attend together if the shortest list is at least this part of the longest


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    active: torch.Tensor,
    scale: float,
    key_mask: torch.Tensor | None,
    threshold: float | None,
    reverse: bool,
    strip: int = 0,
) -> Result:
    """As `active_tiles.attend`; scores, softmax and sums in fp32 (fp64 for fp64 inputs)."""
    table = tile_table(blocks, strip)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if threshold is None and q.device.type == "cpu" and not needs_grad:
        out, lse = torch_rows.attend(q, k, v, blocks, table, active, scale, key_mask)
        return Result(out, lse, None)
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[2] // k.shape[2]
    keys, values = (_by_strip(x, table.strips, groups).to(wide) for x in (k, v))
    seen = table.strips.valid.expand(q.shape[0], -1, -1)
    seen = seen if key_mask is None else seen & key_mask[:, table.strips.index]
    run = _Run(table, keys, values, seen, threshold, reverse)
    out = torch.empty(q.shape, dtype=wide, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=wide, device=q.device)
    hits = torch.zeros_like(active)
    heads_of = table.pattern.expand(q.shape[2])
    starts, row_ptr = blocks.starts.tolist(), table.row_ptr.tolist()
    for p in range(table.key.shape[0]):
        heads = (heads_of == p).nonzero()[:, 0]
        if not len(heads):
            continue
        for i, (a, b) in enumerate(itertools.pairwise(row_ptr[p])):
            rows = blocks.order[starts[i] : starts[i + 1]]
            queries = q[:, rows][:, :, heads].transpose(1, 2).to(wide) * scale
            chosen = active[:, heads, a:b]
            found = run(queries, chosen, heads, table.key[p, a:b], table.mask_ids[p, a:b])
            out[:, rows[:, None], heads] = found[0].transpose(1, 2)
            lse[:, rows[:, None], heads] = found[1].transpose(1, 2)
            hits[:, heads, a:b] = found[2]
    return Result(out.to(q.dtype), lse, hits if threshold is not None else None)


def _by_strip(x: torch.Tensor, strips: Pieces, groups: int) -> torch.Tensor:
    """(B, S, K, D) -> (B, H, n, L, D)."""
    x = x if groups == 1 else x.repeat_interleave(groups, 2)
    return x.transpose(1, 2)[:, :, strips.index]


class _Run:
    """What all rows of one call share; calling it attends one query tile, for some heads."""

    def __init__(
        self,
        table: TileTable,
        keys: torch.Tensor,
        values: torch.Tensor,
        seen: torch.Tensor,
        threshold: float | None,
        reverse: bool,
    ) -> None:
        self.keys, self.values, self.seen = keys, values, seen
        self.threshold, self.reverse = threshold, reverse
        everything = table.masks.new_ones(1, *table.masks.shape[1:])
        self.masks = torch.cat([table.masks, everything]) if len(table.masks) else None

    def __call__(
        self,
        queries: torch.Tensor,
        active: torch.Tensor,
        heads: torch.Tensor,
        key: torch.Tensor,
        mask_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Attend queries (B, h, R, D) of `heads` to the active (B, h, n) of n key tiles.

        Returns:
            The output (B, h, R, D), its log-sum-exp (B, h, R) and the hits (B, h, n).
        """
        batch = torch.arange(len(queries), device=queries.device).repeat_interleave(len(heads))
        head = heads.repeat(len(queries))
        flat, flags = queries.flatten(0, 1), active.flatten(0, 1)
        out, hits = torch.zeros_like(flat), torch.zeros_like(flags)
        lse = flat.new_full(flat.shape[:2], -torch.inf)
        held = queries.shape[2] * self.keys.shape[3]
        for who, count in _alike(flags.sum(1).tolist(), held):
            index = torch.tensor(who, device=flags.device)
            tiles = flags[index].byte().argsort(dim=1, descending=True, stable=True)[:, :count]
            real = flags[index[:, None], tiles]
            where = batch[index][:, None], head[index][:, None], key[tiles]
            out[index], lse[index], found = self._attend(flat[index], where, real, mask_ids[tiles])
            hits[index[:, None], tiles] = found
        return out.view_as(queries), lse.view(queries.shape[:3]), hits.view_as(active)

    def _attend(
        self,
        queries: torch.Tensor,
        where: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        real: torch.Tensor,
        mask_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (G, R, D) to m tiles each, of which some are not `real` (G, m)."""
        seen = (self.seen[where[0], where[2]] & real[..., None])[:, None]  # (G, 1, m, T)
        if self.masks is not None:
            own = self.masks[mask_ids][:, :, : queries.shape[1]]  # (G, m, R, T)
            seen = seen & own.transpose(1, 2)
        keys, values = (x[where].flatten(1, 2) for x in (self.keys, self.values))
        scores = (queries @ keys.mT).unflatten(2, (*real.shape[1:], -1))
        scores = scores.masked_fill(~seen, -torch.inf)
        peaks = scores.amax(-1)  # (G, R, m)
        hits = torch.zeros_like(real)
        if self.threshold is not None:
            hits = _hits(peaks, self.threshold, self.reverse)
        top = peaks.amax(-1)
        top = top.masked_fill(top == -torch.inf, 0.0)
        weights = (scores - top[..., None, None]).exp().flatten(2)
        total = weights.sum(-1, keepdim=True)
        lse = total[..., 0].log() + top
        return weights @ values / total.masked_fill(total == 0, 1.0), lse, hits


def _hits(peaks: torch.Tensor, threshold: float, reverse: bool) -> torch.Tensor:
    """Which tiles exceed what came before them for some row: (G, R, m) -> bool (G, m)."""
    peaks = peaks.flip(-1) if reverse else peaks
    before = peaks.cummax(-1).values.roll(1, -1)
    before[..., 0] = -torch.inf
    hits = ((peaks - before) * LOG2_E > threshold).any(
        1
    )  # NaN, nothing after nothing, is not a hit
    return hits.flip(-1) if reverse else hits


def _alike(counts: list[int], held: int) -> Iterator[tuple[list[int], int]]:
    """Groups of heads with about as many tiles, and the most of each; none for heads without any.

    Args:
        counts: active tiles of each head.
        held: scores of one tile.
    """
    order = sorted(range(len(counts)), key=lambda n: -counts[n])
    while order and counts[order[0]]:
        most = counts[order[0]]
        room = max(1, MAX_SCORES // (most * held))
        size = sum(counts[n] >= ALIKE * most for n in order[:room])
        yield order[:size], most
        order = order[size:]
