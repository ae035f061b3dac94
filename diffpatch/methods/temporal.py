"""Temporal attention: what a sparse method leaves out is remembered from an earlier step."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass

import torch

from diffpatch.errors import BadParameter
from diffpatch.grid import TokenGrid
from diffpatch.kernels import virtual_tokens
from diffpatch.methods.base import Attended, Call, Method, param, register
from diffpatch.methods.radial import Radial
from diffpatch.pattern import BlockPattern, from_tiles
from diffpatch.tiles import Tiling, choose_tile

_FULL = 1e-3  # a remainder with less than this share of the softmax is not worth keeping


@register
@dataclass(frozen=True)
class Temporal(Method):
    """Another static method plus the cached remainder of dense attention (the tail cache).

    Every `refresh` steps attention is dense, and for each query what the sparse pattern misses is
    stored: its output and its share of the softmax. On the steps between, the current sparse result
    and the stored tail are merged as one softmax, so that the weight of the old tail follows the
    current queries. State is kept for each layer and guidance branch and dies with the run.

    Written ``"radial+temporal"``, ``"window+temporal"`` and so on.
    """

    name = "temporal"
    summary = "a sparse method now, plus what it misses as of the last dense step"
    source = "tail cache; with frozen shares it is Re-ttention, arXiv 2505.22918"
    default_dense_steps = 0.15

    over: Method = param(Radial(), "the sparse method, as in 'radial+temporal'")
    refresh: int = param(4, "steps from one dense refresh to the next")
    budget_gib: float = param(8.0, "most memory for the stored tails of a run, in GiB")

    def __post_init__(self) -> None:
        self.check(self.refresh >= 2, "refresh", "at least 2; 1 would be dense attention")
        nested = isinstance(self.over, Temporal) or type(self.over).attend is not Method.attend
        if nested:
            raise BadParameter(
                f"temporal: it remembers what a method leaves out, and {self.over.name} leaves"
                " nothing out; combine it with radial, neighborhood or window"
            )

    @property
    def kinds(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the wrapped method makes sense for."""
        return self.over.kinds

    def variant(self, layer: int, step: int) -> Hashable:
        # A pattern that moved with the step would not fit the tail it is merged with.
        return self.over.variant(layer, 0)

    def pattern(self, grid: TokenGrid, variant: Hashable = None) -> BlockPattern:
        return self.over.pattern(grid, variant)

    def kept(self, pattern: BlockPattern, age: int) -> float:
        return pattern.kept + (age % self.refresh == 0)

    def state_limit(self) -> float:
        return self.budget_gib * 2**30

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> Attended:
        state, kept = call.state, call.pattern.kept
        near, near_lse, used = call.sparse(q, k, v)
        due = "out" not in state or call.step - state["step"] >= self.refresh
        if not due:
            out, _ = virtual_tokens.merge(near, near_lse, state["out"], state["lse"])
            return Attended(out, kept, used)
        full, full_lse, _ = call.sparse(q, k, v, _everything(call.pattern.grid))
        state["out"], state["lse"] = remainder(near, near_lse, full, full_lse)
        state["step"] = call.step
        return Attended(full, 1.0 + kept, used)


@functools.lru_cache(maxsize=4)
def _everything(grid: TokenGrid) -> BlockPattern:
    """The pattern that keeps all, for dense attention that also gives its log-sum-exp."""
    tiling = Tiling.even(grid, choose_tile(grid.shape))
    return from_tiles(grid, tiling, torch.ones((tiling.num_visual,) * 2, dtype=torch.bool))


def remainder(
    near: torch.Tensor, near_lse: torch.Tensor, full: torch.Tensor, full_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is in the full attention and not in the near one: (output, log-sum-exp).

    Rows of which (almost) nothing is missing get output 0 and log-sum-exp -inf.
    """
    share = (near_lse - full_lse).exp().clamp(max=1.0)  # (B, S, H), of the softmax that is near
    missing = 1.0 - share
    empty = missing < _FULL
    lse = (full_lse + missing.clamp(min=_FULL).log()).masked_fill(empty, float("-inf"))
    rest = (full - share[..., None] * near) / missing.clamp(min=_FULL)[..., None]
    return rest.masked_fill(empty[..., None], 0.0).to(full.dtype), lse
