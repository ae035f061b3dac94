"""Temporal attention: what a sparse method leaves out is remembered from an earlier step."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch

from diffpatch.errors import BadParameter
from diffpatch.grid import TokenGrid
from diffpatch.kernels import virtual_tokens
from diffpatch.methods.base import Attended, Call, Method, param, register
from diffpatch.methods.radial import Radial
from diffpatch.pattern import BlockPattern


@register
@dataclass(frozen=True)
class Temporal(Method):
    """Another static method plus the cached remainder of dense attention (the tail cache).

    Every `refresh` steps the rest of the attention is computed too, so that the step is dense, and
    stored: its output and its log-sum-exp. On the steps between, the current sparse result and the
    stored rest are merged as one softmax, so that the weight of the old rest follows the current
    queries. State is kept for each layer and guidance branch and dies with the run.

    Written ``"radial+temporal"``, ``"window+temporal"`` and so on.
    """

    name = "temporal"
    summary = "a sparse method now, plus what it misses as of the last dense step"
    source = "tail cache; with frozen shares it is Re-ttention, arXiv 2505.22918"
    needs_steps = True
    default_dense_steps = 0.15

    over: Method = param(Radial(), "the sparse method, as in 'radial+temporal'")
    refresh: int = param(4, "steps from one dense refresh to the next")
    budget_gib: float = param(8.0, "most memory for the stored tails of a run, in GiB")

    def __post_init__(self) -> None:
        whole = isinstance(self.refresh, int) and self.refresh >= 2
        self.check(whole, "refresh", "a count of at least 2; 1 would be dense attention")
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

    @property
    def size_parameters(self) -> tuple[str, ...]:  # type: ignore[override]
        """What sets how much the wrapped method keeps."""
        return self.over.size_parameters

    def sized(self, amount: float, kind: str = "video") -> Temporal:
        return replace(self, over=self.over.sized(amount, kind))

    def variant(self, layer: int, step: int) -> Hashable:
        # A pattern that moved with the step would not fit the tail it is merged with.
        return self.over.variant(layer, 0)

    def pattern(self, grid: TokenGrid, variant: Hashable = None) -> BlockPattern:
        return self.over.pattern(grid, variant)

    def kept(self, pattern: BlockPattern, age: int) -> float:
        return 1.0 if age % self.refresh == 0 else pattern.kept

    def state_size(self, tokens: int, heads: int, head_dim: int) -> int:
        return tokens * heads * (2 * head_dim + 4)  # outputs, and a 32-bit log-sum-exp each

    def state_limit(self) -> float:
        return self.budget_gib * 2**30

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> Attended:
        state, kept = call.state, call.pattern.kept
        near, near_lse, used = call.sparse(q, k, v)
        fits = "out" in state and state["pattern"] is call.pattern and state["out"].shape == q.shape
        due = not fits or call.step - state["step"] >= self.refresh
        if not due:
            out, _ = virtual_tokens.merge(near, near_lse, state["out"], state["lse"])
            return Attended(out, kept, used)
        far, far_lse, _ = call.sparse(q, k, v, call.pattern.rest())
        state.update(out=far, lse=far_lse, step=call.step, pattern=call.pattern)
        full, _ = virtual_tokens.merge(near, near_lse, far, far_lse)
        return Attended(full, 1.0, used)
