"""The active pairs of every query tile as lists for a kernel to walk, made on the device."""

# mypy: disable-error-code="no-untyped-def"
# (what a kernel takes and returns are Triton's values and has no Python types)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from diffpatch.kernels.active_tiles.table import TileTable

AHEAD = 2  # pairs that the kernel reads beyond the end of a list
STEP = 1024  # pairs at a time


class Lists(NamedTuple):
    """What each query tile of each head visits.

    Attributes:
        pairs: int32 (B, H, E + AHEAD): from the place where the pairs of a query tile begin in the
            table, the numbers of its active ones in the order they are visited; 0 elsewhere.
        counts: int32 (B, H, N), how many.
        at: int64 (B, H, E), where each active pair stands in `pairs`, E for others; or None.
    """

    pairs: torch.Tensor
    counts: torch.Tensor
    at: torch.Tensor | None


def active_lists(table: TileTable, active: torch.Tensor, reverse: bool, places: bool) -> Lists:
    """The lists of flags bool (B, H, E), in one launch: nothing waits for the device.

    Args:
        table: the pairs.
        active: which of them each head visits.
        reverse: go from the last pair of a query tile to its first.
        places: whether to say where each pair stands.
    """
    batch, heads, length = active.shape
    tiles, active = table.num_tiles, active.contiguous()
    shape = (batch, heads, length + AHEAD)
    pairs = torch.zeros(shape, dtype=torch.int32, device=active.device)
    counts = torch.empty(batch, heads, tiles, dtype=torch.int32, device=active.device)
    at = torch.full(active.shape, length, device=active.device) if places else None
    list_kernel[tiles, batch * heads](
        active.view(torch.uint8), table.row_ptr, table.pattern, pairs, counts, at,
        heads, tiles, length, int(len(table.pattern) > 1),
        REVERSE=reverse, BLOCK=STEP, num_warps=4,
    )  # fmt: skip
    return Lists(pairs, counts, at)


@triton.jit
def list_kernel(
    ACTIVE, ROW_PTR, PATTERN, PAIRS, COUNTS, AT, heads, tiles, length, differ,
    REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the pairs of one query tile of one head of one batch entry.

    A byte of ACTIVE (B, H, length) says whether a pair is visited; PAIRS (B, H, length + 2), COUNTS
    (B, H, tiles) and AT, laid out like ACTIVE, are contiguous, and what is not written is there
    already. PATTERN says which row of ROW_PTR a head reads, the first for all unless they `differ`.
    """
    tile = tl.program_id(0)
    both = tl.program_id(1).to(tl.int64)
    pattern = tl.load(PATTERN + tl.program_id(1) % heads * differ)
    begin = tl.load(ROW_PTR + pattern * (tiles + 1) + tile)
    end = tl.load(ROW_PTR + pattern * (tiles + 1) + tile + 1)
    to = PAIRS + both * (length + 2) + begin
    found = 0
    for start in range(begin, end, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        held = pair < end
        if REVERSE:
            pair = begin + end - 1 - pair
        flag = tl.load(ACTIVE + both * length + pair, mask=held, other=0).to(tl.int32)
        place = found + tl.cumsum(flag, 0) - 1
        tl.store(to + place, pair, mask=flag != 0)
        if AT is not None:
            tl.store(AT + both * length + pair, (begin + place).to(tl.int64), mask=flag != 0)
        found += tl.sum(flag, 0)
    tl.store(COUNTS + both * tiles + tile, found)
