"""Active tiles on a CPU: rows of query tiles in one SDPA call each, whatever head they belong to.

A row is a query tile of one head of one batch entry. Rows that visit equally many strips are
stacked, their keys gathered in as few copies as there are strips: a strip is one piece of memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffpatch.kernels.active_tiles.table import TileTable
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.pieces import Pieces, cut, gathered

GATHERED = 8 << 20  # bytes of keys and values gathered at a time, which caches should hold
ALIKE = 0.75  # rows are stacked if the shortest list is at least this part of the longest


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    table: TileTable,
    active: torch.Tensor,
    scale: float,
    key_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `active_tiles.attend` without hits; no gradients.

    Returns:
        The output (B, S, H, D) and its log-sum-exp (B, S, H), fp32 or wider.
    """
    batch, _, heads, _ = q.shape
    tiles = cut(blocks)
    queries = _by_piece(q, tiles)  # (B, H, N, T, D)
    keys, values = (_by_piece(x, table.strips).flatten(0, 2) for x in (k, v))
    seen = _seen(table.strips, key_mask, batch)
    out = torch.empty_like(queries, memory_format=torch.contiguous_format).flatten(0, 2)
    lse = out.new_empty(out.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    rows = _rows(table, active)
    masks = None
    if len(table.masks):
        masks = torch.cat([table.masks, table.masks.new_ones(1, *table.masks.shape[1:])])
    room = GATHERED // (2 * keys[:1].numel() * keys.element_size())
    buffers = q.new_empty(2, max(room, len(table.strips)), *keys.shape[1:])
    flat = queries.flatten(0, 2)
    for who, count in rows.stacks(room):
        if count == 0:
            out[who], lse[who] = 0.0, -torch.inf
            continue
        strip, pair, real = rows.visits(who, count)  # (G, m) each
        head, entry = rows.head[who] * k.shape[2] // heads, rows.entry[who]
        at = ((entry * k.shape[2] + head) * len(table.strips))[:, None] + strip
        key, value = (
            _gather(x, at, buffer) for x, buffer in zip((keys, values), buffers, strict=True)
        )
        shown = real[..., None]  # (G, m, L or 1)
        if seen is not None:
            shown = seen[entry[:, None], strip] & shown
        bias = None  # (G, 1 or T, m, L)
        if not bool(shown.all()):
            bias = shown.expand(-1, -1, keys.shape[1])[:, None]
        if masks is not None:
            own = masks[table.mask_ids[table.pattern.expand(heads)[rows.head[who]][:, None], pair]]
            own = own.transpose(1, 2)
            bias = own if bias is None else own & bias
        out[who], lse[who] = _sdpa(flat[who], key, value, bias, scale)
    shape = (batch, heads, len(tiles), -1)
    return _in_sequence(out.view(*shape, out.shape[-1]), blocks, tiles), _in_sequence(
        lse.view(*shape, 1), blocks, tiles
    )[..., 0]


def _gather(x: torch.Tensor, at: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """Strips (V, L, D) at (G, m), in a buffer that is used again: (G, 1, m * L, D)."""
    out = buffer[: at.numel()]
    torch.index_select(x, 0, at.flatten(), out=out)
    return out.view(len(at), 1, -1, x.shape[-1])


def _by_piece(x: torch.Tensor, pieces: Pieces) -> torch.Tensor:
    """(B, S, H, D) -> (B, H, V, L, D) contiguous."""
    return gathered(x, pieces).permute(0, 3, 1, 2, 4).contiguous()


def _in_sequence(x: torch.Tensor, blocks: BlockIndex, pieces: Pieces) -> torch.Tensor:
    """The inverse, (B, S, H, D) contiguous."""
    held = x.flatten(2, 3) if pieces.even else x[:, :, pieces.valid]
    return held.transpose(1, 2).index_select(1, blocks.place)


def _seen(strips: Pieces, key_mask: torch.Tensor | None, batch: int) -> torch.Tensor | None:
    """bool (B, n, L), which keys count; None if all do."""
    if key_mask is not None:
        return strips.valid & key_mask[:, strips.index]
    return None if strips.even else strips.valid.expand(batch, -1, -1)


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows (b, h, i), R of them, and what they visit.

    Attributes:
        entry: int64 (R,), the batch entry of each.
        head: int64 (R,), its head.
        count: int64 (R,), how many strips it visits.
        first: int64 (R,), where they begin in `strip`.
        strip: int64 (V,), the strips of all rows, row by row.
        pair: int64 (V,), which pair of the table each visit is.
    """

    entry: torch.Tensor
    head: torch.Tensor
    count: torch.Tensor
    first: torch.Tensor
    strip: torch.Tensor
    pair: torch.Tensor

    def stacks(self, room: int) -> list[tuple[torch.Tensor, int]]:
        """Rows that go together, and the most strips that one of them visits.

        Args:
            room: strips that are gathered at a time.
        """
        count, order = self.count.sort(descending=True, stable=True)
        counts, out, i = count.tolist(), [], 0
        while i < len(counts):
            most = counts[i]
            if most == 0:
                out.append((order[i:], 0))
                break
            end = i + max(1, room // most)
            while counts[min(end, len(counts)) - 1] < ALIKE * most:
                end = min(end, len(counts)) - 1
            out.append((order[i:end], most))
            i = end
        return out

    def visits(
        self, who: torch.Tensor, most: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The strips, the pairs and which of them are real, (G, most) each."""
        nth = torch.arange(most, device=who.device)
        real = nth < self.count[who, None]
        at = (self.first[who, None] + nth).clamp(max=len(self.strip) - 1)
        return self.strip[at], self.pair[at], real


def _rows(table: TileTable, active: torch.Tensor) -> _Rows:
    batch, heads, _ = active.shape
    tiles = table.num_tiles
    entry, head, pair = active.nonzero(as_tuple=True)
    pattern = table.pattern.expand(heads)[head]
    row = (entry * heads + head) * tiles + table.query[pattern, pair]
    count = row.bincount(minlength=batch * heads * tiles)
    number = torch.arange(len(count), device=count.device)
    return _Rows(
        entry=number // (heads * tiles),
        head=number // tiles % heads,
        count=count,
        first=count.cumsum(0) - count,
        strip=table.key[pattern, pair],
        pair=pair,
    )


def _sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    allowed: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (G, T, D), k and v (G, 1, M, D), allowed bool (G, 1 or T, m, L) -> (G, T, D), (G, T)."""
    bias = blind = None
    if allowed is not None:
        allowed = allowed.flatten(2)[:, None]
        blind = ~allowed.any(-1)  # (G, 1, 1 or T)
        if bool(blind.any()):
            allowed = allowed | blind[..., None]
        else:
            blind = None
        bias = q.new_zeros(allowed.shape).masked_fill_(~allowed, -torch.inf)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(q[:, None], k, v, attn_mask=bias, scale=scale)
    if blind is not None:
        out = out.masked_fill(blind[..., None], 0.0)
        lse = lse.masked_fill(blind, -torch.inf)
    return out[:, 0], lse[:, 0]
