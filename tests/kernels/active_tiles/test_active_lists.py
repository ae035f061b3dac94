"""The lists of active pairs that a kernel makes on the device, against lists made one by one."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from diffpatch import Dense, Neighborhood, TokenGrid
from diffpatch.kernels.active_tiles import triton_lists
from diffpatch.kernels.active_tiles.table import TileTable, tile_table
from diffpatch.kernels.blocks import BlockIndex
from tests.exactness import poisoned
from tests.kernels.gpu.triton_interpreter import interpreted
from tests.kernels.random_blocks import random_blocks

HEADS = 3
ODD = TokenGrid(3, 7, 9, text_before=5, text_after=3)


def listed(table: TileTable, active: torch.Tensor, reverse: bool) -> list[list[list[list[int]]]]:
    """The active pairs [batch][head][query tile], in the order they are visited."""
    step = -1 if reverse else 1
    found = []
    for entry in active.tolist():
        of_heads = []
        for flags, pattern in zip(entry, table.pattern.expand(HEADS).tolist(), strict=True):
            ends = table.row_ptr[pattern].tolist()
            rows = [range(ends[n], ends[n + 1])[::step] for n in range(table.num_tiles)]
            of_heads.append([[pair for pair in row if flags[pair]] for row in rows])
        found.append(of_heads)
    return found


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("blocks", "strip"),
    [
        (Dense(tile=16).pattern(ODD).blocks, 6),
        (Neighborhood(window=(1, 5, 5)).pattern(ODD).blocks, 0),
        (random_blocks([5, 8, 3, 8, 7], kept=0.7, heads=[0, 1, 0], seed=3), 3),
    ],
)
def test_lists_are_those_made_one_by_one(blocks: BlockIndex, strip: int, reverse: bool) -> None:
    table, random = tile_table(blocks, strip), torch.Generator().manual_seed(0)
    active = torch.rand(2, HEADS, table.length, generator=random) < 0.6
    active &= table.valid()
    active[1, 1] = False
    with interpreted(), poisoned(), mock.patch.object(triton_lists, "STEP", 16):  # many steps a row
        found = triton_lists.active_lists(table, active, reverse, places=True)
    expected = listed(table, active, reverse)
    assert found.at is not None and found.pairs.shape[2] == table.length + triton_lists.AHEAD
    row_ptr = table.row_ptr[table.pattern.expand(HEADS)].tolist()
    stands = torch.full_like(found.at, table.length)
    for b, of_heads in enumerate(expected):
        for h, rows in enumerate(of_heads):
            assert found.counts[b, h].tolist() == [len(row) for row in rows]
            for begin, row in zip(row_ptr[h], rows, strict=False):
                assert found.pairs[b, h, begin : begin + len(row)].tolist() == row
                stands[b, h, row] = torch.arange(begin, begin + len(row))
    assert torch.equal(found.at, stands)
    assert found.pairs.min() >= 0 and found.pairs.max() < table.length  # the kernel reads ahead
    assert (found.counts == 0).any() and found.counts.max() > 1


def test_where_pairs_stand_is_said_only_if_asked_for() -> None:
    table = tile_table(Dense(tile=16).pattern(ODD).blocks)
    active = torch.ones(1, 1, table.length, dtype=torch.bool)
    with interpreted():
        found = triton_lists.active_lists(table, active, False, places=False)
    assert found.at is None
    assert found.pairs[0, 0].tolist() == [*range(table.length), 0, 0]
