"""Several temporal methods tried side by side on one dense run, to choose among them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace

import torch

from diffpatch.kernels.dense import attend_dense
from diffpatch.methods.base import Attended, AttentionCall
from diffpatch.methods.temporal.method import Temporal, phase
from diffpatch.methods.wrapper import Wrapper


@dataclass(frozen=True)
class Trial(Wrapper):
    """Dense attention that notes how far off a temporal method would be at each threshold.

    Attributes:
        thresholds: the thresholds to try in place of that of `over`.
        errors: by third of the run and number of the threshold, the relative L1 of every call.
    """

    name = "trial"
    only_skips = False

    over: Temporal
    thresholds: tuple[float, ...] = ()
    errors: defaultdict[tuple[int, int], list[torch.Tensor]] = field(
        default_factory=lambda: defaultdict(list), compare=False, repr=False
    )

    def state_limit(self) -> float:
        return float("inf")  # that of all candidates together says nothing of one

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall
    ) -> Attended:
        """The dense answer; every candidate goes on with a state of its own."""
        exact = attend_dense(q, k, v, call.scale, call.key_mask)
        for i, threshold in enumerate(self.thresholds):
            candidate = replace(self.over, threshold=threshold)
            own = replace(call, state=call.state.setdefault(str(i), {}))
            wrong = candidate.attend(q, k, v, own).out.float() - exact.float()
            self.errors[phase(call), i].append(wrong.abs().sum() / exact.float().abs().sum())
        return Attended(exact, 1.0, "dense")
