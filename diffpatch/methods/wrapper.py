"""Methods over methods: what a wrapper does not say itself, the wrapped method says."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from diffpatch.kernels.block_sparse.work import Work
from diffpatch.methods.base import Attended, AttentionCall, Method
from diffpatch.methods.learned.files import Layer, Learned
from diffpatch.methods.slowing import Slowing
from diffpatch.patterns.grid import TokenGrid
from diffpatch.patterns.pattern import BlockPattern


@dataclass(frozen=True)
class Wrapper(Method):
    """A method over another one; by itself it changes nothing.

    A registered wrapper is what stands after the ``+`` in "radial+temporal". A parameter of such a
    combination goes to the one of the two that has it; one that both have goes to the wrapper,
    where `claims` does not leave it to the wrapped method.

    Attributes:
        over: the wrapped method.
    """

    over: Method

    @classmethod
    def claims(cls, name: str, params: Mapping[str, Any]) -> bool:
        """Whether a parameter that the wrapped method has as well is meant for the wrapper.

        Args:
            name: of the parameter.
            params: all that were given to the combination.
        """
        return True

    @property
    def kinds(self) -> tuple[str, ...]:
        return self.over.kinds

    @property
    def only_skips(self) -> bool:
        return self.over.only_skips

    @property
    def needs_steps(self) -> bool:
        return self.over.needs_steps

    @property
    def dynamic(self) -> bool:
        return self.over.dynamic

    @property
    def state_advice(self) -> str:
        return self.over.state_advice

    @property
    def default_dense_steps(self) -> int | float:
        return self.over.default_dense_steps

    @property
    def default_dense_layers(self) -> int | float:
        return self.over.default_dense_layers

    @property
    def kept_parameters(self) -> tuple[str, ...]:
        return self.over.kept_parameters

    @property
    def slowing(self) -> Slowing | None:
        return self.over.slowing

    @property
    def why_one_process(self) -> str | None:
        return self.over.why_one_process

    def guide_every(self, grid: TokenGrid | None = None) -> int:
        return self.over.guide_every(grid)

    def changes_whole(self, grid: TokenGrid) -> bool:
        return self.dynamic or self.over.changes_whole(grid)

    def why_whole(self, grid: TokenGrid) -> str:
        return self.over.why_whole(grid)

    def with_kept(self, kept: float, kind: str = "video") -> Self:
        return replace(self, over=self.over.with_kept(kept, kind))

    def variant(self, layer: int, step: int) -> Hashable:
        return self.over.variant(layer, step)

    def pattern(self, grid: TokenGrid, variant: Hashable = None) -> BlockPattern:
        return self.over.pattern(grid, variant)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall
    ) -> Attended:
        return self.over.attend(q, k, v, call)

    def for_model(
        self, num_frames: int | None, size: tuple[int, int] | None, cross_attention: bool
    ) -> Self:
        return replace(self, over=self.over.for_model(num_frames, size, cross_attention))

    def softmax_factor(self) -> float:
        return self.over.softmax_factor()

    def kept_at(self, pattern: BlockPattern, age: int) -> float:
        return self.over.kept_at(pattern, age)

    def work(self, pattern: BlockPattern, age: int, backend: str) -> Work | None:
        return self.over.work(pattern, age, backend)

    def at_most(self, pattern: BlockPattern) -> bool:
        return self.over.at_most(pattern)

    def state_size(self, pattern: BlockPattern, heads: int, head_dim: int) -> int:
        return self.over.state_size(pattern, heads, head_dim)

    def scratch_size(self, pattern: BlockPattern, heads: int) -> int:
        return self.over.scratch_size(pattern, heads)

    @property
    def shares_state(self) -> bool:
        return self.over.shares_state

    def state_limit(self) -> float:
        return self.over.state_limit()

    def selection_of(
        self, pattern: BlockPattern, state: Mapping[str, Any]
    ) -> tuple[torch.Tensor, int] | None:
        return self.over.selection_of(pattern, state)

    def learned_from(self) -> str | None:
        return self.over.learned_from()

    def read_learned(self, component: str, family: str, layers: Sequence[Layer]) -> list[Learned]:
        return self.over.read_learned(component, family, layers)
