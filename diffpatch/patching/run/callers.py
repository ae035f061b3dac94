"""Who calls: the pipeline, or the loop, in which a forward of a transformer runs.

A forward does not name its scheduler, and many schedulers may drive one transformer: clones of a
pipeline, pipelines made by ``from_pipe``, loops that take turns in one thread. But whoever denoises
stands on the call stack, with the scheduler in hand. So the stack is read, once a forward, from the
inside out, up to the first function that holds a scheduler in the middle of a run: that of the
pipeline whose call it is, else a local variable, else an attribute of one.
"""

from __future__ import annotations

import inspect
import itertools
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from diffpatch import internals

TRACKER = "_diffpatch_tracker"  # where a scheduler keeps the tracker it reports to
# Modules between a loop and a transformer, which hold no scheduler.
_BETWEEN = (
    "torch.", "accelerate.", "peft.", "diffusers.models.", "diffusers.hooks.", "diffpatch.patching."
)  # fmt: skip
# The frame, two variables and the argument of getrefcount; one more is somebody else's.
_OUR_REFERENCES = 4
_ANCHOR = "_diffpatch_anchor"  # beside the variables of a function that is under way
_NEAR = 6  # functions around a forward: helpers for one step, and the one that loops


@dataclass(frozen=True)
class Caller:
    """The function that denoises.

    Attributes:
        pipeline: the pipeline that denoises, where one is in hand.
        is_call: whether this is its own call, and not a loop around it.
        schedulers: the ones in hand; more than one leaves open which of them drives the forward.
        values: its local variables, not to be kept.
    """

    pipeline: Any
    is_call: bool
    schedulers: list[Any]
    values: Mapping[str, Any]


def find(running: Callable[[Any], bool], *, deep: bool = False) -> Caller | None:
    """The innermost pipeline or loop on the stack, None if there is none.

    A loop that has a pipeline at hand may use its scheduler or only its transformer. So what a
    pipeline suggests has to agree with the schedulers that functions further out have in hand,
    unless one of those is the function around it.

    Args:
        running: whether a scheduler is in the middle of a run.
        deep: whether an object that holds a pipeline is taken to run that, where nothing else
            tells; the innermost one.
    """
    suggested, within = None, ""
    for frame in _frames():
        caller = _look(frame, running, deep)
        if caller is None:
            continue
        only_suggested = caller.pipeline is not None and not caller.is_call
        if suggested is None:
            if not only_suggested or deep:
                return caller
            suggested, within = caller, frame.f_code.co_qualname
        elif caller.is_call:
            return suggested
        elif not only_suggested:
            if within.startswith(frame.f_code.co_qualname + ".<locals>."):
                return caller
            several = _distinct(suggested.schedulers + caller.schedulers)
            return suggested if len(several) == 1 else Caller(None, False, several, {})
    return suggested


def calling_pipeline() -> Any:
    """The innermost pipeline whose call is on the stack, or None."""
    called = (_pipeline_called(frame, _locals(frame)) for frame in _frames() if _is_call(frame))
    return next(filter(None, called), None)


class _Anchor:
    """What only the frame of one function holds."""


def functions_under_way() -> list[weakref.ref[Any]]:
    """What dies when a function on the stack is left: one for each, from the inside out.

    Frames take no weak references, but keep what is put beside their variables. A module has one
    code and runs it once, and so has a notebook's cell.
    """
    found: list[weakref.ref[Any]] = []
    for frame in itertools.islice(_frames(), _NEAR):
        if not frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            return [*found, weakref.ref(frame.f_code)]
        held = frame.f_locals
        anchor = held.setdefault(_ANCHOR, _Anchor())
        _empty(frame, held)
        found.append(weakref.ref(anchor))
        del held
    return found


def _frames() -> Iterator[types.FrameType]:
    """The functions on the stack that may hold a scheduler, from the inside out."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if not frame.f_globals.get("__name__", "").startswith(_BETWEEN):
            yield frame
        frame = frame.f_back


def _is_call(frame: types.FrameType) -> bool:
    code = frame.f_code
    return code.co_name == "__call__" and code.co_varnames[:1] == ("self",)


def _pipeline_called(frame: types.FrameType, values: Mapping[str, Any]) -> Any:
    """The pipeline whose ``__call__`` this is, or None."""
    called = values.get("self") if _is_call(frame) else None
    return called if internals.is_pipeline(called) else None


def _look(frame: types.FrameType, running: Callable[[Any], bool], deep: bool) -> Caller | None:
    """What a function has in hand that is in the middle of a run."""
    values = _locals(frame)
    pipeline = _pipeline_called(frame, values)
    if pipeline is not None and (chosen := _distinct(_running_in(pipeline, running))):
        return Caller(pipeline, True, chosen, values)
    direct = [value for value in values.values() if _drives(value)]
    if pipeline is not None:
        return Caller(pipeline, True, _distinct(filter(running, direct)), values)
    holds = [*values.values(), *(_pipelines_in(values.values()) if deep else ())]
    holders = [(value, s) for value in holds for s in _running_in(value, running)]
    by_pipelines = [(value, s) for value, s in holders if internals.is_pipeline(value)]
    others = [s for value, s in holders if not internals.is_pipeline(value)]
    if chosen := _distinct(filter(running, direct)) or _distinct(others):
        return Caller(None, False, chosen, values)
    if chosen := _distinct(s for _, s in by_pipelines):
        return Caller(by_pipelines[0][0] if len(chosen) == 1 else None, False, chosen, values)
    return None


def _running_in(holder: Any, running: Callable[[Any], bool]) -> list[Any]:
    """The schedulers of an object that are in the middle of a run.

    Of a pipeline with several, such as those of video and sound, it is the one that diffusers calls
    the scheduler: the others go along with it.
    """
    found = [scheduler for scheduler in schedulers_of(holder) if running(scheduler)]
    if len(found) > 1 and internals.is_pipeline(holder):
        first = vars(holder).get("scheduler")
        return [one for one in found if one is first] or found
    return found


def calls_of(modules: Iterable[Any]) -> int:
    """How many calls of some modules this thread is in the middle of."""
    code, count = torch.nn.Module._call_impl.__code__, 0
    frame: types.FrameType | None = sys._getframe(1)
    ids = {id(module) for module in modules}
    while frame is not None:
        if frame.f_code is code and id(_locals(frame).get("self")) in ids:
            count += 1
        frame = frame.f_back
    return count


def _pipelines_in(holders: Iterable[Any]) -> list[Any]:
    """The pipelines among the attributes of objects."""
    attributes = (getattr(holder, "__dict__", None) for holder in holders)
    found = (list(one.values()) for one in attributes if type(one) is dict)
    return [value for values in found for value in values if internals.is_pipeline(value)]


def schedulers_of(holder: Any) -> list[Any]:
    """The schedulers among the attributes of an object, or the values of a dictionary."""
    values = holder if type(holder) is dict else getattr(holder, "__dict__", None)
    if not isinstance(values, dict) or isinstance(holder, types.ModuleType):
        return []
    found = [value for value in list(values.values()) if _drives(value)]
    wrapped = values.get("scheduler")
    if wrapped is not None and not _drives(wrapped) and is_scheduler(wrapped):
        # A stand-in that hands everything on, as request-scoped pipelines have.
        found += [value for value in vars(wrapped).values() if _drives(value)]
    return found


def is_scheduler(component: Any) -> bool:
    """Whether a pipeline component drives a denoising loop."""
    return hasattr(component, "set_timesteps") and hasattr(component, "step")


def _drives(value: Any) -> bool:
    """Whether a value is a scheduler by its class: no `__getattr__` of anybody's is run."""
    return not isinstance(value, type) and is_scheduler(type(value))


def _distinct(schedulers: Iterable[Any]) -> list[Any]:
    """Each loop once: copies that a loop steps besides report to the tracker of one scheduler."""
    found: dict[int, Any] = {}
    for scheduler in schedulers:
        tracker = vars(scheduler).get(TRACKER)
        key = id(scheduler if tracker is None else tracker)
        if key not in found or (tracker is not None and tracker.is_own(scheduler)):
            found[key] = scheduler
    return list(found.values())


def _locals(frame: types.FrameType) -> dict[str, Any]:
    """The local variables of a running function."""
    held = frame.f_locals
    values = dict(held)
    values.pop(_ANCHOR, None)
    _empty(frame, held)
    return values


def _empty(frame: types.FrameType, held: Any) -> None:
    """Let go of a frame's `f_locals`.

    Up to Python 3.12 looking leaves a copy of the variables in the frame, which would keep what the
    function deletes alive; it is emptied, unless the function itself has asked for it by `locals`.
    """
    copied = sys.version_info < (3, 13) and frame.f_code.co_flags & inspect.CO_OPTIMIZED
    if copied and sys.getrefcount(held) <= _OUR_REFERENCES:
        anchor = held.get(_ANCHOR)
        held.clear()
        if anchor is not None:
            held[_ANCHOR] = anchor
