"""Which run and denoising step a scheduler is in.

Pipelines do not say, in general, so it is read off the two things that every denoising loop does:
``scheduler.set_timesteps`` starts a run, and the first forward after a ``scheduler.step`` starts
the next step; further forwards within a step are its branches (conditional, unconditional, …). No
timestep is read, so nothing waits for the device.

A loop may also take its steps without the scheduler. Then a forward's timestep is a view of another
of the scheduler's; where it is not a view of them, it is read once, after `MANY` forwards.
"""

from __future__ import annotations

import contextvars
import copy
import functools
import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch

from diffpatch.patching.run import callers
from diffpatch.patching.run.callers import TRACKER

MANY = 4  # forwards of a first step without a step of the scheduler, before one asks why

# The loops that the current thread, or task of an event loop, has begun, where no caller is seen.
_BEGUN: contextvars.ContextVar[tuple[weakref.ref[Tracker], ...]] = contextvars.ContextVar(
    "diffpatch_begun", default=()
)


class Follower(Protocol):
    """Who wants to know when a run is over."""

    def run_is_over(self, tracker: Tracker) -> None:
        """The last step of the run was taken."""
        ...


class Tracker:
    """The position of one scheduler in its denoising loop.

    Attributes:
        run: number of the current run; 0 before the first.
        step: denoising step within the run, counted in model evaluations; -1 before the first.
        branch: forward within the step.
        total: model evaluations in the run, None where nothing tells.
        evaluations: model evaluations per denoising step (2 for Heun-like solvers).
        stepped: whether the scheduler was stepped since the last forward.
        lost: whether its loop takes steps that cannot be counted.
        thread: where the run began.
        followers: who is told when a run is over.
        schedulers: the ones that report here, by their ids: one, and copies it is stepped with.
    """

    def __init__(self) -> None:
        self.run = 0
        self.evaluations = 1
        self.total: int | None = None
        self.thread = 0
        self.followers: weakref.WeakSet[Follower] = weakref.WeakSet()
        self.schedulers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._own: weakref.ref[Any] | None = None  # not a copy
        self._output: weakref.ref[Any] | None = None
        self._copied = self._begun = False
        self._first: int | None = None  # the scheduler's own index of the first step
        self.lost = self._steps = False
        self._time: torch.Tensor | None = None  # of the step
        self.step, self.branch, self.stepped = -1, -1, True

    def __deepcopy__(self, memo: dict[int, Any]) -> Tracker:
        # Some pipelines step a deep copy of their scheduler; it must report to the same tracker.
        return self

    def _begin(self) -> None:
        self.run += 1
        self.step, self.branch, self.stepped = -1, -1, True
        self.total = self._first = self._time = None
        self.lost = self._steps = False

    def add(self, scheduler: Any) -> None:
        """A scheduler, or a copy of it, reports here from now on."""
        if self._own is None:
            self._own = weakref.ref(scheduler)
        self.schedulers[id(scheduler)] = scheduler

    def is_own(self, scheduler: Any) -> bool:
        """Whether a scheduler is the one that this is about, and not a copy of it.

        A copy takes the place of one that is gone: somebody exchanged the two in the middle.
        """
        if self._scheduler is None and self.schedulers.get(id(scheduler)) is scheduler:
            self._own = weakref.ref(scheduler)
        return self._own is not None and self._scheduler is scheduler

    def on_set_timesteps(self, scheduler: Any) -> None:
        """A run begins; not by a copy that is made in the middle of one."""
        if self.running and self.step >= 0 and not self.is_own(scheduler):
            return
        self._begun = True
        self.thread = threading.get_ident()
        self._begin()
        others = [tracker for tracker in loops_begun() if tracker is not self]
        _BEGUN.set(tuple(weakref.ref(tracker) for tracker in (*others, self)))

    def take_over(self, scheduler: Any) -> None:
        """Begin in the middle of a run whose beginning nobody has told."""
        self.on_set_timesteps(scheduler)
        self._catch_up(scheduler)

    def _catch_up(self, scheduler: Any) -> None:
        """Stand where the scheduler stands, if it has taken steps already."""
        self.step = _steps_taken(scheduler) - 1
        if self.step >= 0:
            self._first = _begin_index(scheduler)

    def on_step(self, output: Any = None) -> None:
        """The scheduler consumed a model output."""
        index = None if self._copied else getattr(self._scheduler, "step_index", None)
        if index is not None:  # tells more than forwards do, some of which another model may make
            first = self._begin_at(index - 1) if self._first is None else self._first
            self.step = index - first - 1
        elif self.stepped and not self._copied:
            self.step += 1  # after forwards that are not known here
        self.stepped = self._steps = True
        if isinstance(output, torch.Tensor):
            self._output = weakref.ref(_whole(output))
        if self._over:
            for follower in list(self.followers):
                follower.run_is_over(self)

    def is_output(self, value: Any) -> bool:
        """Whether a value is the output that the last step consumed, or that a part of it."""
        if self._output is None or not isinstance(value, torch.Tensor):
            return False
        return self._output() is _whole(value)

    @property
    def _over(self) -> bool:
        return self.total is not None and self.step + 1 >= self.total and self.stepped

    @property
    def running(self) -> bool:
        """Whether a run has begun and not yet ended."""
        return self._begun and not self._over

    def on_forward(self, announced: int | None = None, time: Any = None) -> None:
        """A transformer forward begins. Where no run has begun, every forward is one.

        Args:
            announced: how many steps the pipeline says this run has, where it does.
            time: the timestep that the forward is given, where it is.
        """
        if not self._begun:
            self._begin()
        if not self.stepped and not self._steps and self._begun and self._time is not None:
            self._look_at(time)
        if not self.stepped:
            self.branch += 1
            return
        if self.total is None and self._begun:
            self._count(announced)
            if self.step < 0 and self._scheduler is not None:  # timesteps changed in the middle
                self._catch_up(self._scheduler)
        if self._over:  # whoever calls now has a loop that nobody follows
            self._begun = False
            self._begin()
        self.step, self.branch, self.stepped = self.step + 1, 0, False
        one = isinstance(time, torch.Tensor) and time.numel() > 0 and time.ndim < 2
        self._time = time.detach() if one and not self._steps else None

    def _look_at(self, time: Any) -> None:
        """Whether a loop that never stepped its scheduler is at another timestep than before."""
        before, scheduler = self._time, self._scheduler
        if before is None or scheduler is None or not isinstance(time, torch.Tensor):
            return
        places = [_place_in(scheduler.timesteps, x) for x in (before, time)]
        if None not in places:
            self.stepped = places[0] != places[1]
        elif self.branch + 1 == MANY and time.shape == before.shape:
            self.lost = not torch.equal(time, before)

    def times(self) -> list[float] | None:
        """Where the run's steps stand on their way from 0 to 1, and 1; None where it is unknown.

        Read from the scheduler's timesteps, which waits for the device.
        """
        timesteps = getattr(self._scheduler, "timesteps", None)
        if self.total is None or self.evaluations != 1 or not isinstance(timesteps, torch.Tensor):
            return None
        read = [float(time) for time in timesteps[-self.total :].flatten().tolist()]
        if len(read) != self.total or not read[0] > 0:
            return None
        times = [1 - time / read[0] for time in read] + [1.0]
        rising = all(a < b for a, b in itertools.pairwise(times[:-1])) and times[-2] <= 1
        return times if rising else None

    @property
    def _scheduler(self) -> Any:
        return None if self._own is None else self._own()

    def _count(self, announced: int | None) -> None:
        """How many model evaluations the run has.

        Only at its first forward, because image-to-image pipelines set the begin index late.
        """
        scheduler = self._scheduler
        if scheduler is None:
            return
        self.total = len(scheduler.timesteps) - _begin_index(scheduler)
        self.evaluations = getattr(scheduler, "order", 1)
        # Some video-to-video pipelines cut their timesteps silently; those that step a copy for
        # every frame take more steps than each of the copies. What is not news may count otherwise.
        news = announced is not None and announced != getattr(scheduler, "num_inference_steps", 0)
        if announced is not None and news and (announced < self.total or self._copied):
            self.total = announced

    def _begin_at(self, index: int) -> int:
        """The first step was that one of the scheduler's; loops may skip some without a word."""
        self._first = index
        scheduler = self._scheduler
        if self.total is not None and scheduler is not None:
            self.total = min(self.total, len(scheduler.timesteps) - index)
        return index

    def join(self, copied: Any) -> None:
        """A copy is stepped in place of the scheduler, or beside it."""
        self._copied = True
        self.add(copied)


def _place_in(timesteps: Any, time: torch.Tensor) -> int | None:
    """Which of some timesteps one is a view of; None where it is a tensor of its own."""
    if not isinstance(timesteps, torch.Tensor) or timesteps.device != time.device:
        return None
    if timesteps.is_meta or time.untyped_storage().data_ptr() != (
        timesteps.untyped_storage().data_ptr()
    ):
        return None
    return int(time.storage_offset())


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor is a view of."""
    return tensor if tensor._base is None else tensor._base


def loops_begun() -> list[Tracker]:
    """The loops that are running and were begun in this thread or task."""
    begun = [reference() for reference in _BEGUN.get()]
    return [tracker for tracker in begun if tracker is not None and tracker.running]


def tracker_of(scheduler: Any) -> Tracker | None:
    """The tracker that a scheduler reports to, None if it is not tracked."""
    tracker: Tracker | None = getattr(scheduler, "__dict__", {}).get(TRACKER)
    return tracker


def is_under_way(scheduler: Any) -> bool:
    """Whether a scheduler that is not tracked has timesteps and not yet taken all its steps."""
    if getattr(scheduler, "num_inference_steps", None) is None:
        return False
    timesteps = getattr(scheduler, "timesteps", None)
    return timesteps is not None and _steps_taken(scheduler) < len(timesteps) - _begin_index(
        scheduler
    )


def _steps_taken(scheduler: Any) -> int:
    index = getattr(scheduler, "step_index", None)
    return 0 if index is None else max(int(index) - _begin_index(scheduler), 0)


def _begin_index(scheduler: Any) -> int:
    return getattr(scheduler, "begin_index", None) or 0


def track(scheduler: Any, tracker: Tracker) -> Callable[[], None]:
    """Make a scheduler report to a tracker, until the returned function is called.

    The object gets a subclass of the same name, so that pipelines that inspect signatures, save the
    scheduler's class name or deep-copy it see what they saw before.
    """
    if TRACKER in scheduler.__dict__:
        untrack(scheduler)
    cls: Any = type(scheduler)
    scheduler.__class__ = _tracked_class(cls)
    scheduler.__dict__[TRACKER] = tracker
    tracker.add(scheduler)
    return functools.partial(untrack, scheduler)


def untrack(scheduler: Any) -> None:
    """Give the scheduler its own class back."""
    scheduler.__dict__.pop(TRACKER, None)
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
        if (tracker := tracker_of(self)) is not None:
            tracker.on_set_timesteps(self)
        return result

    @functools.wraps(cls.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = cls.step(self, *args, **kwargs)
        if (tracker := tracker_of(self)) is not None:
            tracker.on_step(args[0] if args else kwargs.get("model_output"))
        return result

    def new(_: Any, *args: Any, **kwargs: Any) -> Any:
        return cls(*args, **kwargs)  # made from the class of a tracked one, and not tracked

    def reduce(self: Any, protocol: Any = 2) -> Any:
        # Pickled schedulers come back as what they were before the patch.
        state = {k: v for k, v in self.__dict__.items() if k != TRACKER}
        return _restore, (cls, state)

    names = {
        "set_timesteps": set_timesteps,
        "step": step,
        "__new__": new,
        "__reduce_ex__": reduce,
        "__deepcopy__": _deepcopy,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "_diffpatch_original": cls,
    }
    bases: tuple[Any, ...] = (cls,)
    return _equal_to(cls)(cls.__name__, bases, names)


def _equal_to(cls: Any) -> Any:
    """A metaclass of classes that are equal to another: BriaPipeline compares its scheduler's."""
    kind: Any = type(cls)
    bases: tuple[Any, ...] = (kind,)

    def equal(made: Any, other: Any) -> bool:
        return other is made or other is cls

    return type(kind.__name__, bases, {"__eq__": equal, "__hash__": lambda made: hash(cls)})


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    # A copy made during a run takes part in it; any other belongs to somebody else.
    cls: Any = type(self)
    tracker = tracker_of(self)
    joins = tracker is not None and _takes_part(self, tracker)
    new = object.__new__(cls if joins else cls._diffpatch_original)
    memo[id(self)] = new
    items = {k: v for k, v in self.__dict__.items() if joins or k != TRACKER}
    new.__dict__.update({k: copy.deepcopy(v, memo) for k, v in items.items()})
    if tracker is not None and joins:
        tracker.join(new)
    return new


def _takes_part(scheduler: Any, tracker: Tracker) -> bool:
    """Whether a copy that is made now is one more scheduler of the run."""
    pipeline = callers.calling_pipeline()
    if pipeline is not None:
        return any(own is scheduler for own in callers.schedulers_of(pipeline))
    return tracker.running and tracker.thread == threading.get_ident()


def _restore(cls: Any, state: dict[str, Any]) -> Any:
    new = cls.__new__(cls)
    new.__dict__.update(state)
    return new
