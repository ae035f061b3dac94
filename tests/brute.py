"""Patterns by brute force: a rule asked for every pair of tokens of a small grid."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from diffpatch import TokenGrid
from diffpatch.patterns.pattern import BlockPattern

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


def border(i: int, length: int, count: int) -> int:
    """The i-th border of an axis cut into `count` equal parts: the nearest integer, halves down."""
    return math.ceil((2 * i * length - count) / (2 * count))


def gna(q: int, k: int, length: int, window: int, stride: int, dilation: int, causal: bool) -> bool:
    """Generalized Neighborhood Attention along one axis, written as the paper's text says it."""
    if q % dilation != k % dilation:
        return False
    size = math.ceil((length - q % dilation) / dilation)
    q, k = q // dilation, k // dilation
    if causal:
        leader = min(q // stride * stride + stride - 1, size - 1)
        return max(leader - window + 1, 0) <= k <= q
    leader = min(q // stride * stride + stride // 2, size - 1)
    start = leader - window // 2
    start = min(max(start, 0), size - window)
    return start <= k < start + window


def published_by_hand(grid: TokenGrid, decay: float, sink: bool) -> torch.Tensor:
    """The measured rule block by block from the token mask of every pair of frames."""
    f, s, n = grid.num_frames, grid.frame_tokens, grid.visual_tokens
    blocks = math.ceil(n / 128)
    keep = torch.eye(blocks, dtype=torch.bool)
    for i, j in itertools.product(range(f), repeat=2):
        d = abs(i - j)
        width = 2 ** int(math.log2(s)) / 2 ** int(math.log2(max(d, 1)))
        pair = (torch.arange(s)[:, None] - torch.arange(s)).abs() <= max(decay * width, 128)
        if d <= 1 or (sink and j == 0):
            pair[:] = True
        elif width < 128 and d % int(128 / width):
            pair[:] = False
        mask = torch.zeros(blocks * 128, blocks * 128, dtype=torch.bool)
        mask[i * s : (i + 1) * s, j * s : (j + 1) * s] = pair
        rows = torch.tensor([min(128, n - b * 128) for b in range(blocks)])
        density = mask.view(blocks, 128, -1).sum(1) / rows[:, None]  # (block, key token)
        density = density.view(blocks, blocks, 128)
        keep |= (density > 1 / 3).sum(-1) > 0.6 * (density > 0).sum(-1)
    return keep
