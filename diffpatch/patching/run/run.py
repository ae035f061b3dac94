"""One run, which is one pipeline call, over a patch: all that it remembers."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from diffpatch.errors import BadParameter
from diffpatch.kernels.memo import Memo
from diffpatch.methods.base import Method
from diffpatch.patching.options.schedule import BoundSchedule, Schedule
from diffpatch.patching.report import Record
from diffpatch.patching.run.frames import FrameClock
from diffpatch.patching.run.path import Given, Path

ALL_BRANCHES = -1  # in place of a branch: what its layer keeps for all of them
ALL_LAYERS = -1  # in place of a layer: what its branch keeps for all of them
OTHERS = (
    "a forward was given another text or condition, or other samples, than the one before it in its"
    " guidance branch: what had been carried for it was forgotten"
)
# What tells the states of a method apart: transformer, layer, guidance branch, sample.
StateKey = tuple[str, int, int, int]


class Run:
    """Counts, and what a method carries from step to step; the latter until the last step.

    Args:
        pipeline: whose call it is, where that is known.
        untold: why nothing tells the denoising steps, None where something does.

    Attributes:
        number: the tracker's number of the run.
        record: what was computed.
        state: what the method keeps.
        memos: the decisions about the grids of this run, held so that none is made anew within it.
        clocks: of the frames of each transformer.
        paths: of each transformer, where steps are held.
        total: model evaluations that it has, as its latest forward tells; None where nothing does.
        ended: whether its loop was left, with the last step or before.
        resumed: whether it went on after that, when what it carried was freed.
    """

    def __init__(self, pipeline: Any = None, untold: str | None = None, number: int = 0) -> None:
        self.number = number
        self.untold = untold
        self.total: int | None = None
        self.ended = self.resumed = False
        self.record = Record()
        self.state: defaultdict[StateKey, dict[str, Any]] = defaultdict(dict)
        self.memos: dict[Any, Memo] = {}
        self.clocks: defaultdict[str, FrameClock] = defaultdict(FrameClock)
        self.paths: dict[str, Path] = {}
        self._given: dict[tuple[str, int], Given] = {}  # by transformer and branch, the latest
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._holders: list[weakref.ref[Any]] = []
        self._began = 0  # the step of the first forward, and the functions around it
        self._functions: list[weakref.ref[Any]] = []
        # By number of layers and of steps: a loop that skips the first ones shows it with a step.
        self._bound: dict[tuple[int, int | None], BoundSchedule] = {}
        self._in_step: dict[str, tuple[int, Counter[str | None]]] = {}
        self._branches: defaultdict[str, dict[tuple[str | None, int], int]] = defaultdict(dict)
        self._earlier = self._ahead = 0  # steps of the windows before this one, and with its own

    @property
    def pipeline(self) -> Any:
        """Whose call it is; None if unknown or gone."""
        return None if self._pipeline is None else self._pipeline()

    def go_on(self, number: int) -> None:
        """The same call denoises once more, as long videos do for each window."""
        self.number, self.ended, self.resumed = number, False, False
        self._earlier = self._ahead
        self._forget()

    def end(self) -> None:
        """Free what was carried; counts stay."""
        self.ended = True
        self.note_state()
        self._forget()

    def begin(self, tracker: Any, functions: list[weakref.ref[Any]]) -> None:
        """The first forward begins.

        Args:
            tracker: follows the scheduler and is gone with it, and with it what is carried.
            functions: under way, see `callers.functions_under_way`.
        """
        self._began, self._functions, self._holders = tracker.step, functions, []
        self._end_with(tracker)

    def go(self, step: int) -> None:
        """Another forward begins, perhaps after the loop was left."""
        self.resumed = self.resumed or (self.ended and self.record.state_bytes > 0)
        self.ended = False
        if self._functions and step > self._began:
            # Helpers for one step are left by now, so that the innermost one left is the loop's.
            alive = (one() for one in self._functions)
            self._end_with(next((one for one in alive if one is not None), None))
            self._functions = []

    def _end_with(self, holder: Any) -> None:
        """Free what is carried when something is gone without which the loop cannot go on."""
        ending = weakref.WeakMethod(self.end)

        def gone(_: Any) -> None:
            if (end := ending()) is not None:
                end()

        if holder is not None:
            self._holders.append(weakref.ref(holder, gone))

    def states(
        self, transformer: str, layer: int, branch: int, sample: int, shared: bool
    ) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """What a method keeps for a layer: of one guidance branch, and, if `shared`, of all."""
        of_all = self.state[transformer, layer, ALL_BRANCHES, sample] if shared else None
        return self.state[transformer, layer, branch, sample], of_all

    def common(self, transformer: str, branch: int, sample: int) -> dict[str, Any]:
        """What a method keeps for all layers of a guidance branch."""
        return self.state[transformer, ALL_LAYERS, branch, sample]

    def note_state(self) -> None:
        """Count the memory that is held now."""
        self.record.state_bytes = max(self.record.state_bytes, self.state_bytes())

    def _forget(self) -> None:
        self.state.clear()
        self.memos.clear()
        self.clocks.clear()
        self.paths.clear()
        self._given.clear()
        self._bound.clear()
        self._in_step.clear()
        self._branches.clear()

    def reset(self) -> None:
        """Forget all counts and all state."""
        self.record = Record()
        self.state.clear()
        self.paths.clear()

    def forget(self, transformer: str) -> None:
        """Forget the state of one transformer; its counts stay."""
        for key in list(self.state):  # to which a forward of another thread may add
            if key[0] == transformer:
                self.state.pop(key, None)
        self.paths.pop(transformer, None)

    def follow(
        self, transformer: str, branch: int, given: Mapping[str, Any], *, first: bool, carries: bool
    ) -> None:
        """A forward begins: forget what was remembered of other frames, texts or samples.

        Texts are others where a callback exchanges them, and where a loop that does not name its
        guidance branches leaves the first one out.

        Args:
            transformer: its name in the patch.
            branch: of guidance.
            given: the arguments of the forward, by name.
            first: whether it is the first in its step.
            carries: whether the method carries something from step to step.
        """
        if first and self.clocks[transformer].moved(given):
            self.forget(transformer)
        if not carries:
            return
        before = self._given.get((transformer, branch))
        now = self._given[transformer, branch] = Given(given, before)
        now.let_go()
        if before is None or before.carries_on(now):
            return
        theirs = {(transformer, branch), (transformer, ALL_BRANCHES)}
        stale = [key for key in list(self.state) if (key[0], key[2]) in theirs]
        for key in stale:
            self.state.pop(key, None)
        if stale and OTHERS not in self.record.notes:
            self.record.notes.append(OTHERS)

    def place(self, step: int) -> int:
        """The step in the record, where windows follow each other."""
        self._ahead = max(self._ahead, self._earlier + step + 1)
        return self._earlier + step

    def branch(self, transformer: str, step: int, context: str | None) -> tuple[int, bool]:
        """The guidance branch of the forward that begins, and whether it is the first of its step.

        Args:
            transformer: its name in the patch.
            step: of the run.
            context: what diffusers' `cache_context` calls the forward, None where it does not.
        """
        before, names = self._in_step.get(transformer, (-1, Counter()))
        if before != step:
            names = Counter()
            self._in_step[transformer] = (step, names)
        first = not names
        known = self._branches[transformer]
        branch = known.setdefault((context, names[context]), len(known))
        names[context] += 1
        return branch, first

    def bound(
        self, schedule: Schedule, layers: int, total: int | None, evaluations: int
    ) -> BoundSchedule:
        """The schedule in whole steps and layers."""
        self.total = total
        bound = self._bound.get((layers, total))
        if bound is None:
            bound = schedule.bind(total, layers, evaluations, self.untold)
            self._bound[layers, total] = bound
        return bound

    def state_bytes(self) -> int:
        """Memory that the method holds now."""
        held = [value for one in list(self.state.values()) for value in list(one.values())]
        paths = sum(path.nbytes() for path in list(self.paths.values()))
        return paths + sum(x.nbytes for x in held if isinstance(x, torch.Tensor))

    def check_state(self, method: Method) -> None:
        """Refuse politely before the state outgrows what the method may hold."""
        limit = method.state_limit()
        if limit == float("inf"):
            return
        held = self.state_bytes()
        self.record.state_bytes = max(self.record.state_bytes, held)
        if held > limit:
            self.reset()
            raise BadParameter(
                f"{method.name}: its state passes {held / 2**30:.2f} GiB and the limit is"
                f" {limit / 2**30:.2f} GiB; raise budget_gib, or {method.state_advice}"
            )
