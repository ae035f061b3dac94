"""How far a run's path is, and which of its steps would hardly turn it.

Denoising follows a path, and every forward of the transformer gives its direction. Where that
hardly turns, the next steps can go on in the last one, and the forward is left out as a whole. How
far this leads astray is known beforehand to first order, as in every solver that chooses the size
of its steps. Say the steps stand at times t from 0 (noise) to 1, forwards were made at n' and then
at n, and the result y changed by r = |y(n) - y(n')| / |y(n)| / (t(n) - t(n')) per time. Going on
with y(n) up to step k then ends

    r · Σ (t(j+1) - t(j)) · (t(j) - t(n))  over the steps j from n+1 to k

away, as a fraction of |y|. A step is held while that is within a tolerance. Times are those of the
scheduler's timesteps, along which flow matching moves exactly, and others about.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Given:
    """What a held result must have been given: latents of this shape, and these texts."""

    shape: tuple[int, ...]
    texts: Any

    def fits(self, other: Given) -> bool:
        """Whether a result for the one serves the other."""
        mine, theirs = pytree.tree_leaves(self.texts), pytree.tree_leaves(other.texts)
        return (
            self.shape == other.shape and len(mine) == len(theirs) and all(map(_same, mine, theirs))
        )


@dataclass(eq=False)
class Path:
    """How far one run of one transformer is, and what its last forwards gave.

    Args:
        times: of the steps, from 0 to 1, and of the end.

    Attributes:
        last: the step whose forward was made last; -1 before the first.
        rate: change of the result per time, by the last two forwards that were made; None before.
        holding: whether the step at hand repeats the last result.
        results: by guidance branch: what the forward was given, and what it gave.
    """

    times: Sequence[float]
    last: int = -1
    rate: torch.Tensor | None = None
    holding: bool = False
    results: dict[int, tuple[Given, Any]] = field(default_factory=dict)

    def begin_step(self, step: int, tolerance: float) -> None:
        """Decide whether a step is held."""
        rate = math.nan if self.rate is None else float(self.rate)  # waits for the device
        self.holding = rate * self.astray(step) <= tolerance  # never with NaN

    def astray(self, step: int) -> float:
        """Where the path ends if it is held up to a step, per rate."""
        t, last = self.times, self.last
        held = range(last + 1, min(step, len(t) - 2) + 1)
        return math.fsum((t[j + 1] - t[j]) * (t[j] - t[last]) for j in held)

    def made(self, step: int, branch: int, given: Given, result: Any, *, first: bool) -> None:
        """A forward was made.

        Args:
            step: of the run.
            branch: of guidance.
            given: what it was given.
            result: what it gave.
            first: whether it is the first in its step, by which the path is judged.
        """
        if first:
            before, passed = self.results.get(branch), self.times[step] - self.times[self.last]
            self.rate = None
            if before is not None and before[0].shape == given.shape and passed > 0:
                self.rate = _change(before[1], result) / passed
            self.last = step
        self.results[branch] = given, copied(result)

    def nbytes(self) -> int:
        """Memory that the results take."""
        kept = pytree.tree_leaves([result for _, result in self.results.values()])
        return sum(x.nbytes for x in kept if isinstance(x, torch.Tensor))


def copied(result: Any) -> Any:
    """A result with tensors of its own, because a pipeline may write into what it is given."""
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, result)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one is other or (one.shape == other.shape and torch.equal(one, other))
    return type(one) is type(other)


def _change(before: Any, now: Any) -> torch.Tensor:
    """How much a result differs from the one before, relative to it (L2)."""
    old, new = (_first(x).float() for x in (before, now))
    return (new - old).norm() / new.norm()


def _first(result: Any) -> torch.Tensor:
    """The tensor of a result, or the first of several."""
    return next(x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor))
