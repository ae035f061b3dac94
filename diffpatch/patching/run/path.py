"""How far a run's path is, and which of its steps would hardly turn it.

Denoising follows a path, and every forward of the transformer gives its direction. Where that
hardly turns, the next steps can go on in the last one, and the forward is left out as a whole. How
far this leads astray is known beforehand to first order, as in every solver that chooses the size
of its steps. Say the steps stand at times t from 0 (noise) to 1, forwards were made at n' and then
at n, and the result y changed by r = |y(n) - y(n')| / |y(n)| / (t(n) - t(n')) per time. Going on
with y(n) up to step k then ends

    r · Σ (t(j+1) - t(j)) · (t(j) - t(n))  over the steps j from n+1 to k

away, as a fraction of |y|. A step is held while that is within a tolerance. Times are those of the
scheduler's timesteps, along which flow matching moves exactly, and others about. The last step of
some stands at the end (timestep 0) and moves all the same: it is never held. On a held path
latents go on as fast as before: where they are much farther, somebody has exchanged them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch.utils import _pytree as pytree

LEAP = 3.0  # times as far as they were going, and latents are others


class Given:
    """What a forward was given, and which of that does not move along the path.

    Latents and timesteps are others in every step. What two forwards in a row have in common (texts
    whatever their names, scales, the condition of a ControlNet) makes a result of no use when it
    changes.

    Args:
        arguments: of the forward, by name.
        before: what the forward before it in its branch was given, None for the first.
    """

    def __init__(self, arguments: Mapping[str, Any], before: Given | None = None) -> None:
        leaves, self._spec = pytree.tree_flatten(dict(arguments))
        self._leaves = [(leaf, _version(leaf)) for leaf in leaves]
        self._steady: list[bool] | None = None  # known from the second forward on
        if before is not None and self.is_like(before):
            pairs = zip(before._leaves, self._leaves, strict=True)
            steady = before._steady or [_same(*pair) for pair in pairs]
            # Guidance that begins at zero leaves latents where they are: too early to tell.
            self._steady = steady if self._has_moved(steady) else None

    def _has_moved(self, steady: Sequence[bool]) -> bool:
        """Whether something that may be latents, and not only times, has."""
        leaves = (leaf for (leaf, _), still in zip(self._leaves, steady, strict=True) if not still)
        return any(isinstance(leaf, torch.Tensor) and leaf.ndim > 1 for leaf in leaves)

    def is_like(self, other: Given) -> bool:
        """Whether there are as many things, of the same kinds and shapes."""
        return self._spec == other._spec and all(
            _kind(mine[0]) == _kind(theirs[0])
            for mine, theirs in zip(self._leaves, other._leaves, strict=True)
        )

    def fits(self, other: Given) -> bool:
        """Whether a result for the one serves the other; never before it is known what moves."""
        return self._steady is not None and not self.differs(other)

    def differs(self, other: Given) -> bool:
        """Whether something is known to have changed that does not move along the path."""
        if self._steady is None or not self.is_like(other):
            return not self.is_like(other)
        leaves = zip(self._leaves, other._leaves, self._steady, strict=True)
        return not all(
            _same(mine, theirs) if steady else _is_silent(mine[0]) == _is_silent(theirs[0])
            for mine, theirs, steady in leaves
        )

    def carries_on(self, other: Given) -> bool:
        """Whether what does not move along the path is the same, as far as that is known.

        Waits for the device only where a tensor of it was exchanged.
        """
        if self._steady is None or not self.is_like(other):
            return self.is_like(other)
        leaves = zip(self._leaves, other._leaves, self._steady, strict=True)
        return all(_same(mine, theirs) for mine, theirs, steady in leaves if steady)

    def let_go(self) -> None:
        """Hold no longer what moves, such as latents and the residuals of a ControlNet."""
        for i, steady in enumerate(self._steady or ()):
            leaf = self._leaves[i][0]
            if not steady and isinstance(leaf, torch.Tensor):
                self._leaves[i] = torch.empty_like(leaf, device="meta"), None

    def distance(self, other: Given) -> torch.Tensor | None:
        """How far (L2) latents are from those of another forward; None if nothing tells."""
        steady = other._steady or self._steady
        if steady is None or not self.is_like(other):
            return None
        moved = [
            (mine[0].float() - theirs[0].float()).norm()
            for mine, theirs, still in zip(self._leaves, other._leaves, steady, strict=True)
            if not still and _is_wide(mine[0]) and mine[0].is_floating_point()
        ]
        return torch.stack(moved).norm() if moved else None


@dataclass(eq=False)
class Path:
    """How far one run of one transformer is, and what its last forwards gave.

    Args:
        times: of the steps, from 0 to 1, and of the end.

    Attributes:
        last: the step whose forward was made last; -1 before the first.
        rate: change of the result per time, by the last two forwards that were made; None before.
        speed: of the latents per time, likewise.
        holding: whether the step at hand repeats the last result.
        results: by guidance branch: what the forward was given, and what it gave.
    """

    times: Sequence[float]
    last: int = -1
    rate: torch.Tensor | None = None
    speed: torch.Tensor | None = None
    holding: bool = False
    results: dict[int, tuple[Given, Any]] = field(default_factory=dict)

    def begin_step(self, step: int, branch: int, given: Given, tolerance: float) -> None:
        """Decide whether a step is held, from what its first forward is given."""
        rate = math.nan if self.rate is None else float(self.rate)  # waits for the device
        self.holding = rate * self.astray(step) <= tolerance  # never with NaN
        if self.holding and self.speed is not None:
            distance = self.results[branch][0].distance(given) if branch in self.results else None
            passed = self.times[step] - self.times[self.last]
            self.holding = distance is None or bool(distance <= LEAP * self.speed * passed)

    def astray(self, step: int) -> float:
        """Where the path ends if it is held up to a step, per rate; infinite if nothing tells."""
        t, last = self.times, self.last
        if step < len(t) - 1 and t[step] >= t[step + 1]:
            return math.inf
        held = range(last + 1, min(step, len(t) - 2) + 1)
        return math.fsum((t[j + 1] - t[j]) * (t[j] - t[last]) for j in held)

    def given(self, branch: int, arguments: Mapping[str, Any]) -> Given:
        """What the next forward of a guidance branch is given."""
        before = self.results.get(branch)
        return Given(arguments, None if before is None else before[0])

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
            self.rate = self.speed = None
            if before is not None and before[0].is_like(given) and passed > 0:
                change, distance = _change(before[1], result), before[0].distance(given)
                self.rate = None if change is None else change / passed
                self.speed = None if distance is None else distance / passed
            self.last = step
        self.results[branch] = given, copied(result)

    def nbytes(self) -> int:
        """Memory that the results take."""
        kept = pytree.tree_leaves([result for _, result in self.results.values()])
        return sum(x.nbytes for x in kept if isinstance(x, torch.Tensor))


def copied(result: Any) -> Any:
    """A result with tensors of its own, because a pipeline may write into what it is given."""
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, result)


def _version(leaf: Any) -> int | None:
    """How often a tensor was written to; None where nothing counts that."""
    counts = isinstance(leaf, torch.Tensor) and not leaf.is_inference()
    return leaf._version if counts else None


def _kind(leaf: Any) -> tuple[Any, ...]:
    return (type(leaf), *((leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else ()))


def _is_silent(leaf: Any) -> bool:
    """Whether it adds nothing, as a ControlNet does that has come to its end."""
    return _is_wide(leaf) and not leaf.any()


def _is_wide(leaf: Any) -> TypeGuard[torch.Tensor]:
    """Whether it has more than a few numbers a sample, as latents have and times have not."""
    return isinstance(leaf, torch.Tensor) and leaf.ndim > 2


def _same(one: tuple[Any, int | None], other: tuple[Any, int | None]) -> bool:
    """Whether two leaves, with the number of writes to each, hold the same."""
    (mine, written), (theirs, written_since) = one, other
    if mine is theirs:
        return written == written_since
    if isinstance(mine, torch.Tensor):
        return torch.equal(mine, theirs)
    return not isinstance(mine, bool | int | float | str) or mine == theirs


def _change(before: Any, now: Any) -> torch.Tensor | None:
    """How much a result differs from the one before, relative to it (L2), where it does most.

    None if the two have other shapes, as where a first forward also goes through what the next ones
    find in a cache.
    """
    pairs = list(zip(_tensors(before), _tensors(now), strict=False))
    if not pairs or any(old.shape != new.shape for old, new in pairs):
        return None
    return torch.stack([_turn(old.float(), new.float()) for old, new in pairs]).max()


def _turn(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return (new - old).norm() / new.norm()


def _tensors(result: Any) -> list[torch.Tensor]:
    """What is denoised: a tensor, or one for every sample, or for picture and sound."""
    leaves = pytree.tree_leaves(result)
    return [x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()]
