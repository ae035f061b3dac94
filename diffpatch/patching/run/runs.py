"""The runs that go over one patch, any number of them at once, and which one a forward is of."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from diffpatch import internals
from diffpatch.patching.run import callers, leaving
from diffpatch.patching.run.run import Run
from diffpatch.patching.run.tracker import (
    Tracker,
    is_under_way,
    loops_begun,
    track,
    tracker_of,
    untrack,
)

_NO_LOOP = (
    "no denoising loop is seen: call the transformer from a pipeline, or from a function that holds"
    " the scheduler"
)
_SEVERAL = (
    "one function drives several schedulers in turn: let every run have a function, a generator or"
    " a task of its own"
)
_SHARED = (
    "two runs share one scheduler at once: give each its own, such as copy.deepcopy(pipe.scheduler)"
)
_NOT_RUNNING = (
    "the pipeline's scheduler is not in the middle of a run: set_timesteps was not called, or all"
    " its steps are taken"
)
_BY_HAND = (
    "its loop goes on to other timesteps and never calls scheduler.step: give the transformer"
    " timesteps as they stand in scheduler.timesteps, or call step"
)


@dataclass(frozen=True)
class Place:
    """Where a forward stands.

    Attributes:
        run: which it belongs to.
        step: denoising step of the run, counted in model evaluations.
        total: model evaluations in the run, None where nothing tells.
        evaluations: model evaluations per denoising step.
        branch: of guidance.
        first: whether it is the transformer's first forward in the step.
        tracker: what follows the scheduler, None where nothing does.
    """

    run: Run
    step: int
    total: int | None
    evaluations: int
    branch: int
    first: bool
    tracker: Tracker | None = None

    @property
    def is_past(self) -> bool:
        """Whether the scheduler has moved on, so that no attention call is of this forward."""
        tracker = self.tracker
        return tracker is not None and (tracker.stepped or tracker.run != self.run.number)


class _Loop(NamedTuple):
    """Whose forward it is: what follows its scheduler, or why nothing does."""

    tracker: Tracker | None
    pipeline: Any
    untold: str | None
    values: Mapping[str, Any]  # its local variables
    is_call: bool = False  # whether they are of a pipeline's call


class Runs:
    """The runs over one patch.

    Args:
        follows: whether forwards are told apart by run; those of a bare transformer, whose target
            names no scheduler, all stand for themselves.

    Attributes:
        last: the run of the latest forward.
    """

    def __init__(self, follows: bool) -> None:
        self.last = Run()
        self._follows = follows
        self._lock = threading.Lock()  # for the tables, which only beginning runs change
        self._of_tracker: weakref.WeakKeyDictionary[Tracker, Run] = weakref.WeakKeyDictionary()
        self._of_pipeline: weakref.WeakKeyDictionary[Any, Run] = weakref.WeakKeyDictionary()
        self._trackers: weakref.WeakSet[Tracker] = weakref.WeakSet()

    def begin_forward(self, transformer: str, context: str | None, time: Any = None) -> Place:
        """Find the run that a forward belongs to, which may begin with it.

        Args:
            transformer: its name in the patch.
            context: what diffusers' `cache_context` calls the forward, None where it does not.
            time: the timestep that the forward is given, where that is known.
        """
        loop = self._loop()
        tracker, pipeline, untold = loop.tracker, loop.pipeline, loop.untold
        if tracker is not None:
            tracker.on_forward(getattr(pipeline, internals.PIPELINE_STEPS, None), time)
            if tracker.total is None or tracker.lost:
                untold = _BY_HAND if tracker.lost else _NOT_RUNNING
                tracker = None
        if tracker is None:
            run = Run(pipeline, untold)
            self._keep(run, None)
            return Place(run, 0, None, 1, *run.branch(transformer, 0, context))
        run = self._run(tracker, loop)
        branch = run.branch(transformer, tracker.step, context)
        return Place(
            run, tracker.step, tracker.total, tracker.evaluations, *branch, tracker=tracker
        )

    def _loop(self) -> _Loop:
        if not self._follows:
            return _Loop(None, None, None, {})
        caller, deep = callers.find(_is_running), False
        if caller is None:
            begun = [tracker for tracker in loops_begun() if self in tracker.followers]
            if len(begun) == 1:
                return _Loop(begun[0], None, None, {})
            caller, deep = callers.find(_is_running, deep=True), True
        if caller is None:
            return _Loop(None, None, _NO_LOOP, {})
        pipeline = caller.pipeline
        if len(caller.schedulers) != 1:
            why = _SEVERAL if caller.schedulers else _NOT_RUNNING
            return _Loop(None, pipeline, why, {})
        tracker = self.follow(caller.schedulers[0])
        run = self._of_tracker.get(tracker)
        same = run is not None and run.number == tracker.run
        other = same and run is not None and run.pipeline not in (None, pipeline)
        elsewhere = tracker.thread != threading.get_ident()
        if caller.is_call and (other or elsewhere):
            return _Loop(None, pipeline, _SHARED, {})
        if deep and elsewhere:
            return _Loop(None, None, _NO_LOOP, {})
        return _Loop(tracker, pipeline, None, caller.values, caller.is_call)

    def _run(self, tracker: Tracker, loop: _Loop) -> Run:
        run = self._of_tracker.get(tracker)
        if run is None or run.number != tracker.run:
            values = loop.values.values()
            window = run is not None and loop.is_call and run.pipeline is loop.pipeline
            if run is not None and window and any(map(tracker.is_output, values)):
                run.go_on(tracker.run)
            else:
                if run is not None:
                    run.end()
                run = Run(loop.pipeline, number=tracker.run)
            leaving.listen(values, run)
            run.begin(tracker, callers.functions_under_way())
        run.go(tracker.step)
        if run is not self.last:
            self._keep(run, tracker)
        return run

    def _keep(self, run: Run, tracker: Tracker | None) -> None:
        with self._lock:
            self.last = run
            if tracker is not None:
                self._of_tracker[tracker] = run
            if run.pipeline is not None:
                self._of_pipeline[run.pipeline] = run

    def follow(self, scheduler: Any) -> Tracker:
        """Be told of what a scheduler does; of one in the middle of a run, take that over."""
        tracker = tracker_of(scheduler)
        if tracker is None or not tracker.is_own(scheduler):  # a copy with a run of its own
            track(scheduler, tracker := Tracker())
        if tracker.run == 0 and is_under_way(scheduler):
            tracker.take_over(scheduler)
        tracker.followers.add(self)
        self._trackers.add(tracker)
        return tracker

    def unfollow(self) -> None:
        """Give all schedulers their classes back, but those that another patch follows."""
        for tracker in list(self._trackers):
            tracker.followers.discard(self)
            if not tracker.followers:
                for scheduler in list(tracker.schedulers.values()):
                    if tracker_of(scheduler) is tracker:
                        untrack(scheduler)
        self._trackers.clear()

    def run_is_over(self, tracker: Tracker) -> None:
        """See `tracker.Follower`."""
        run = self._of_tracker.get(tracker)
        if run is not None and run.number == tracker.run:
            run.end()

    def of(self, target: Any) -> Run:
        """The last run of a pipeline; of all, if it had none over this patch."""
        run = self._of_pipeline.get(target) if internals.is_pipeline(target) else None
        return self.last if run is None else run

    def others_than(self, run: Run) -> list[Run]:
        """The runs that have begun and not ended, but for one."""
        with self._lock:
            known = list(self._of_tracker.items())
        return [
            one for tracker, one in known
            if one is not run and not one.ended and one.number == tracker.run and tracker.running
        ]  # fmt: skip

    def forget(self) -> None:
        """Forget all runs."""
        with self._lock:
            self.last = Run()
            self._of_tracker.clear()
            self._of_pipeline.clear()

    def all(self) -> list[Run]:
        """The runs that are remembered, each once."""
        with self._lock:
            runs = [self.last, *self._of_tracker.values(), *self._of_pipeline.values()]
        return list({id(run): run for run in runs}.values())


def _is_running(scheduler: Any) -> bool:
    tracker = tracker_of(scheduler)
    if tracker is None or tracker.run == 0 or not tracker.is_own(scheduler):
        return is_under_way(scheduler)
    return tracker.running
