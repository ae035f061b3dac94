"""Which forward of a transformer an attention call belongs to, and which sample of it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from diffpatch import internals
from diffpatch.errors import DiffpatchError
from diffpatch.patching.attention.layout import NO_GRID, Numbers
from diffpatch.patching.attention.parallel import Deal
from diffpatch.patching.options.schedule import ALL_SPARSE, BoundSchedule
from diffpatch.patching.patch import Patch
from diffpatch.patching.run.idle import Idle
from diffpatch.patching.run.run import Run
from diffpatch.patching.run.runs import Place

_COMPILED = (
    "the transformer is compiled as a whole; compile its blocks with compile_repeated_blocks()"
)
UNTOLD = "the arguments of the forward do not tell the token grid"


@dataclass
class Forward:
    """One forward of a transformer.

    Attributes:
        place: where it stands in a run.
        bound: the schedule of the run.
        context: what diffusers' `cache_context` calls it.
        hooked: whether the hook of the model ran, which tells where it begins and ends; in a
            compiled one it was traced, and attention calls alone show that there is a forward.
        grid: of its tokens, where the hook told it.
        why: the reason why there is no grid.
        calls: of each layer so far.
        last: the layer called last.
        deal: in which order the heads of the call at hand are shared out to processes.
        guide: what it does with cross-attention: "" nothing, "record" or "recall" it.
        outer: the forward that it is made within, by a hook of somebody's.
        idle: how many of its calls are sparse, and why the others are not.
    """

    place: Place
    bound: BoundSchedule
    context: str | None = None
    hooked: bool = False
    grid: Numbers = NO_GRID
    why: str = ""
    calls: Counter[int] = field(default_factory=Counter)
    last: int = -1
    deal: Deal | None = None
    guide: str = ""
    outer: Forward | None = None
    idle: Idle = field(default_factory=Idle)

    def called(self, layer: int) -> int:
        """Count a call; the number of the sample, because some models call once for each."""
        sample = self.calls[layer]
        self.calls[layer] += 1
        self.last = layer
        return sample


class _Local(threading.local):
    """What one thread is in the middle of."""

    forward: Forward | None = None
    context: str | None = None


class Forwards:
    """The forwards of one transformer, in each thread one, or one within another.

    Args:
        name: of the transformer.
        layers: how many attention layers it has.
        patch: over which it runs.
        begun: is told the run of every forward that begins.
    """

    def __init__(
        self,
        name: str,
        layers: int,
        patch: Patch,
        begun: Callable[[Run], None] | None = None,
    ) -> None:
        self._name, self._layers, self._patch, self._begun = name, layers, patch, begun
        self._here = _Local()
        # Of a forward whose hook was traced; others have their own.
        self._traced: Numbers = NO_GRID
        self._traced_why = UNTOLD
        # For backward passes, which may run in a thread of their own and tell nothing.
        self._looks: set[tuple[Numbers, int]] = set()
        self._latest: Forward | None = None
        self._went_back = False

    @property
    def context(self) -> str | None:
        """What diffusers' `cache_context` calls the forward of this thread."""
        return self._here.context

    @context.setter
    def context(self, name: str | None) -> None:
        self._here.context = name

    @property
    def current(self) -> Forward | None:
        """The forward that this thread is in the middle of."""
        return self._here.forward

    @property
    def grid(self) -> Numbers:
        """Of the forward that this thread, or the graph that is traced, is in the middle of."""
        if torch.compiler.is_compiling():
            return self._traced
        forward = self.current
        return self._traced if forward is None or not forward.hooked else forward.grid

    def trace(self, grid: Numbers, why: str) -> None:
        """A forward begins in a graph that torch.compile traces."""
        self._traced, self._traced_why = grid, why

    def begin(self, grid: Numbers, why: str, time: Any, *, within: bool) -> Forward:
        """A forward begins in this thread, perhaps within another of the same model.

        Its hook has read its grid, or why there is none, and its timestep, if it is given one.
        """
        outer = self.current if within else None
        forward = self._begin(grid, why, time, hooked=True)
        forward.outer = outer
        return forward

    def _begin(self, grid: Numbers, why: str, time: Any = None, *, hooked: bool) -> Forward:
        patch, before = self._patch, self.current
        if before is not None and not before.hooked and not hooked:  # nothing else tells its end
            self._check_idle(before)
        place = patch.begin_forward(self._name, self.context, time)
        if self._begun is not None:
            self._begun(place.run)
        if not hooked and patch.hold is not None:
            patch.holds_none(place.run, _COMPILED)
        if hooked and grid == NO_GRID and place.total is None:
            bound = ALL_SPARSE  # it is dense for want of a grid; no step has to be known for that
        else:
            bound = place.run.bound(patch.schedule, self._layers, place.total, place.evaluations)
        forward = Forward(place, bound, self.context, hooked, grid, why)
        self._here.forward = forward
        if self._went_back:
            self._looks.clear()
            self._went_back = False
        if torch.is_grad_enabled():  # a backward pass may compute parts of it again
            self._looks.add((forward.grid, forward.place.step))
            self._latest = forward
        return forward

    def end(self, failed: bool = False) -> None:
        """This thread is through with its forward, or has failed in it."""
        forward = self.current
        self._here.forward = None if forward is None else forward.outer
        if forward is not None and not failed:
            self._check_idle(forward)

    def beside(self, queries: int, keys: int) -> None:
        """A call is made over other tokens than self-attention has."""
        if (forward := self.current) is not None:
            forward.idle.beside[queries, keys] += 1

    def _check_idle(self, forward: Forward) -> None:
        whole = len(forward.calls) == self._layers
        self._patch.check_idle(self._name, forward.idle, whole)

    def of_call(self, layer: int) -> Forward:
        """The forward that an attention call in this thread belongs to, which may begin with it.

        Without a hook a forward begins where a layer comes back after others: a layer may be called
        several times in a row (Mochi: a call a sample), and layers may be skipped.

        Raises:
            DiffpatchError: a backward pass computes it again, and nothing tells which it was.
        """
        if internals.in_backward():
            return self._computed_again()
        forward = self.current
        if forward is not None:
            if forward.hooked and not forward.place.run.ended:  # a Ctrl-C runs no hook at the end
                return forward
            again = forward.calls[layer] and (layer != forward.last or self._layers == 1)
            past = forward.place.is_past or forward.context != self.context
            if not (again or past):
                return forward
        return self._begin(NO_GRID, self._traced_why, hooked=False)

    def _computed_again(self) -> Forward:
        """The forward that a backward pass computes parts of again, by gradient checkpointing."""
        method = self._patch.method
        self._went_back = True
        if self._latest is None or len(self._looks) > 1 or method.needs_steps:
            raise DiffpatchError(
                f"gradient checkpointing computes {method.name} attention again, one of"
                f" {len(self._looks)} forwards with grids or steps of their own: call backward"
                " after every forward, or train without checkpointing"
            )
        return self._latest
