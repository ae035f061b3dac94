"""Several temporal methods tried side by side on one dense run, to choose among them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from diffpatch.kernels import dense as dense_attention
from diffpatch.methods.base import Attended, Call, Method
from diffpatch.methods.temporal.method import Temporal, phase
from diffpatch.patterns.grid import TokenGrid
from diffpatch.patterns.pattern import BlockPattern


@dataclass(frozen=True)
class Trial(Method):
    """Dense attention that notes how far each of some temporal methods would have been off."""

    name: ClassVar[str] = "trial"
    needs_steps: ClassVar[bool] = True
    dynamic: ClassVar[bool] = True

    candidates: tuple[Temporal, ...]
    errors: defaultdict[tuple[int, int], list[torch.Tensor]] = field(
        default_factory=lambda: defaultdict(list), compare=False, repr=False
    )

    @property
    def kinds(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the candidates make sense for."""
        return self.candidates[0].kinds

    def variant(self, layer: int, step: int) -> Hashable:
        return self.candidates[0].variant(layer, step)

    def pattern(self, grid: TokenGrid, variant: Hashable = None) -> BlockPattern:
        return self.candidates[0].pattern(grid, variant)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> Attended:
        """The dense answer; every candidate goes on with a state of its own."""
        exact = dense_attention.attend(q, k, v, call.scale, call.key_mask)
        for i, candidate in enumerate(self.candidates):
            own = replace(call, state=call.state.setdefault(str(i), {}))
            wrong = candidate.attend(q, k, v, own).out.float() - exact.float()
            self.errors[phase(call), i].append(wrong.abs().sum() / exact.float().abs().sum())
        return Attended(exact, 1.0, "dense")
