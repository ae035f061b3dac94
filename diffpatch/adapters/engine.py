"""What every adapter does with an attention call of its engine: sparse or dense, and why.

An engine tells less than a diffusers pipeline does, and each one something else. What it tells of a
call is a `CallPlace`; a method or a schedule that needs what it does not tell is refused when the
adapter is made, not in the middle of a run.
"""

from __future__ import annotations

import functools
import itertools
import logging
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from diffpatch.errors import BadParameter
from diffpatch.kernels.block_sparse import backends
from diffpatch.kernels.block_sparse.backends import check_backend
from diffpatch.kernels.gpu.device import on_device_of
from diffpatch.kernels.memo import Recent
from diffpatch.methods.base import AttentionCall, Method
from diffpatch.methods.packed import pattern_on
from diffpatch.methods.registry import MethodLike, make_method
from diffpatch.patching.options import composition
from diffpatch.patching.options.schedule import Amount, BoundSchedule, Schedule
from diffpatch.patterns.grid import Grid, TokenGrid
from diffpatch.patterns.pattern import BlockPattern

logger = logging.getLogger(__name__)

_CACHED = 64  # patterns an adapter keeps: of a few grids, in all their variants
_RUNS = 4  # runs whose state is kept; an engine that tells when a run ends frees it earlier


@dataclass(frozen=True)
class CallPlace:
    """Where a call stands, as far as the engine tells.

    Attributes:
        layer: number of the layer, from 0; None where this call does not tell.
        step: denoising step, from 0; None where this call does not tell.
        steps: denoising steps of the run.
        branch: what tells the guidance branches of a step apart.
        run: what tells runs apart.
        some_heads: whether devices share the heads, so that a call has some of them.
    """

    layer: int | None = None
    step: int | None = None
    steps: int | None = None
    branch: Hashable = 0
    run: Hashable = None
    some_heads: bool = False


@dataclass(frozen=True)
class Told:
    """What an engine tells of calls, or what a method and its schedule need to be told.

    Attributes:
        layers: the number of the layer.
        steps: the denoising step.
        totals: how many steps there are.
        runs: which run and guidance branch it is.
    """

    layers: bool = False
    steps: bool = False
    totals: bool = False
    runs: bool = False

    @classmethod
    def needed(cls, method: Method, schedule: Schedule) -> Told:
        """What a method and a schedule depend on."""
        places = composition.STEPS
        layers = any(method.variant(i, 0) != method.variant(0, 0) for i in places)
        steps = any(
            method.variant(layer, step) != method.variant(layer, 0)
            for layer, step in itertools.product(places, places)
        )
        first, last = schedule.dense_steps, schedule.dense_last_steps
        budgets = getattr(method, "budgets", None)  # of dynamic, for each layer its own
        return cls(
            layers or bool(schedule.dense_layers or budgets) or method.needs_steps,
            steps or bool(first or last) or method.needs_steps,
            bool(last) or (isinstance(first, float) and first > 0),
            method.needs_steps,
        )


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
        check_backend(backend)
        self.backend = backend
        composition.check_method(self.method)
        self.needs = Told.needed(self.method, self.schedule)
        self._check(told)
        self.reasons: Counter[str] = Counter()  # why calls were dense; "" counts sparse ones
        self._states: OrderedDict[Hashable, Any] = OrderedDict()
        self._let_go: deque[Hashable] = deque(maxlen=_CACHED)  # runs whose state made room
        self._lock = threading.Lock()  # for the table of states, not for what is in them
        self._patterns = Recent(_CACHED)
        self._bound = functools.lru_cache(_CACHED)(self._bind)

    def _check(self, told: Told) -> None:
        """Refuse what needs more than the engine tells."""
        if self.method.learned_from() is not None:
            raise BadParameter(
                f"{self.method.name} with weights belongs to the layers of a diffusers model: use"
                " diffpatch.patch, or leave weights out"
            )
        words = {
            "layers": "layers", "steps": "steps", "totals": "how many steps there are",
            "runs": "runs and their branches",
        }  # fmt: skip
        untold = [w for key, w in words.items() if getattr(self.needs, key) > getattr(told, key)]
        if untold:
            raise BadParameter(
                f"{self.method.name} differs between layers or steps, and {' and '.join(untold)}"
                " are not told here: use diffpatch.patch, or parameters and a schedule that do not"
                " need them"
            )

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        grid: Grid | str,
        place: CallPlace,
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
            self.dense_because(found, logging.WARNING if isinstance(grid, str) else logging.INFO)
            return dense()
        if not self.reasons[""]:
            logger.info("%s attention on %s, %.3f kept", self.method.name, grid, found.kept)
        self.reasons[""] += 1
        state = self._state(place, grid)
        layer, step = place.layer or 0, place.step or 0
        call = AttentionCall(
            found, scale, key_mask, self.backend, step, place.steps, state, layer=layer
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

    def dense_because(self, reason: str, level: int = logging.INFO) -> None:
        """Count a dense call, and say once why there are such."""
        if not self.reasons[reason]:
            logger.log(level, "dense attention: %s", reason)
        self.reasons[reason] += 1

    def forget(self, run: Hashable) -> None:
        """Drop what the method carried through a run."""
        with self._lock:
            self._states.pop(run, None)
            if run in self._let_go:  # its name may come back
                self._let_go.remove(run)

    def _choose(
        self, q: torch.Tensor, k: torch.Tensor, grid: Grid | str, place: CallPlace
    ) -> BlockPattern | str:
        """The pattern of a call, or why it is dense."""
        if isinstance(grid, str):
            return grid
        if not q.shape[1] == k.shape[1] == grid.num_tokens:
            return f"{q.shape[1]} queries and {k.shape[1]} keys are not the {grid} tokens"
        if (
            isinstance(grid, TokenGrid)
            and grid.num_frames == 1
            and "image" not in self.method.kinds
        ):
            return f"{self.method.name} saves between frames and there is one"
        if (place.layer is None and self.needs.layers) or (place.step is None and self.needs.steps):
            return "which layer or step it is is not told here"
        layer, step = place.layer or 0, place.step or 0
        bound = self._bound(place.steps)
        reason = bound if isinstance(bound, str) else bound.reason(step, layer)
        if reason is not None:
            return reason
        key = self.method, grid, self.method.variant(layer, step)
        pattern = self._patterns(key, lambda: pattern_on(*key))
        if place.some_heads and pattern.blocks.head_pattern is not None:
            return "its pattern differs between heads, which several devices share"
        pattern = pattern.for_heads(q.shape[2])
        if pattern.kept >= 1 and not self.method.dynamic:
            return "pattern keeps everything"
        blocks = pattern.on(q.device)
        return backends.unsupported_reason(q, blocks, self.backend) or pattern

    def _state(self, place: CallPlace, grid: Grid | str) -> dict[str, Any]:
        if not self.method.needs_steps:
            return {}
        with self._lock:
            lost = place.run not in self._states and place.run in self._let_go
            of_run = self._states.setdefault(place.run, defaultdict(dict))
            self._states.move_to_end(place.run)
            if len(self._states) > _RUNS:
                self._let_go.append(self._states.popitem(last=False)[0])
        if lost:
            logger.warning(
                "%s: more than %d runs go on at once, and one begins anew in the middle, because"
                " its state made room for another's: let fewer go on at once",
                self.method.name, _RUNS,
            )  # fmt: skip
        state: dict[str, Any] = of_run[place.layer, place.branch, grid]
        return state

    def _check_state(self) -> None:
        """Refuse politely before the state of the runs outgrows what the method may hold."""
        limit = self.method.state_limit()
        if limit == float("inf"):
            return
        with self._lock:
            runs = list(self._states.values())
        kept = (x for run in runs for one in list(run.values()) for x in list(one.values()))
        held = sum(x.numel() * x.element_size() for x in kept if isinstance(x, torch.Tensor))
        if held > limit:
            with self._lock:
                self._states.clear()
            raise BadParameter(
                f"{self.method.name}: its state passes {held / 2**30:.2f} GiB and the limit is"
                f" {limit / 2**30:.2f} GiB; raise budget_gib, or {self.method.state_advice}"
            )

    def _bind(self, steps: int | None) -> BoundSchedule | str:
        schedule = self.schedule
        layers, first = schedule.dense_layers, schedule.dense_steps
        assert isinstance(layers, int)
        if steps is not None:
            return schedule.bind(steps, layers)
        if isinstance(first, int) and not schedule.dense_last_steps:
            return BoundSchedule(first, None, frozenset(range(layers)))
        return "how many steps there are is not told here"


def layer_number(path: str) -> int | None:
    """The one number in the place of a layer in its model, or None."""
    numbers = [int(part) for part in path.split(".") if part.isdigit()]
    return numbers[0] if len(numbers) == 1 else None
