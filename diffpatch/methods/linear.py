"""Attention that is exact nearby and summarises the far, in one softmax; needs no training."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Hashable
from dataclasses import dataclass

import torch

from diffpatch.grid import TokenGrid
from diffpatch.kernels import linear_attention, virtual_tokens
from diffpatch.methods import axis
from diffpatch.methods.base import Attended, Call, Method, param, register
from diffpatch.pattern import BlockPattern, from_tiles
from diffpatch.tiles import Tiling, choose_tile

FARS = ("pool", "state")
NEAR = 1024  # tokens of a window of fixed size


@register
@dataclass(frozen=True)
class Linear(Method):
    """Near tiles exactly and all text; nothing is dropped, the far is summarised.

    With ``far="pool"`` every other run of `pool` tokens is one virtual token. With ``far="state"``
    all far tokens together are one state of the moments of their keys and values, and the window
    holds a fixed number of tokens instead of a share of them: cost and memory are then strictly
    linear in the tokens. At equal cost both stay much closer to dense attention than dropping the
    far tiles.
    """

    name = "linear"
    summary = "near tiles exactly, far tiles by pooled virtual tokens in the same softmax"
    source = "piecewise attention: PISA, arXiv 2602.01077; second order: PWT"
    default_dense_steps = 0.15

    density: float = param(0.125, "share of the tiles that each query sees exactly")
    pool: int = param(64, "tokens that one virtual token stands for")
    second_order: bool = param(True, "count the spread of the keys within a run, capped")
    far: str = param("pool", "the rest: 'pool' (virtual tokens) or 'state' (moments, linear cost)")
    near: int | None = param(
        None,
        "see about this many tokens exactly, whatever the grid, instead of a share; a state 1024",
    )

    def __post_init__(self) -> None:
        self.check(0 < self.density <= 1, "density", "in (0, 1]")
        self.check(isinstance(self.pool, int) and self.pool >= 1, "pool", "a count of at least 1")
        self.check(self.far in FARS, "far", f"one of {', '.join(FARS)}")
        count = self.near is None or (isinstance(self.near, int) and self.near >= 1)
        self.check(count, "near", "a count of at least 1, or None")

    def pattern(self, grid: TokenGrid, variant: Hashable = None) -> BlockPattern:
        """The exact part; its `kept` counts a virtual token or a state as one key."""
        tiling = Tiling.even(grid, choose_tile(grid.shape, limits=[-(-n // 3) for n in grid.shape]))
        windows = _windows(tiling.counts, self._share(grid))
        t, h, w = (
            axis.tile_windows(n, size) for n, size in zip(tiling.counts, windows, strict=True)
        )
        keep = t[:, None, None, :, None, None] & h[:, None, None, :, None] & w[:, None, None, :]
        keep = keep.reshape(tiling.num_visual, tiling.num_visual)
        pattern = from_tiles(grid, tiling, keep)
        if pattern.kept >= 1:
            return pattern
        if self.far == "pool":
            runs = -(-tiling.visual_sizes // self.pool)
            pairs = (tiling.visual_sizes @ (~keep).long() @ runs).item()
        else:
            pairs = grid.visual_tokens
        return dataclasses.replace(pattern, kept=pattern.kept + pairs / grid.num_tokens**2)

    def _share(self, grid: TokenGrid) -> float:
        """The share of the visual tokens that a query sees exactly."""
        near = NEAR if self.near is None and self.far != "pool" else self.near
        return self.density if near is None else min(1.0, near / grid.visual_tokens)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> Attended:
        near, near_lse, used = call.sparse(q, k, v)
        far, far_lse = self._far(q, k, v, call)
        out, _ = virtual_tokens.merge(near, near_lse, far, far_lse)
        return Attended(out, call.pattern.kept, used)

    def _far(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention to all that the pattern leaves out: (B, S, H, D), its log-sum-exp (B, S, H)."""
        blocks = call.pattern.on(q.device)
        scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
        if self.far == "state":
            return linear_attention.attend_cumulants(q, k, v, blocks, scale, call.key_mask)
        tokens = virtual_tokens.pool(
            k, v, blocks, self.pool, second_order=self.second_order, key_mask=call.key_mask
        )
        return virtual_tokens.attend_virtual(q, tokens, blocks, scale)


def _windows(counts: tuple[int, int, int], share: float) -> tuple[int, ...]:
    """Tiles along each axis whose product is nearest to a share of all, of even proportions."""

    def misfit(sizes: tuple[int, ...]) -> float:
        shares = [s / n for s, n in zip(sizes, counts, strict=True)]
        uneven = math.log(max(shares) / min(shares))
        return abs(math.log(math.prod(shares) / share)) + 0.2 * uneven

    return min(itertools.product(*(range(1, n + 1) for n in counts)), key=misfit)
