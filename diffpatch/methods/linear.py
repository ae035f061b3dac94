"""Piecewise attention: exact on near tiles, every other tile by a few virtual tokens."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Hashable
from dataclasses import dataclass

import torch

from diffpatch.grid import TokenGrid
from diffpatch.kernels import virtual_tokens
from diffpatch.methods import axis
from diffpatch.methods.base import Attended, Call, Method, param, register
from diffpatch.pattern import BlockPattern, from_tiles
from diffpatch.tiles import Tiling, choose_tile


@register
@dataclass(frozen=True)
class Linear(Method):
    """Piecewise attention, training-free: nothing is dropped, the far is summarised.

    Each query sees a window of whole tiles around it exactly (and all text), and every other run of
    `pool` tokens as one virtual token, in the same softmax. At equal cost this stays much closer to
    dense attention than dropping the far tiles; plain feature-map linear attention, by contrast,
    does not work on a model that was not trained for it, and is not offered.
    """

    name = "linear"
    summary = "near tiles exactly, far tiles by pooled virtual tokens in the same softmax"
    source = "piecewise attention: PISA, arXiv 2602.01077; second order: PWT"
    default_dense_steps = 0.15

    density: float = param(0.125, "share of the tiles that each query sees exactly")
    pool: int = param(64, "tokens that one virtual token stands for")
    second_order: bool = param(True, "count the spread of the keys within a run, capped")

    def __post_init__(self) -> None:
        self.check(0 < self.density <= 1, "density", "in (0, 1]")
        self.check(isinstance(self.pool, int) and self.pool >= 1, "pool", "a count of at least 1")

    def pattern(self, grid: TokenGrid, variant: Hashable = None) -> BlockPattern:
        """The exact part; its `kept` counts the virtual tokens as keys."""
        tiling = Tiling.even(grid, choose_tile(grid.shape, limits=[-(-n // 3) for n in grid.shape]))
        windows = self._windows(tiling.counts)
        t, h, w = (
            axis.tile_windows(n, size) for n, size in zip(tiling.counts, windows, strict=True)
        )
        keep = t[:, None, None, :, None, None] & h[:, None, None, :, None] & w[:, None, None, :]
        keep = keep.reshape(tiling.num_visual, tiling.num_visual)
        pattern = from_tiles(grid, tiling, keep)
        if pattern.kept >= 1:
            return pattern
        runs = -(-tiling.visual_sizes // self.pool)
        pairs = (tiling.visual_sizes @ (~keep).long() @ runs).item()
        return dataclasses.replace(pattern, kept=pattern.kept + pairs / grid.num_tokens**2)

    def _windows(self, counts: tuple[int, int, int]) -> tuple[int, ...]:
        """Tiles along each axis whose product is nearest to the density, of even proportions."""

        def misfit(sizes: tuple[int, ...]) -> float:
            shares = [s / n for s, n in zip(sizes, counts, strict=True)]
            uneven = math.log(max(shares) / min(shares))
            return abs(math.log(math.prod(shares) / self.density)) + 0.2 * uneven

        return min(itertools.product(*(range(1, n + 1) for n in counts)), key=misfit)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> Attended:
        near, near_lse, used = call.sparse(q, k, v)
        blocks = call.pattern.on(q.device)
        tokens = virtual_tokens.pool(
            k, v, blocks, self.pool, second_order=self.second_order, key_mask=call.key_mask
        )
        scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
        far, far_lse = virtual_tokens.attend_virtual(q, tokens, blocks, scale)
        out, _ = virtual_tokens.merge(near, near_lse, far, far_lse)
        return Attended(out, call.pattern.kept, used)
