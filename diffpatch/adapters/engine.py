"""What every adapter does with an attention call of its engine: sparse or dense, and why.

An engine tells less than a diffusers pipeline does, and each one something else. What it tells of a
call is a `Place`; what it does not tell, a method or a schedule that needs it is refused when the
adapter is made, not in the middle of a run.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from diffpatch.errors import BadParameter
from diffpatch.kernels.block_sparse import backends
from diffpatch.kernels.gpu.device import on_device_of
from diffpatch.kernels.memo import neutral
from diffpatch.methods.base import AttentionCall, Method
from diffpatch.methods.registry import MethodLike, make_method
from diffpatch.patching import composition
from diffpatch.patching.schedule import Amount, BoundSchedule, Schedule
from diffpatch.patterns.grid import TokenGrid
from diffpatch.patterns.pattern import BlockPattern

logger = logging.getLogger(__name__)

_CACHED = 64  # patterns an adapter keeps: of a few grids, in all their variants
_RUNS = 4  # runs whose state is kept; an engine that tells when a run ends frees it earlier


@dataclass(frozen=True)
class Place:
    """Where a call stands, as far as the engine tells.

    Attributes:
        layer: number of the layer, from 0.
        layers: how many there are.
        step: denoising step, from 0.
        steps: denoising steps of the run.
        branch: what tells the guidance branches of a step apart.
        run: what tells runs apart.
    """

    layer: int = 0
    layers: int | None = None
    step: int = 0
    steps: int | None = None
    branch: Hashable = 0
    run: Hashable = None


@dataclass(frozen=True)
class Told:
    """What an engine tells of every call: layers, steps, and runs with their branches."""

    layers: bool = False
    steps: bool = False
    runs: bool = False


class EngineAttention:
    """A method behind the attention calls of an engine, with its patterns, state and counts.

    Args:
        method: a name from `list_methods()` or a method object.
        told: what the engine tells; what needs more is refused.
        dense_steps: first steps that stay dense: a count, or a fraction of the run.
        dense_last_steps: the same for the last ones.
        dense_layers: first layers that stay dense, a count.
        backend: the kernel's, see `diffpatch.attention`.
        **params: parameters of the method.

    Raises:
        BadParameter: the method or the schedule needs what the engine does not tell.
    """

    def __init__(
        self,
        method: MethodLike,
        told: Told,
        *,
        dense_steps: Amount = 0,
        dense_last_steps: Amount = 0,
        dense_layers: int = 0,
        backend: str = "auto",
        **params: Any,
    ) -> None:
        self.method: Method = make_method(method, **params)
        self.schedule = Schedule(dense_steps, dense_last_steps, dense_layers)
        self.backend = backend
        composition.check_method(self.method)
        _check_told(self.method, self.schedule, told)
        self.reasons: Counter[str] = Counter()  # why calls were dense; "" counts sparse ones
        self._states: OrderedDict[Hashable, Any] = OrderedDict()
        self._pattern = functools.lru_cache(_CACHED)(self._make_pattern)
        self._bound = functools.lru_cache(_CACHED)(self._bind)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        grid: TokenGrid | str,
        place: Place,
        dense: Callable[[], torch.Tensor],
        scale: float | None = None,
        key_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One self-attention call, (B, S, H, D) in and out.

        Args:
            q: queries; k and v likewise, perhaps with fewer heads.
            k: keys.
            v: values.
            grid: where the tokens stand, or why nothing tells.
            place: where the call stands.
            dense: what the engine computes without diffpatch.
            scale: the factor on q·k; None means 1 / sqrt(D).
            key_mask: bool (B, S), True where a key may be attended to; None allows all.

        Raises:
            BadParameter: what the method carries from step to step passes its limit.
        """
        found = self._choose(q, k, grid, place)
        if isinstance(found, str):
            self.dense_because(found)
            return dense()
        if not self.reasons[""]:
            logger.info("%s attention on %s, %.3f kept", self.method.name, grid, found.kept)
        self.reasons[""] += 1
        state = self._state(place, grid)
        call = AttentionCall(
            found, scale, key_mask, self.backend, place.step, place.steps, state, layer=place.layer
        )
        with on_device_of(q):
            out = self.method.attend(q, k, v, call).out
        self._check_state()
        return out

    def summary(self) -> str:
        """What the calls since `begin` did, in one line."""
        dense = ", ".join(f"{why} ({count})" for why, count in self.reasons.items() if why)
        sparse, total = self.reasons[""], sum(self.reasons.values())
        return f"{self.method.name}: {sparse} of {total} attention calls" + (
            f"; dense: {dense}" if dense else ""
        )

    def begin(self) -> None:
        """Count from here."""
        self.reasons = Counter()

    def dense_because(self, reason: str) -> None:
        """Count a dense call, and say once why there are such."""
        if not self.reasons[reason]:
            logger.info("dense attention: %s", reason)
        self.reasons[reason] += 1

    def forget(self, run: Hashable) -> None:
        """Drop what the method carried through a run."""
        self._states.pop(run, None)

    def _choose(
        self, q: torch.Tensor, k: torch.Tensor, grid: TokenGrid | str, place: Place
    ) -> BlockPattern | str:
        """The pattern of a call, or why it is dense."""
        if isinstance(grid, str):
            return grid
        if not q.shape[1] == k.shape[1] == grid.num_tokens:
            return f"{q.shape[1]} queries and {k.shape[1]} keys are not the {grid} tokens"
        if grid.num_frames == 1 and "image" not in self.method.kinds:
            return f"{self.method.name} saves between frames and there is one"
        reason = self._bound(place.steps, place.layers).reason(place.step, place.layer)
        if reason is not None:
            return reason
        pattern = self._pattern(grid, self.method.variant(place.layer, place.step))
        pattern = pattern.for_heads(q.shape[2])
        if pattern.kept >= 1 and not self.method.dynamic:
            return "pattern keeps everything"
        blocks = pattern.on(q.device)
        return backends.unsupported_reason(q, blocks, self.backend) or pattern

    def _state(self, place: Place, grid: TokenGrid | str) -> dict[str, Any]:
        if not self.method.needs_steps:
            return {}
        of_run = self._states.setdefault(place.run, defaultdict(dict))
        self._states.move_to_end(place.run)
        if len(self._states) > _RUNS:
            self._states.popitem(last=False)
        state: dict[str, Any] = of_run[place.layer, place.branch, grid]
        return state

    def _check_state(self) -> None:
        """Refuse politely before the state of the runs outgrows what the method may hold."""
        limit = self.method.state_limit()
        if limit == float("inf"):
            return
        kept = (x for run in self._states.values() for one in run.values() for x in one.values())
        held = sum(x.numel() * x.element_size() for x in kept if isinstance(x, torch.Tensor))
        if held > limit:
            self._states.clear()
            raise BadParameter(
                f"{self.method.name}: its state passes {held / 2**30:.2f} GiB and the limit is"
                f" {limit / 2**30:.2f} GiB; raise budget_gib, or {self.method.state_advice}"
            )

    def _make_pattern(self, grid: TokenGrid, variant: Hashable) -> BlockPattern:
        with neutral():
            return self.method.pattern(grid, variant)

    def _bind(self, steps: int | None, layers: int | None) -> BoundSchedule:
        schedule = self.schedule
        dense_layers, first = schedule.dense_layers, schedule.dense_steps
        assert isinstance(dense_layers, int)
        if steps is None and isinstance(first, int) and not schedule.dense_last_steps:
            return BoundSchedule(first, None, frozenset(range(dense_layers)))
        return schedule.bind(steps, dense_layers if layers is None else layers)


def _check_told(method: Method, schedule: Schedule, told: Told) -> None:
    """Refuse a method or a schedule that needs more than the engine tells."""
    if method.learned_from() is not None:
        raise BadParameter(
            f"{method.name} with weights belongs to the layers of a diffusers model: use"
            " diffpatch.patch, or leave weights out"
        )
    places = composition.STEPS
    by_layer = any(method.variant(i, 0) != method.variant(0, 0) for i in places)
    by_step = any(
        method.variant(layer, step) != method.variant(layer, 0)
        for layer, step in itertools.product(places, places)
    )
    untold = {
        "layers": (by_layer or bool(schedule.dense_layers)) and not told.layers,
        "steps": (by_step or bool(schedule.dense_steps or schedule.dense_last_steps))
        and not told.steps,
        "runs and their branches": method.needs_steps and not told.runs,
    }
    missing = [what for what, needed in untold.items() if needed]
    if missing:
        raise BadParameter(
            f"{method.name} differs between layers or steps, and {' and '.join(missing)} are not"
            " told here: use diffpatch.patch, or parameters and a schedule that do not need them"
        )
