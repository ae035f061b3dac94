"""What was asked for, and what undoes it."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from diffpatch.kernels.memo import Memo
from diffpatch.methods.base import Method
from diffpatch.patching.attention.layout import NO_GRID
from diffpatch.patching.options.composition import STEPS
from diffpatch.patching.options.schedule import Schedule
from diffpatch.patching.run.idle import Idle, NothingSparse
from diffpatch.patching.run.run import Run
from diffpatch.patching.run.runs import Place, Runs
from diffpatch.patterns.pattern import BlockPattern

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class SparseCall:
    """A sparse attention call that was just made.

    Attributes:
        run: whose call it is.
        place: transformer, layer, step, branch.
        out: its output, (B, S, H, D).
        dense: computes the dense one.
        q: (B, S, H, D), in the model's own order.
        k: like q, or with fewer heads.
        scale: the factor on q·k.
        keys: bool (B, S), True where a key may be attended to; None allows all.
        method: what computed it.
        pattern: over which it was computed.
        order: where the tokens of the pattern's grid stand in the sequence; None: in their order.
        state: what the method has kept after the call, for this branch and for all.
    """

    run: Run
    place: tuple[str, int, int, int]
    out: torch.Tensor
    dense: Callable[[], torch.Tensor]
    q: torch.Tensor
    k: torch.Tensor
    scale: float
    keys: torch.Tensor | None
    method: Method
    pattern: BlockPattern
    order: torch.Tensor | None
    state: dict[str, Any]


Observer = Callable[[SparseCall], None]

# What tuned settings say of a grid (num_frames, height, width, text); raises BadParameter.
CheckGrid = Callable[[tuple[int, int, int, int]], str | None]

_TAKEN_UP = (
    "the function that loops over its steps was left, which freed what was carried, and another"
    " one went on; let one function, or a generator, loop over all steps"
)
_CACHED_GRIDS = 4  # grids about which a patch remembers its decisions, beside those of its runs


class Installed(Protocol):
    """A transformer that carries the patch."""

    def remove(self) -> None:
        """Make it what it was."""
        ...


class Patch:
    """What was asked for a target, shared by its transformers and by all runs over them.

    Nothing here outlives `unpatch`, and nothing is shared between two patched targets.

    Attributes:
        method: what sparse calls do.
        schedule: which calls are dense.
        backend: of the kernels.
        check_grid: refuses grids that the settings say nothing about, or remarks on them.
        steps: of the runs from which it is predicted what they give; None predicts nothing.
        remark: what the report says of the choice of settings: what those for a target are
            predicted to give, or that a level of quality has no effect.
        strict: whether a forward in which nothing runs sparsely is an error.
        hold: tolerance within which steps are held; None holds none.
        in_block: whether it is on for the length of a `patched` block that has not ended.
        observers: see every sparse call of every run.
        runs: the runs over the patch, with all that they remember.
        installed: the transformers that carry it.
    """

    def __init__(
        self,
        method: Method,
        schedule: Schedule,
        backend: str,
        target: Any,
        *,
        bare: bool = False,
        check_grid: CheckGrid | None = None,
        steps: int | None = None,
        remark: str | None = None,
        strict: bool = False,
        hold: float | None = None,
    ) -> None:
        self.method = method
        self.schedule = schedule
        self.backend = backend
        self.check_grid = check_grid
        self.steps = steps
        self.remark = remark
        self.strict = strict
        self.hold = hold
        self.in_block = False
        self.observers: list[Observer] = []
        self.runs = Runs(follows=not bare)
        self.installed: weakref.WeakSet[Installed] = weakref.WeakSet()
        self._target = weakref.ref(target)
        self._memos: OrderedDict[Hashable, Memo] = OrderedDict()
        self._lock = threading.Lock()  # for the table of memos, not for what is in them
        self._said: set[str] = set()
        self._follows_steps = method.needs_steps or any(
            method.variant(layer, step) != method.variant(layer, 0)
            for layer in range(2)
            for step in STEPS
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # copies of a patched target are unpatched

    def __reduce__(self) -> Any:
        return type(None), ()

    def is_for(self, target: Any) -> bool:
        """Whether it was made for a target."""
        return self._target() is target

    def is_for_another(self, target: Any) -> bool:
        """Whether it was made for something else than a target, which is still there."""
        return self._target() not in (None, target)

    def follow(self, schedulers: Iterable[Any]) -> None:
        """Be told of what the target's schedulers do, from now on."""
        for scheduler in schedulers:
            self.runs.follow(scheduler)

    @contextlib.contextmanager
    def observed(self, observe: Observer) -> Iterator[None]:
        """Show every sparse call of the runs in the block."""
        self.observers.append(observe)
        try:
            yield
        finally:
            self.observers.remove(observe)

    def undo(self) -> None:
        """Make all that carries the patch what it was, also what the target has lost meanwhile."""
        for one in list(self.installed):
            one.remove()
        self.runs.unfollow()

    def begin_forward(self, transformer: str, context: str | None, time: Any = None) -> Place:
        """Find the run of a forward that begins; see `Runs.begin_forward`."""
        place = self.runs.begin_forward(transformer, context, time)
        if place.total is None and self._follows_steps:
            why = place.run.untold or "a bare transformer knows no steps"
            text = f"{self.method.name} takes every forward for the first of a run: {why}"
            self.note([place.run], text)
        if place.total is None and self.hold is not None:
            self.holds_none(place.run, place.run.untold or "nothing tells the steps")
        told = place.step == 1 or place.total == 1  # a loop that skips some shows it with a step
        if told and self.steps is not None and place.total != self.steps:
            text = f"and this one has {place.total}: what they predict does not hold for it"
            self.note([place.run], f"settings were measured in runs of {self.steps} steps, {text}")
        if place.run.resumed:
            self.note([place.run], f"{self.method.name} began anew in the middle: {_TAKEN_UP}")
        return place

    def holds_none(self, run: Run, why: str) -> None:
        """Say that no step of a run is held though that was asked for, and why."""
        self.note([run], f"hold={self.hold}: no step is held: {why}")

    def remark_on(self, grid: Sequence[int]) -> str | None:
        """What the settings that were chosen from say of a grid that they were not measured on.

        Raises:
            BadParameter: they say nothing about it.
        """
        if self.check_grid is None or len(grid) != len(NO_GRID) or not all(grid[:3]):
            return None
        frames, height, width, *text = grid
        return self.check_grid((frames, height, width, sum(n for n in text if n > 0)))

    def note(self, runs: Iterable[Run], text: str) -> None:
        """Warn once, and leave a note in the reports of runs."""
        for run in runs:
            if text not in run.record.notes:
                run.record.notes.append(text)
        self.say_once(text)

    def say_once(self, text: str, about: str | None = None) -> None:
        """Warn, unless it was said before, or something else about the same."""
        if (about or text) not in self._said:
            self._said.add(about or text)
            logger.warning("%s", text)

    def check_idle(self, transformer: str, idle: Idle, whole: bool) -> None:
        """Say that nothing of a forward ran sparsely, and why, if that was not asked for.

        Raises:
            NothingSparse: the same, where the patch is strict.
        """
        why = None if self.method.name == "dense" else idle.why(whole)
        if why is None:
            return
        text = f"{self.method.name}: nothing ran sparsely in {transformer}: {why}"
        if self.strict:
            raise NothingSparse(f"{text}; strict=False runs it dense")
        self.say_once(text, about=f"nothing sparse in {transformer}")

    def memo(self, run: Run, grid: Hashable) -> Memo:
        """Where the decisions about a grid are kept, the same for the length of a run."""
        if grid not in run.memos:
            with self._lock:
                made = self._memos.pop(grid, None) or Memo()
                self._memos[grid] = made
                while len(self._memos) > _CACHED_GRIDS:
                    self._memos.popitem(last=False)
            run.memos[grid] = made
        return run.memos[grid]

    def state_bytes(self) -> int:
        """Memory that the method holds across steps, over all runs."""
        return sum(run.state_bytes() for run in self.runs.all())
