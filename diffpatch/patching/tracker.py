"""Which run, denoising step and guidance branch a transformer forward belongs to.

Pipelines do not say, in general, so it is read off the two things that every denoising loop does:
``scheduler.set_timesteps`` starts a run, and the first forward after a ``scheduler.step`` starts
the next step; further forwards within a step are its branches (conditional, unconditional, …). No
timestep is ever read, so nothing waits for the device.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

_KEY = "_diffpatch_tracker"


class Tracker:
    """The position of one pipeline in its denoising loop.

    Attributes:
        run: number of the current run; 0 before the first.
        step: denoising step within the run, counted in model evaluations; -1 before the first.
        branch: forward within the step.
        total: model evaluations in the run, None where no scheduler is tracked.
        evaluations: model evaluations per denoising step (2 for Heun-like solvers).
    """

    def __init__(self) -> None:
        self._runs = itertools.count(1)
        self.run = 0
        self.evaluations = 1
        self.total: int | None = None
        self._scheduler: Any = None
        self._begin()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tracker:
        # Some pipelines step a deep copy of their scheduler; it must report to the same tracker.
        return self

    def _begin(self) -> None:
        self.step, self.branch, self._stepped = -1, -1, True

    def on_set_timesteps(self, scheduler: Any) -> None:
        """A run begins."""
        self.run = next(self._runs)
        self._scheduler = scheduler
        self.total = None
        self._begin()

    def on_step(self) -> None:
        """The scheduler consumed a model output."""
        self._stepped = True

    @property
    def running(self) -> bool:
        """Whether a run has begun and not yet ended."""
        over = self.total is not None and self.step + 1 >= self.total and self._stepped
        return self._scheduler is not None and not over

    def on_forward(self, announced: int | None = None) -> None:
        """A transformer forward begins. Where no scheduler is tracked, every forward is a run.

        Args:
            announced: how many steps the pipeline says this run has, where it does.
        """
        if self._scheduler is None:
            self.run = next(self._runs)
            self._begin()
        if not self._stepped:
            self.branch += 1
            return
        if self.step < 0 and self._scheduler is not None:
            # Only now, because image-to-image pipelines set the begin index after set_timesteps.
            begin = getattr(self._scheduler, "begin_index", None) or 0
            self.total = len(self._scheduler.timesteps) - begin
            if announced is not None:  # some video-to-video pipelines cut their timesteps silently
                self.total = min(self.total, announced)
            self.evaluations = getattr(self._scheduler, "order", 1)
        if self.total is not None and self.step + 1 >= self.total:
            # The run is over, so whoever calls has a scheduler that nobody follows.
            self._scheduler = None
            self.run = next(self._runs)
            self._begin()
        self.step, self.branch, self._stepped = self.step + 1, 0, False


def is_scheduler(component: Any) -> bool:
    """Whether a pipeline component drives a denoising loop."""
    return hasattr(component, "set_timesteps") and hasattr(component, "step")


def is_tracked(scheduler: Any, tracker: Tracker) -> bool:
    """Whether the scheduler reports to this tracker."""
    return getattr(scheduler, "__dict__", {}).get(_KEY) is tracker


def track(scheduler: Any, tracker: Tracker) -> Callable[[], None]:
    """Make a scheduler report to a tracker, until the returned function is called.

    The object gets a subclass of the same name, so that pipelines that inspect signatures, save the
    scheduler's class name or deep-copy it see what they saw before.
    """
    if _KEY in scheduler.__dict__:
        untrack(scheduler)
    cls: Any = type(scheduler)
    scheduler.__class__ = _tracked_class(cls)
    scheduler.__dict__[_KEY] = tracker
    return functools.partial(untrack, scheduler)


def untrack(scheduler: Any) -> None:
    """Give the scheduler its own class back."""
    scheduler.__dict__.pop(_KEY, None)
    original = type(scheduler).__dict__.get("_diffpatch_original")
    if original is not None:
        scheduler.__class__ = original


@functools.cache
def _tracked_class(cls: Any) -> Any:
    """A same-named subclass of a scheduler class that reports to the tracker of its instance."""
    if "_diffpatch_original" in cls.__dict__:
        return cls

    @functools.wraps(cls.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = cls.set_timesteps(self, *args, **kwargs)
        if (tracker := self.__dict__.get(_KEY)) is not None:
            tracker.on_set_timesteps(self)
        return result

    @functools.wraps(cls.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = cls.step(self, *args, **kwargs)
        if (tracker := self.__dict__.get(_KEY)) is not None:
            tracker.on_step()
        return result

    def reduce(self: Any, protocol: Any = 2) -> Any:
        # Pickled schedulers come back as what they were before the patch.
        state = {k: v for k, v in self.__dict__.items() if k != _KEY}
        return _restore, (cls, state)

    names = {
        "set_timesteps": set_timesteps,
        "step": step,
        "__reduce_ex__": reduce,
        "__deepcopy__": _deepcopy,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "_diffpatch_original": cls,
    }
    bases: tuple[Any, ...] = (cls,)
    return type(cls.__name__, bases, names)


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    # A copy made during a run takes part in it; any other belongs to somebody else.
    cls: Any = type(self)
    tracker = self.__dict__.get(_KEY)
    joins = tracker is not None and tracker.running
    new = cls.__new__(cls if joins else cls._diffpatch_original)
    memo[id(self)] = new
    items = {k: v for k, v in self.__dict__.items() if joins or k != _KEY}
    new.__dict__.update({k: copy.deepcopy(v, memo) for k, v in items.items()})
    return new


def _restore(cls: Any, state: dict[str, Any]) -> Any:
    new = cls.__new__(cls)
    new.__dict__.update(state)
    return new
