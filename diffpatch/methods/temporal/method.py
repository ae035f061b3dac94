"""Temporal attention: results or decisions of one denoising step serve the steps after it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from diffpatch.errors import BadParameter
from diffpatch.kernels.active_tiles.api import tile_table, unpack
from diffpatch.kernels.block_sparse.work import Work
from diffpatch.methods.base import Attended, AttentionCall, Method, param
from diffpatch.methods.dense import Dense
from diffpatch.methods.radial.method import Radial
from diffpatch.methods.registry import register
from diffpatch.methods.temporal import mask as temporal_mask
from diffpatch.methods.temporal import skip as temporal_skip
from diffpatch.methods.temporal import tail as temporal_tail
from diffpatch.methods.wrapper import Wrapper
from diffpatch.patterns.pattern import BlockPattern

REFRESH = {"tail": 4, "skip": 10, "mask": 5}  # each mode's own
DENSE_STEPS = {"tail": 0.15, "skip": 0.1, "mask": 0.2}
KEPT = 0.3  # of mode "mask"
PHASES = 3  # parts of a run that may have thresholds of their own


@register
@dataclass(frozen=True)
class Temporal(Wrapper):
    """Another method, together with what earlier denoising steps computed or found out.

    ``mode="tail"``: every `refresh` steps, the attention that the method leaves out is computed
    too, and stored (its output and its log-sum-exp), so these steps are dense. The steps between
    merge the stored part with their own sparse result in one softmax, which weighs the old part by
    the current queries. The state is large: about the size of the attention's output.

    ``mode="skip"``: tiles whose scores, in powers of 2, are below the running maximum plus
    `threshold` are left out from the next step on. After `refresh` steps all are checked again
    (LiteAttention).

    ``mode="mask"``: every `refresh` steps, each row of tiles chooses a fraction `kept` of its
    tiles: those whose loss would change its output most. The steps between compute only these
    (SparseD chooses by attention weights alone; this choice is that of `dynamic`).

    "skip" and "mask" store a bit for each pair of tiles, choose for each head, always compute text
    and each tile's view of itself, and also work on dense attention. State belongs to a layer and a
    guidance branch and ends with the run.

    Written ``"radial+temporal"``, ``"window+temporal"``, ``"dense+temporal"`` and so on.
    """

    name = "temporal"
    summary = "another method (or dense) with results or decisions of earlier steps"
    source = (
        "skip: LiteAttention, arXiv 2511.11062; mask: SparseD, arXiv 2509.24014; tail: tail cache;"
        " with frozen shares it is Re-ttention, arXiv 2505.22918"
    )
    needs_steps = True
    only_skips = False

    over: Method = param(
        Radial(), "the wrapped method, as in 'radial+temporal' or 'dense+temporal'"
    )
    mode: str = param("tail", "'tail' (results), 'skip' or 'mask' (decisions; bits, not results)")
    refresh: int | None = param(
        None, "steps from one refresh to the next; None takes 4 (tail), 10 (skip) or 5 (mask)"
    )
    threshold: float | tuple[float, ...] = param(
        -10.0, "skip: powers of 2 below the running maximum; three for the thirds of a run"
    )
    order: str = param("alternate", "skip: the order of the keys: forward, reverse or alternate")
    kept: float | None = param(
        None, "mask: the part of the wrapped method's tiles to keep; None takes 0.3"
    )
    keep_frames: int = param(0, "skip, mask: first latent frames whose keys are always computed")
    budget_gib: float = param(8.0, "most memory for the state of a run, in GiB")

    def validate(self) -> None:
        self.check(self.mode in REFRESH, "mode", f"one of {', '.join(REFRESH)}")
        least = "a count of at least 2" + ("; 1 would be dense attention" * (self.mode != "mask"))
        self.check(self.refresh is None or self.refresh >= 2, "refresh", least)
        thresholds = self.threshold if isinstance(self.threshold, Sequence) else (self.threshold,)
        self.check(
            len(thresholds) in (1, PHASES) and all(t <= 0 for t in thresholds),
            "threshold", "at most 0, one number or three for the thirds of a run",
        )  # fmt: skip
        self.check(
            self.order in ("forward", "reverse", "alternate"),
            "order", "'forward', 'reverse' or 'alternate'",
        )  # fmt: skip
        if self.kept is not None:
            self.check(0 < self.kept <= 1, "kept", "above 0 and at most 1")
            self.check(
                self.mode == "mask", "kept",
                f"None with mode={self.mode!r}, where {self.over.name} says what is kept",
            )  # fmt: skip
        self.check(self.keep_frames >= 0, "keep_frames", "a count")
        self._check_over()

    def _check_over(self) -> None:
        nested = not self.over.only_skips
        if nested or (self.mode == "tail" and isinstance(self.over, Dense)):
            other = "use mode='skip' or mode='mask', or" if not nested else "so"
            why = "remembers that itself" if self.over.dynamic else "leaves nothing out"
            raise BadParameter(
                f"temporal: it remembers what a method leaves out, and {self.over.name} {why};"
                f" {other} combine it with radial, neighborhood or window"
            )

    @classmethod
    def claims(cls, name: str, params: Mapping[str, Any]) -> bool:
        """`kept` is about the wrapped method's tiles in mode "mask" and the wrapped method's own
        in the others."""
        return name != "kept" or params.get("mode") == "mask"

    @property
    def default_dense_steps(self) -> float:
        """Each mode's own."""
        return DENSE_STEPS[self.mode]

    @property
    def dynamic(self) -> bool:
        return self.mode != "tail"

    def selection_of(
        self, pattern: BlockPattern, state: Mapping[str, Any]
    ) -> tuple[torch.Tensor, int] | None:
        """As in `Method`; in mode "skip", what the next step will compute."""
        if "bits" not in state:
            return None
        table = tile_table(pattern.on(state["bits"].device))
        return table.map(unpack(state["bits"], table.length)), 0

    @property
    def every(self) -> int:
        """Steps from one refresh to the next."""
        return REFRESH[self.mode] if self.refresh is None else self.refresh

    @property
    def chosen(self) -> float:
        """The part of the wrapped method's tiles that mode "mask" keeps."""
        return KEPT if self.kept is None else self.kept

    @property
    def kept_parameters(self) -> tuple[str, ...]:
        return ("kept",) if self.mode == "mask" else self.over.kept_parameters

    def with_kept(self, kept: float, kind: str = "video") -> Temporal:
        if self.mode == "mask":
            return replace(self, kept=kept)
        return super().with_kept(kept, kind)

    def variant(self, layer: int, step: int) -> Hashable:
        # A pattern that moved with the step would not fit what is remembered of it.
        return self.over.variant(layer, 0)

    def kept_at(self, pattern: BlockPattern, age: int) -> float:
        if self.mode == "mask":
            return temporal_mask.bounds(pattern, self.chosen, self.keep_frames)[1]
        if self.mode == "skip":
            return pattern.kept
        return 1.0 if age % self.every == 0 else pattern.kept

    def at_most(self, pattern: BlockPattern) -> bool:
        if self.mode == "mask":
            least, most = temporal_mask.bounds(pattern, self.chosen, self.keep_frames)
            return least < most
        return self.mode == "skip"

    def state_size(self, pattern: BlockPattern, heads: int, head_dim: int) -> int:
        if self.mode == "tail":  # outputs, and a 32-bit log-sum-exp each
            return pattern.grid.num_tokens * heads * (2 * head_dim + 4)
        return heads * -(-tile_table(pattern.blocks).length // 8)

    def state_limit(self) -> float:
        return self.budget_gib * 2**30

    def work(self, pattern: BlockPattern, age: int, backend: str) -> Work | None:
        return None  # what the steps remember changes what they compute

    @property
    def state_advice(self) -> str:
        if self.mode != "tail":
            return "keep more layers dense"
        return "use mode='skip' or mode='mask', which keep bits instead of results"

    def phase_threshold(self, call: AttentionCall) -> float:
        """The threshold of the call's third of the run."""
        if not isinstance(self.threshold, Sequence):
            return self.threshold
        if len(self.threshold) == 1:
            return self.threshold[0]
        return self.threshold[phase(call)]

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall
    ) -> Attended:
        factor = self.over.softmax_factor()
        if factor != 1:
            scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
            call = replace(call, scale=factor * scale)
        if self.mode == "tail":
            return temporal_tail.attend(q, k, v, call, self.every)
        shared: dict[str, Any] = {"refresh": self.every, "keep_frames": self.keep_frames}
        if self.mode == "mask":
            return temporal_mask.attend(q, k, v, call, kept=self.chosen, **shared)
        reverse = self.order == "reverse" or (self.order == "alternate" and call.step % 2 == 1)
        threshold = self.phase_threshold(call)
        return temporal_skip.attend(
            q, k, v, call, threshold=threshold, reverse=reverse, **shared
        )  # fmt: skip


def phase(call: AttentionCall) -> int:
    """The third of the run that a call belongs to: 0, 1 or 2.

    Raises:
        BadParameter: nothing tells how long the run is.
    """
    if call.total is None:
        raise BadParameter(
            "temporal: thresholds for the thirds of a run need to know its steps; give only one"
        )
    return third_of(call.step, call.total)


def third_of(step: int, steps: int) -> int:
    """The third of a run of some steps that a step belongs to: 0, 1 or 2."""
    return min(step * PHASES // steps, PHASES - 1)
