"""What the transformers of one patched target share: method, schedule, place in the run, counts."""

from __future__ import annotations

import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch

from diffpatch import internals
from diffpatch.errors import BadParameter
from diffpatch.kernels.memo import neutral
from diffpatch.methods.base import Method
from diffpatch.methods.packed import pattern_on
from diffpatch.patching.report import Record
from diffpatch.patching.schedule import BoundSchedule, Schedule
from diffpatch.patching.tracker import Tracker, is_scheduler, is_tracked, track, untrack
from diffpatch.patterns.grid import Grid
from diffpatch.patterns.pattern import BlockPattern

if TYPE_CHECKING:
    from diffpatch.patching.transformer import PatchedTransformer

# What watches sparse calls: gets (transformer, layer, step, branch), the output (B, S, H, D), and a
# function that computes the dense one.
Observer = Callable[[tuple[str, int, int, int], torch.Tensor, Callable[[], torch.Tensor]], None]

_CACHED_GRIDS = 4  # grids whose patterns a patch keeps, in all their variants


class Patch:
    """What the transformers of one target share: method, schedule, position in the run, counts.

    Nothing here outlives `unpatch`, and nothing is shared between two patched targets.
    """

    def __init__(self, method: Method, schedule: Schedule, backend: str, target: Any) -> None:
        self.method = method
        self.schedule = schedule
        self.backend = backend
        self.tracker = Tracker()
        self.record = Record()
        # What the method keeps, by (transformer, layer, guidance branch, sample).
        self.state: defaultdict[tuple[str, int, int, int], dict[str, Any]] = defaultdict(dict)
        self.transformers: list[PatchedTransformer] = []
        self.observers: list[Observer] = []
        self._run = -1
        self._bound: dict[int, BoundSchedule] = {}  # of this run, by number of layers
        self._patterns: OrderedDict[Grid, dict[Hashable, BlockPattern]] = OrderedDict()
        self._target = weakref.ref(target)
        self._schedulers: list[Any] = []

    def follow_schedulers(self) -> None:
        """Track the schedulers of the target, also those set after patching."""
        target = self._target()
        current = [c for c in getattr(target, "components", {}).values() if is_scheduler(c)]
        if all(is_tracked(s, self.tracker) for s in current):
            return
        for scheduler in current:
            if not is_tracked(scheduler, self.tracker):
                track(scheduler, self.tracker)
                # Its set_timesteps may already have been called; if not, this run is empty.
                if getattr(scheduler, "timesteps", None) is not None:
                    self.tracker.on_set_timesteps(scheduler)
        for gone in self._schedulers:
            if is_tracked(gone, self.tracker) and not any(gone is s for s in current):
                untrack(gone)
        self._schedulers = current

    def begin_forward(self) -> None:
        """Note that a transformer forward begins, wherever its scheduler comes from."""
        self.follow_schedulers()
        self.tracker.on_forward(getattr(self._target(), internals.PIPELINE_STEPS, None))

    def unfollow_schedulers(self) -> None:
        """Give all schedulers their classes back."""
        for scheduler in self._schedulers:
            if is_tracked(scheduler, self.tracker):
                untrack(scheduler)
        self._schedulers = []

    def enter_run(self) -> None:
        """Forget the last run when a new one has begun."""
        if self.tracker.run != self._run:
            self._run = self.tracker.run
            self._bound.clear()
            self.reset()

    def reset(self) -> None:
        """Forget all state of the run."""
        self.record = Record()
        self.state.clear()

    def forget(self, transformer: str) -> None:
        """Forget the state of one transformer; its counts stay."""
        for key in [key for key in self.state if key[0] == transformer]:
            del self.state[key]

    def check_state(self) -> None:
        """Refuse politely before the state of a run outgrows what the method may hold."""
        limit = self.method.state_limit()
        if limit < float("inf") and (held := self.state_bytes()) > limit:
            self.reset()
            raise BadParameter(
                f"{self.method.name}: its state passes {held / 2**30:.2f} GiB and the limit is"
                f" {limit / 2**30:.2f} GiB; raise budget_gib, or {self.method.state_advice}"
            )

    def state_bytes(self) -> int:
        """Memory that the method holds across steps."""
        held = (value for one in self.state.values() for value in one.values())
        return sum(x.numel() * x.element_size() for x in held if isinstance(x, torch.Tensor))

    def bound(self, num_layers: int) -> BoundSchedule:
        """The schedule of the current run."""
        if num_layers not in self._bound:
            tracker = self.tracker
            bound = self.schedule.bind(tracker.total, num_layers, tracker.evaluations)
            self._bound[num_layers] = bound
        return self._bound[num_layers]

    def pattern(self, grid: Grid, variant: Hashable) -> BlockPattern:
        """The method's pattern, from the cache where possible."""
        made = self._patterns.setdefault(grid, {})
        self._patterns.move_to_end(grid)
        if len(self._patterns) > _CACHED_GRIDS:
            self._patterns.popitem(last=False)
        if variant not in made:
            with neutral():
                made[variant] = pattern_on(self.method, grid, variant)
        return made[variant]
