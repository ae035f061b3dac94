"""Who calls: the pipeline, or the loop, in which a forward of a transformer runs.

A forward does not name its scheduler, and many schedulers may drive one transformer: clones of a
pipeline, pipelines made by ``from_pipe``, loops that take turns in one thread. But whoever denoises
stands on the call stack, with the scheduler in hand. So the stack is read, once a forward, from the
inside out, up to the first function that holds a scheduler in the middle of a run: the ``self`` of
a pipeline's ``__call__``, else a local variable, else an attribute of one.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from diffpatch import internals

TRACKER = "_diffpatch_tracker"  # where a scheduler keeps the tracker it reports to
# Modules between a loop and a transformer, which hold no scheduler.
_BETWEEN = (
    "torch.", "accelerate.", "peft.", "diffusers.models.", "diffusers.hooks.", "diffpatch.patching."
)  # fmt: skip
# The frame, the variable and the argument of getrefcount; one more is somebody else's.
_OUR_REFERENCES = 3


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


def find(running: Callable[[Any], bool], loops: bool = True) -> Caller | None:
    """The innermost pipeline or loop on the stack, None if there is none.

    Args:
        running: whether a scheduler is in the middle of a run.
        loops: whether to look for loops outside of pipelines, too.
    """
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if not frame.f_globals.get("__name__", "").startswith(_BETWEEN):
            caller = _look(frame, running, loops)
            if caller is not None:
                return caller
        frame = frame.f_back
    return None


def calling_pipeline() -> Any:
    """The innermost pipeline whose call is on the stack, or None."""
    caller = find(lambda scheduler: False, loops=False)
    return None if caller is None else caller.pipeline


def _look(frame: types.FrameType, running: Callable[[Any], bool], loops: bool) -> Caller | None:
    code = frame.f_code
    call = code.co_name == "__call__" and code.co_varnames[:1] == ("self",)
    if not (call or loops):
        return None
    held = _locals(frame)
    pipeline = held.get("self") if call else None
    if not internals.is_pipeline(pipeline):
        pipeline = None
        if not loops:
            return None
    direct = [value for value in held.values() if _drives(value)]
    if pipeline is not None:
        for group in (schedulers_of(pipeline), direct):
            if chosen := _distinct(filter(running, group)):
                return Caller(pipeline, True, chosen, held)
        return Caller(pipeline, True, [], held)
    if chosen := _distinct(filter(running, direct)):
        return Caller(None, False, chosen, held)
    holders = [(value, s) for value in held.values() for s in schedulers_of(value) if running(s)]
    if not holders:
        return None
    chosen = _distinct(s for _, s in holders)
    owner = next((h for h, s in holders if s is chosen[0] and internals.is_pipeline(h)), None)
    return Caller(owner if len(chosen) == 1 else None, False, chosen, held)


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
        if key not in found or tracker.is_own(scheduler):
            found[key] = scheduler
    return list(found.values())


def _locals(frame: types.FrameType) -> dict[str, Any]:
    """The local variables of a running function.

    Up to Python 3.12 looking leaves a copy of them in the frame, which would keep what the function
    deletes alive; the copy is emptied, unless the function itself has asked for it by `locals`.
    """
    held = frame.f_locals
    values = dict(held)
    copied = sys.version_info < (3, 13) and frame.f_code.co_flags & inspect.CO_OPTIMIZED
    if copied and sys.getrefcount(held) <= _OUR_REFERENCES:
        held.clear()
    return values
