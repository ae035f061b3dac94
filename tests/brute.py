"""Patterns by brute force: a rule asked for every pair of tokens of a small grid."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from diffpatch import TokenGrid
from diffpatch.pattern import BlockPattern

GRIDS = [
    TokenGrid(3, 5, 7),
    TokenGrid(5, 4, 9, text_before=6),
    TokenGrid(4, 7, 6, text_after=11),
    TokenGrid(1, 13, 11, text_before=3, text_after=2),
    TokenGrid(7, 1, 10),
]
Position = tuple[int, int, int]
Rule = Callable[[Position, Position], bool]


def brute_force(grid: TokenGrid, rule: Rule) -> torch.Tensor:
    """bool (S, S), text seeing and seen by everything, the rule asked for every visual pair."""
    mask = torch.ones(grid.num_tokens, grid.num_tokens, dtype=torch.bool)
    frames, rows, columns = map(range, grid.shape)
    positions = list(itertools.product(frames, rows, columns))
    for (i, q), (j, k) in itertools.product(enumerate(positions), repeat=2):
        mask[grid.text_before + i, grid.text_before + j] = rule(q, k)
    return mask


def check(pattern: BlockPattern, expected: torch.Tensor) -> None:
    assert torch.equal(pattern.dense()[0], expected)
    assert pattern.kept == pytest.approx(expected.float().mean().item(), abs=1e-6)
