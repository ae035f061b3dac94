"""What `dynamic` does by itself on grids of different sizes."""

from __future__ import annotations

import pytest
import torch

from diffpatch import Dynamic, TokenGrid
from diffpatch.kernels.active_tiles.table import tile_table
from diffpatch.methods.base import AttentionCall
from tests.kernels.random_blocks import random_qkv


def test_tiles_are_finer_on_small_grids_and_coarser_on_large_ones() -> None:
    method = Dynamic(rest="virtual")
    sizes = []
    for grid in (TokenGrid(13, 16, 16), TokenGrid(1, 64, 64), TokenGrid(16, 56, 64)):
        blocks = method.pattern(grid).blocks
        strips = tile_table(blocks, method.keys_of(grid)).strips
        sizes.append((int(blocks.sizes.max()), strips.longest))
    assert sizes == [(32, 32), (64, 32), (128, 64)]
    assert Dynamic(pool=64).keys_of(TokenGrid(1, 64, 64)) == 64
    long = TokenGrid(33, 16, 16)
    assert int(method.pattern(long).blocks.sizes.max()) == 128 and method.keys_of(long) == 32
    assert [Dynamic(rest="drop").keys_of(TokenGrid(n, 16, 16)) for n in (13, 33)] == [32, 128]


def test_the_rest_is_dropped_on_long_sequences_and_virtual_on_short_ones() -> None:
    short, long = TokenGrid(31, 11, 24), TokenGrid(32, 11, 24)  # 8,184 and 8,448 tokens
    for grid, rest, other in ((short, "virtual", "drop"), (long, "drop", "virtual")):
        tensors = random_qkv(2, grid.num_tokens, 4, 16, key_heads=2)
        found, same, different = (
            method.attend(*tensors, AttentionCall(method.pattern(grid)))
            for method in (Dynamic(rest=name) for name in ("auto", rest, other))
        )
        assert torch.equal(found.out, same.out) and found.kept == same.kept
        assert not torch.equal(found.out, different.out)


def test_long_clips_are_planned_without_a_number_for_every_pair() -> None:
    method, grid = Dynamic(rest="virtual"), TokenGrid(84, 45, 80)
    pattern = method.pattern(grid)
    assert method.kept_at(pattern, 0) == pytest.approx(0.25, abs=6e-3)
    table = tile_table(pattern.blocks, method.keys_of(grid))
    assert method.state_size(pattern, 40, 128) == 40 * -(-table.length // 8)
    assert "pairs" not in vars(table)  # at a million tokens 8 GiB of them
