"""Rows that see the same keys, found in a block index, and what the torch backend makes of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import diffpatch
from diffpatch import TokenGrid
from diffpatch.kernels.block_sparse.api import block_sparse_attention
from diffpatch.kernels.block_sparse.reference import dense_mask
from diffpatch.kernels.block_sparse.torch_plan import attend as block_sparse_torch
from diffpatch.kernels.block_sparse.torch_plan import grouping as block_sparse_grouping
from diffpatch.kernels.block_sparse.torch_plan import views as block_sparse_views
from diffpatch.kernels.block_sparse.torch_plan.calls import SdpaPlan, plans
from diffpatch.kernels.block_sparse.torch_plan.views import Kinds, Views
from diffpatch.kernels.blocks import BlockIndex
from tests.kernels.random_blocks import random_blocks, random_qkv


def index(name: str, grid: TokenGrid, **params: object) -> BlockIndex:
    method = diffpatch.make_method(name, **params)
    return method.pattern(grid, method.variant(0, 0)).blocks


def table(blocks: BlockIndex) -> torch.Tensor:
    ends = torch.zeros(1, *blocks.masks.shape[1:]), torch.ones(1, *blocks.masks.shape[1:])
    return torch.cat([blocks.masks, *(end.bool() for end in ends)])


def shares(plan: SdpaPlan, tokens: int) -> tuple[float, float]:
    """Pairs that the calls compute, and those under a mask, as shares of all."""
    areas = {call: call.stack * call.rows * call.num_keys for call in plan.calls}
    masked = sum(area for call, area in areas.items() if call.mask is not None)
    return sum(areas.values()) / tokens**2, masked / tokens**2


@pytest.mark.parametrize(
    "blocks",
    [
        index("disc", TokenGrid(5, 10, 14), radius=4),
        index("neighborhood", TokenGrid(4, 9, 11), stride=1, window=(-1, 5, 5)),
        index("radial", TokenGrid(9, 8, 8)),
        random_blocks([9, 4, 9, 9, 7, 3], partial=0.5, kept=0.5, edge=9, seed=2),
    ],
)
def test_parts_and_classes_are_the_equal_rows_and_columns_of_the_mask(blocks: BlockIndex) -> None:
    views = Views(blocks, 0, table(blocks))
    mask = dense_mask(blocks)[0][blocks.order][:, blocks.order]
    assert views.exact
    for kinds, lines in ((views.parts, mask), (views.classes, mask.T)):
        first = torch.from_numpy(kinds.first)
        assert torch.equal(lines[first][torch.from_numpy(kinds.of_place)], lines)
        # A mask that is full as far as its tile goes is not known to be: kinds may be equal.
        assert len(first) <= len(lines.unique(dim=0)) + 2
        assert kinds.sizes.sum() == blocks.num_tokens
    rows, columns = (torch.from_numpy(x.first) for x in (views.parts, views.classes))
    assert torch.equal(torch.from_numpy(views.sees), mask[rows][:, columns])


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("least_rows", [30, 200])
def test_discs_over_all_frames_equal_the_reference(
    exact: bool, least_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = index("disc", TokenGrid(5, 10, 14), radius=4)
    if not exact:
        monkeypatch.setattr(block_sparse_views, "MAX_KINDS", 20)
        monkeypatch.setattr(block_sparse_torch, "MAX_GATHERED", 1)  # one head at a time
        monkeypatch.setattr(block_sparse_torch, "MAX_CACHED_MASKS", 0)
    for name, value in (("LEAST_ROWS", least_rows), ("KEY_COST", 0.0), ("CALL_COST", 0.0)):
        monkeypatch.setattr(block_sparse_grouping, name, value)
    q, k, v = random_qkv(2, blocks.num_tokens, 2, 16, torch.float64)
    key_mask = torch.rand(2, blocks.num_tokens) < 0.5
    for keys in (None, key_mask):
        out, lse, expected, expected_lse = (
            x
            for backend in ("torch", "reference")
            for x in block_sparse_attention(
                q, k, v, blocks, key_mask=keys, backend=backend, return_lse=True
            )
        )
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(lse, expected_lse)
    (plan,) = plans(blocks, merging=True)
    masks = [call.mask for call in plan.calls if call.mask is not None]
    assert masks and all((mask.row_kinds is not None) == exact for mask in masks)


def test_rows_that_share_most_keys_follow_each_other() -> None:
    """By keys, not by classes of them: one class of ten outweighs two of one."""
    sees = np.array([[1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 0, 1]], dtype=bool)
    seen: Any = SimpleNamespace(sees=sees, classes=Kinds(np.repeat([0, 1, 2, 3], [10, 1, 1, 1])))
    units = [np.array([part]) for part in range(3)]
    found = block_sparse_grouping._chain(seen, units)
    assert [int(unit[0]) for unit in found] == [0, 2, 1]
    # As a share of what the larger of the two sees: all of it for the last.
    sees = np.array([[1, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]], dtype=bool)
    seen.sees, seen.classes = sees, Kinds(np.array([0, 1, 2, 3]))
    assert [int(unit[0]) for unit in block_sparse_grouping._chain(seen, units)] == [0, 2, 1]


@pytest.mark.parametrize("radius", [0.3, 0.6, 0.8, 1.2])
def test_discs_are_cut_finely_and_never_cost_much_more_than_dense(radius: float) -> None:
    pattern = diffpatch.make_method("disc", radius=radius).pattern(TokenGrid(16, 32, 32), None)
    blocks, kept = pattern.blocks, pattern.kept
    (plan,) = plans(blocks, merging=True)
    computed, masked = shares(plan, blocks.num_tokens)
    assert kept <= computed <= 1.4 * kept
    assert masked <= min(computed, 0.3)
    # A row of each kind is enough: 16 frames make one.
    assert plan.mask_entries <= masked * blocks.num_tokens**2 / 16


def test_a_pattern_of_too_many_kinds_of_rows_is_cut_by_tiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = index("neighborhood", TokenGrid(6, 12, 12), stride=1, window=(3, 5, 5))
    assert Views(blocks, 0, table(blocks)).exact
    monkeypatch.setattr(block_sparse_views, "MAX_KINDS", 100)
    views = Views(blocks, 0, table(blocks))
    assert not views.exact and len(views.parts.sizes) == blocks.num_tiles
