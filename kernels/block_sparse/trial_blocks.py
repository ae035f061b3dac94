"""Block indexes that backends are tried on before "auto" may take them."""

from __future__ import annotations

import torch

from diffpatch.kernels.blocks import BlockIndex

TILE = 128
NEAR = 8  # tiles on each side that a query sees in the index to time


def small_blocks() -> BlockIndex:
    """Four tiles, the last one smaller, in another order than the sequence: every kind of row.

    A row of full tiles, one with a masked tile, one whose mask leaves some queries nothing, and one
    that sees nothing at all.
    """
    tokens = 3 * TILE + 37
    masks = torch.zeros(2, TILE, TILE, dtype=torch.bool)
    masks[0] = torch.ones(TILE, TILE).tril()
    masks[1, 5::7, 3::5] = True
    return _index(
        torch.arange(tokens).roll(50),
        [[(0, -1), (1, -1), (2, -1), (3, -1)], [(0, -1), (1, 0)], [(0, 1)], []],
        masks,
        tokens,
    )


def timed_blocks(tiles: int = 64) -> BlockIndex:
    """Tiles that see their neighbours, the outermost of them in part: about a quarter of 64."""
    rows = []
    for tile in range(tiles):
        first, last = max(0, tile - NEAR), min(tiles - 1, tile + NEAR)
        edges = {first, last} - {tile}
        inner = [(key, -1) for key in range(first, last + 1) if key not in edges]
        rows.append(inner + [(key, 0) for key in sorted(edges)])
    tokens = tiles * TILE
    order = torch.arange(tokens).view(-1, 2).T.reshape(-1)
    return _index(order, rows, torch.ones(1, TILE, TILE, dtype=torch.bool).tril(), tokens)


def _index(
    order: torch.Tensor, rows: list[list[tuple[int, int]]], masks: torch.Tensor, tokens: int
) -> BlockIndex:
    """Rows of (key tile, mask or -1), full tiles first."""

    def int32(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    lengths = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    full = torch.tensor([sum(mask < 0 for _, mask in row) for row in rows])
    return BlockIndex(
        order=order,
        starts=int32([*range(0, tokens, TILE), tokens]),
        row_ptr=lengths.int(),
        full_end=(lengths[:-1] + full).int(),
        cols=int32([key for row in rows for key, _ in row]),
        mask_ids=int32([mask for row in rows for _, mask in row]),
        masks=masks,
    )
