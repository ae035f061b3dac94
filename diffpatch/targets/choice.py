"""From a target to settings: how much each head keeps, and what quality and time to expect."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from diffpatch.errors import BadParameter
from diffpatch.methods.base import Method
from diffpatch.methods.dense import Dense
from diffpatch.methods.dynamic import Dynamic
from diffpatch.targets.curves import Choice, Curve, OutOfReach, choose
from diffpatch.targets.front import FOUR_OF_FIVE, Applied, FrontPoint, best_within, fastest
from diffpatch.targets.picture import SMALLEST, FittedLine, quality_line, time_line
from diffpatch.targets.settings import Settings
from diffpatch.targets.target import Target

DENSE = "dense"
FEWEST = 0.12  # kept fraction that every head keeps, unless less is asked for: at 12.5 % heads at
# 6 % cost 0.9 to 4.5 dB on four prompts of the demo model, though they had the smaller mean error
RULES = ("virtual", "drop")  # what becomes of tiles that are not chosen, the same in all heads


@dataclass(frozen=True)
class Chosen:
    """The settings chosen for a target, and what they are predicted to give.

    Attributes:
        rest: what becomes of tiles that are not chosen: "virtual" or "drop", for all heads.
        budgets: transformer -> layer -> kept fraction of each head in a sparse call; empty if all
            attention stays dense.
        dense_steps: first steps that stay dense, as a fraction of the run.
        kept: kept fraction of the pairs of all calls, dense steps included.
        error: mean relative L1 error of the attention in sparse calls.
        psnr: predicted PSNR to the dense result, in dB; None if it cannot be predicted.
        spread: standard deviation of prompts from that prediction, in dB; None as for `psnr`.
        speedup: predicted speedup of the denoising; None if it cannot be predicted.
        next_kept: error that keeping one more percent of the pairs would save.
        cache: threshold of the step cache; None without a cache.
        hold: tolerance within which steps are held; None if none are.
        low: PSNR that four of five prompts are predicted to reach, in dB; None as for `psnr`.
    """

    rest: str
    budgets: Mapping[str, Mapping[int, tuple[float, ...]]]
    dense_steps: float
    kept: float
    error: float
    psnr: float | None
    spread: float | None
    speedup: float | None
    next_kept: float
    cache: float | None = None
    hold: float | None = None
    low: float | None = None

    def method(self, transformer: str) -> Method:
        """The method for one transformer of the model, by its name in the pipeline.

        Experts share the budgets of the first.
        """
        if not self.budgets:
            return Dense()
        own = self.budgets.get(transformer) or next(iter(self.budgets.values()))
        return Dynamic(rest=self.rest, budgets=dict(own))

    @property
    def promise(self) -> str:
        """The predicted result, in one line."""
        parts = [f"cache {self.cache:g}"] if self.cache is not None else []
        parts += [f"hold {self.hold:g}"] if self.hold is not None else []
        parts += [f"kept {self.kept:.0%}"] if self.budgets else ["attention dense"]
        if self.psnr is not None and self.spread is not None:
            parts.append(f"{self.psnr:.1f} ± {self.spread:.1f} dB")
        if self.speedup is not None:
            parts.append(f"{self.speedup:.2f}×")
        return ", ".join(parts) + " predicted" * (self.speedup is not None)

    def __str__(self) -> str:
        lines = ["attention dense"]
        if self.budgets:
            lines = [
                f"kept      {self.kept:.1%} of all query-key pairs, first {self.dense_steps:.0%}"
                " dense",
                f"error     {self.error:.2%} of the attention output (relative L1), rest:"
                f" {self.rest}",
            ]
        if self.cache is not None:
            lines.append(f"cache     steps in which the first block changes by < {self.cache:g}")
        if self.hold is not None:
            lines.append(f"hold      steps that lead astray by < {self.hold:g} of the result")
        if self.psnr is not None and self.spread is not None:
            lines.append(f"pictures  {self.psnr:.1f} ± {self.spread:.1f} dB to dense (predicted)")
        if self.low is not None:
            lines[-1] += f"; four of five prompts {self.low:.1f} or more"
        if self.speedup is not None:
            lines.append(f"speedup   {self.speedup:.2f}× of the denoising (predicted)")
        return "\n".join(lines)


def choose_for(settings: Settings, target: Target) -> Chosen:
    """The cheapest settings that reach a target, or the best within one.

    Args:
        settings: of the model.
        target: what is asked for.

    Raises:
        BadParameter: the target cannot be reached, or too little was measured to tell; the message
            says what can be reached, or what to measure.
    """
    if target.goal == "psnr":
        _refuse_noise(settings, target)
        if settings.front:
            return at_point(settings, fastest(settings.front, target.value, str(target)))
        return _choose(settings, target, error=_error_for(settings, target))
    if target.goal == "speedup" and settings.front:
        return at_point(settings, best_within(settings.front, 1 / target.value, str(target)))
    if target.goal == "error":
        return _choose(settings, target, error=target.value)
    kept = target.value if target.goal == "kept" else _kept_for(settings, target)
    dense = settings.measured_on.dense_steps
    sparse = (kept - dense) / (1 - dense) if dense < 1 else 0.0
    if sparse <= 0:
        raise BadParameter(
            f"target={str(target)!r} cannot be reached: the first {dense:.0%} of the steps are"
            f" dense, and they alone keep {dense:.3g}{_fast(settings, target, dense)}"
        )
    return _choose(settings, target, kept=min(sparse, 1.0))


def at_point(settings: Settings, point: FrontPoint) -> Chosen:
    """The settings of a point of the front, with the quality and speed of that point.

    Raises:
        BadParameter: the curves do not reach its kept fraction.
    """
    return replace(
        chosen_for(settings, point.applied),
        psnr=point.psnr, spread=point.spread, low=point.low, speedup=1 / point.time,
    )  # fmt: skip


def chosen_for(settings: Settings, applied: Applied) -> Chosen:
    """The settings for one way to run the model: a budget for every head.

    Raises:
        BadParameter: the curves do not reach its kept fraction.
    """
    if applied.sparse >= 1:
        return Chosen(
            rest=RULES[0], budgets={}, dense_steps=0.0, kept=1.0, error=0.0, psnr=None, spread=None,
            speedup=None, next_kept=0.0, cache=applied.cache, hold=applied.hold,
        )  # fmt: skip
    wanted = Target("kept", applied.dense_steps + (1 - applied.dense_steps) * applied.sparse)
    chosen = _choose(settings, wanted, applied, kept=applied.sparse)
    return replace(chosen, cache=applied.cache, hold=applied.hold)


def _choose(
    settings: Settings,
    target: Target,
    applied: Applied | None = None,
    *,
    kept: float | None = None,
    error: float | None = None,
) -> Chosen:
    """The better choice of the two rules.

    Args:
        settings: hold the curves.
        target: named in errors.
        applied: says which steps stay dense; None takes the dense steps of the settings.
        kept: largest mean kept fraction of sparse calls.
        error: largest mean error of sparse calls.
    """
    dense = settings.measured_on.dense_steps if applied is None else applied.dense_steps
    found: list[tuple[str, Choice]] = []
    refused: list[BadParameter] = []
    for rest in RULES:
        try:
            found.append((rest, choose(_of_rule(settings, rest, kept), kept=kept, error=error)))
        except BadParameter as problem:
            refused.append(problem)
    if not found:
        raise BadParameter(_out_of_reach(settings, target, refused, dense)) from refused[0]
    rest, best = min(found, key=lambda one: one[1].error if error is None else one[1].kept)
    return _described(settings, rest, best, dense)


def _of_rule(settings: Settings, rest: str, kept: float | None) -> dict[str, Curve]:
    """Curves of one rule and dense; without points below `FEWEST` if `kept` allows for that."""
    curves: dict[str, Curve] = {
        unit: [point for point in curve if point.rule in (rest, DENSE)]
        for unit, curve in settings.points().items()
    }
    if any(len(curve) < 2 for curve in curves.values()):
        raise BadParameter(f"the settings have no curves of {rest!r}: tune again")
    fed: dict[str, Curve] = {
        unit: [p for p in curve if p.kept >= FEWEST] for unit, curve in curves.items()
    }
    spent = math.fsum(min(p.kept for p in curve) for curve in fed.values()) / len(fed)
    return fed if kept is None or spent <= kept * (1 + 1e-9) else curves


def _out_of_reach(
    settings: Settings, target: Target, refused: Sequence[BadParameter], dense: float
) -> str:
    """Why no rule reaches a target, and what of a whole run can be had."""
    least = min((one.best for one in refused if isinstance(one, OutOfReach)), default=None)
    if least is None:
        return f"target={str(target)!r}: {refused[0]}"
    kept = dense + (1 - dense) * least
    included = f", the {dense:.0%} of dense steps included" if dense else ""
    return (
        f"target={str(target)!r} cannot be reached: the least that was measured keeps {kept:.3g}"
        f"{included}{_fast(settings, target, kept)}"
    )


def _fast(settings: Settings, target: Target, kept: float) -> str:
    """How fast a run is that keeps a fraction, where that is what the target asks for."""
    time = time_line(settings.rendered) if target.goal == "speedup" else None
    return "" if time is None else f", which is predicted to be {_speedup(time, kept):.2f}×"


def _speedup(time: FittedLine, kept: float) -> float:
    return 1 / max(time.at(kept), 1e-3)


def _described(settings: Settings, rest: str, choice: Choice, dense: float) -> Chosen:
    heads: dict[str, dict[int, dict[int, float]]] = {}
    for unit, point in choice.points.items():
        transformer, layer, head = unit.rsplit(".", 2)
        heads.setdefault(transformer, {}).setdefault(int(layer), {})[int(head)] = point.kept
    kept = dense + (1 - dense) * choice.kept
    quality, time = quality_line(settings.rendered), time_line(settings.rendered)
    log_error = math.log10(max(choice.error, SMALLEST))
    return Chosen(
        rest=rest,
        budgets={
            name: {n: tuple(of[h] for h in sorted(of)) for n, of in sorted(layers.items())}
            for name, layers in heads.items()
        },
        dense_steps=dense,
        kept=kept,
        error=choice.error,
        psnr=None if quality is None else quality.at(log_error),
        spread=None if quality is None else quality.spread,
        speedup=None if time is None else _speedup(time, kept),
        low=None if quality is None else quality.at(log_error) - FOUR_OF_FIVE * quality.spread,
        next_kept=choice.slope / 100,
    )


def _refuse_noise(settings: Settings, target: Target) -> None:
    """Refuse a PSNR above the noise floor."""
    if settings.floor is not None and target.value > settings.floor:
        raise BadParameter(
            f"target={str(target)!r} means nothing: dense differs from dense computed by another"
            f" kernel by {settings.floor:.1f} dB already; ask for less"
        )


def _error_for(settings: Settings, target: Target) -> float:
    """The mean error at which four of five prompts are predicted to reach the PSNR asked for."""
    line = quality_line(settings.rendered)
    if line is None:
        raise BadParameter(
            f"target={str(target)!r}: the settings hold too few rendered pairs to predict PSNR:"
            " tune with more prompts, or ask for 'kept 0.25'"
        )
    return float(10 ** line.where(target.value + FOUR_OF_FIVE * line.spread))


def _kept_for(settings: Settings, target: Target) -> float:
    """The kept fraction at which a run is predicted to reach the speedup asked for."""
    line = time_line(settings.rendered)
    if line is None:
        raise BadParameter(
            f"target={str(target)!r}: the settings hold too few rendered pairs to predict time:"
            " tune with more prompts, or ask for 'kept 0.25'"
        )
    kept = line.where(1 / target.value)
    if kept <= 0:
        raise BadParameter(
            f"target={str(target)!r} cannot be reached: with nothing kept at all a run is predicted"
            f" to be {_speedup(line, 0.0):.2f}× as fast"
        )
    return min(kept, 1.0)
