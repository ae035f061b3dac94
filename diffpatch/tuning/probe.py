"""What every head would lose to sparse attention, noted in the course of a dense run."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field, replace

import torch

from diffpatch.errors import DiffpatchError
from diffpatch.kernels.dense import attend_dense
from diffpatch.methods.base import Attended, AttentionCall, Method
from diffpatch.methods.wrapper import Wrapper
from diffpatch.patterns.grid import Grid

PARTS = 3  # of a run, of which each is sampled at one step


@dataclass(frozen=True)
class Candidate:
    """One setting that is tried on every head.

    Attributes:
        rule: what it does with the rest: "virtual" or "drop".
        method: keeps the same fraction in every head.
    """

    rule: str
    method: Method


@dataclass(frozen=True)
class Probe(Wrapper):
    """Dense attention that notes, head by head, how far each candidate would have been off.

    The errors of a head are relative, Σ|O - O_dense| / Σ|O_dense| over its outputs in a call, fed
    with the queries, keys and values of the dense run. Only a few steps of the run are sampled.

    Attributes:
        candidates: what is tried; all over the pattern of the first.
        dense_steps: first steps, as a fraction of the run, that are not sampled.
        errors: (layer, candidate number) -> fp32 (H,), one for each sampled call.
        kept: candidate number -> what the calls kept.
        grids: of the calls, text included; one in an ordinary run.
    """

    name = "probe"
    only_skips = False
    dynamic = True

    candidates: tuple[Candidate, ...] = ()
    dense_steps: float = 0.0
    errors: defaultdict[tuple[int, int], list[torch.Tensor]] = field(
        default_factory=lambda: defaultdict(list), compare=False, repr=False
    )
    kept: defaultdict[int, list[torch.Tensor]] = field(
        default_factory=lambda: defaultdict(list), compare=False, repr=False
    )

    grids: set[Grid] = field(default_factory=set, compare=False, repr=False)

    @classmethod
    def of(cls, candidates: tuple[Candidate, ...], dense_steps: float) -> Probe:
        """A probe of some candidates."""
        return cls(candidates[0].method, candidates, dense_steps)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall
    ) -> Attended:
        """The dense answer; in sampled steps every candidate is tried beside it."""
        exact = attend_dense(q, k, v, call.scale, call.key_mask)
        self.grids.add(call.pattern.grid)
        if call.step in sampled_steps(call.total, self.dense_steps):
            size = _per_head(exact)
            for number, candidate in enumerate(self.candidates):
                tried = candidate.method.attend(q, k, v, replace(call, state={}))
                wrong = _per_head(tried.out.float() - exact.float())
                self.errors[call.layer, number].append(wrong / size.clamp(min=1e-30))
                self.kept[number].append(torch.as_tensor(tried.kept, dtype=torch.float32))
        return Attended(exact, 1.0, "dense")

    def curves(self, transformer: str) -> dict[str, dict[str, list[tuple[float, float]]]]:
        """ "transformer.layer.head" -> rule -> (kept, error) by ascending kept fraction.

        Errors are means over the sampled calls: steps, guidance branches and prompts.

        Raises:
            DiffpatchError: an error holds NaN or infinity; it names the head and the setting.
        """
        found: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for (layer, number), errors in sorted(self.errors.items()):
            rule = self.candidates[number].rule
            kept = float(torch.stack(self.kept[number]).mean())
            for head, error in enumerate(torch.stack(errors).mean(0).tolist()):
                unit = f"{transformer}.{layer}.{head}"
                if not math.isfinite(error):
                    raise DiffpatchError(
                        f"layer {layer}, head {head} of {transformer}: the error of"
                        f" {self.candidates[number].method} is {error}: check the model's weights"
                        " and dtype"
                    )
                found.setdefault(unit, {}).setdefault(rule, []).append((kept, error))
        for rules in found.values():
            for curve in rules.values():
                curve.sort()
        return found


def sampled_steps(total: int | None, dense_steps: float) -> set[int]:
    """The steps in the middle of equal parts of what is not dense.

    >>> sorted(sampled_steps(8, 0.25))
    [3, 5, 7]
    """
    if total is None:
        return {0}
    first = min(round(dense_steps * total), total - 1)
    return {first + int((part + 0.5) * (total - first) / PARTS) for part in range(PARTS)}


def _per_head(x: torch.Tensor) -> torch.Tensor:
    """(B, S, H, D) -> fp32 (H,): the sum of absolute values."""
    return x.float().abs().sum((0, 1, 3))
