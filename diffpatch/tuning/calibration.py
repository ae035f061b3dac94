"""Thresholds of `temporal` for a model, from one prompt: as loose as error bounds allow."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from diffpatch.checking import checked
from diffpatch.errors import BadParameter, DiffpatchError
from diffpatch.methods.base import Method
from diffpatch.methods.registry import MethodLike, one_method
from diffpatch.methods.temporal.method import PHASES, Temporal, third_of
from diffpatch.patching.api import patched, report, settled
from diffpatch.tables import table
from diffpatch.tuning.attention_error import attention_error
from diffpatch.tuning.trial import Trial

THRESHOLDS = (-12.0, -10.0, -8.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0)
Thirds = tuple[float | None, ...]
NAMES = ("first third", "second third", "last third")


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found, and what a run with it did.

    Attributes:
        method: ready for `patch`; it has a threshold for each third of a run.
        bounds: the most error allowed in each third.
        errors: relative L1 of the attention to dense in each third; None where all of it is dense.
        kept: pairs kept in each third, as a fraction, dense steps and layers included.
    """

    method: Temporal
    bounds: tuple[float, ...]
    errors: Thirds
    kept: Thirds

    @property
    def threshold(self) -> tuple[float, ...]:
        """Of the thirds of a run."""
        assert isinstance(self.method.threshold, tuple)
        return self.method.threshold

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return vars(self) | {"method": str(self.method), "threshold": self.threshold}

    def __str__(self) -> str:
        lines = [["", "threshold", "error", "bound", "kept"]]
        rows = zip(NAMES, self.threshold, self.errors, self.bounds, self.kept, strict=True)
        for name, threshold, error, bound, kept in rows:
            found = "dense" if error is None else f"{error:.2%}"
            share = "" if kept is None else f"{kept:.1%}"
            lines.append([name, f"{threshold:.1f}", found, f"{bound:.2%}", share])
        return table(lines)


@checked("method")
def calibrate(
    pipe: Any,
    method: MethodLike = "dense+temporal",
    *,
    prompt: str,
    call: Mapping[str, Any] | None = None,
    max_error: float = 0.075,
    spread: float = 0.01,
    seed: int = 0,
    **options: Any,
) -> Calibration:
    """The loosest thresholds of ``temporal`` in mode "skip" that keep attention near dense.

    One dense run tries all of `THRESHOLDS` on the same queries, keys and values; another run with
    those chosen proves them, and is repeated with stricter ones where errors add up. Early steps
    decide about a picture, so their bound is lower: ``max_error - spread`` in the first third of
    the run, `max_error` in the second, ``max_error + spread`` in the last (LiteAttention, arXiv
    2511.11062, with 0.075 and 0.01). A patch that the pipeline carries is back afterwards.

    Args:
        pipe: a diffusers pipeline.
        method: a combination with ``temporal``, such as "radial+temporal", or a `Temporal`.
        prompt: a typical one.
        call: other arguments of the pipeline's call, such as ``num_inference_steps``.
        max_error: Σ|O − O_dense| / Σ|O_dense|, the mean of all sparse attention calls.
        spread: how much less is allowed early, and more late.
        seed: of the noise.
        **options: as in `patch`: parameters of the method, dense_steps, dense_layers, backend, …

    Raises:
        BadParameter: the method is no ``temporal``, or what it wraps is off by more than allowed.
        DiffpatchError: the model's attention holds NaN or infinity.
    """
    if not 0 <= spread < max_error:
        raise BadParameter(f"max_error={max_error} must be above spread={spread}, both at least 0")
    method = one_method(method)
    if isinstance(method, str) and method.endswith("temporal"):
        options = {"mode": "skip"} | options
    options = dict(options)
    kept_aside = {k: options[k] for k in ("backend", "grid", "modules") if k in options}
    options.pop("backend", None)
    base, schedule = settled(pipe, method, **options)
    if not isinstance(base, Temporal) or base.mode != "skip":
        raise BadParameter(f"{base} has no thresholds: use x+temporal with mode='skip'")
    chosen_options = kept_aside | vars(schedule)

    def run(chosen: Method) -> tuple[Thirds, Thirds]:
        noise = torch.Generator("cpu").manual_seed(seed)
        with patched(pipe, chosen, **chosen_options), attention_error(pipe) as errors:
            pipe(prompt=prompt, generator=noise, **call or {})
            kept = dict(enumerate(report(pipe).kept_per_step))
        return _of_thirds(errors.per_step, len(kept)), _of_thirds(kept, len(kept))

    bounds = tuple(max_error + spread * (third - 1) for third in range(PHASES))
    trial = Trial(base, THRESHOLDS)
    run(trial)
    chosen = [_loosest(trial, third, bound) for third, bound in enumerate(bounds)]
    while True:
        found = replace(base, threshold=tuple(THRESHOLDS[i] for i in chosen))
        errors, kept = run(found)
        over = [i for i, e in enumerate(errors) if (e or 0) > bounds[i] and chosen[i] > 0]
        if not over:
            return Calibration(found, bounds, errors, kept)
        chosen = [n - (i in over) for i, n in enumerate(chosen)]


def _loosest(trial: Trial, third: int, bound: float) -> int:
    """The number of the last threshold up to which all keep to a bound."""
    errors = [float(torch.stack(trial.errors[third, i]).mean()) for i in range(len(THRESHOLDS))
              if trial.errors[third, i]]  # fmt: skip
    if not all(map(math.isfinite, errors)):
        raise DiffpatchError(
            f"the attention of the dense run holds NaN or infinity in the {NAMES[third]}: check the"
            " weights, or try another dtype"
        )
    if errors and errors[0] > bound:
        over = trial.over.over
        raise BadParameter(
            f"{over} and a threshold of {THRESHOLDS[0]} are off by {errors[0]:.1%} in the"
            f" {NAMES[third]} and the bound is {bound:.1%}: allow more with max_error, or let"
            f" {over.name} keep more, or use dense+temporal"
        )
    within = itertools.takewhile(lambda error: error <= bound, errors)
    return max(len(list(within)) - 1, 0)


def _of_thirds(values: Mapping[int, float], steps: int) -> Thirds:
    """The means of a run's thirds, of values by step; None for those without any."""
    parts = [[v for step, v in values.items() if third_of(step, steps) == n] for n in range(PHASES)]
    return tuple(sum(part) / len(part) if part else None for part in parts)
