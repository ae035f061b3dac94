"""The front of tuned settings as a table, and what a target comes to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from diffpatch.errors import BadParameter
from diffpatch.tables import table
from diffpatch.targets.choice import Chosen, choose_for
from diffpatch.targets.front import (
    FINEST,
    FrontPoint,
    best_within,
    fastest,
    measured_points,
    pareto,
    time_at,
    with_between,
)
from diffpatch.targets.settings import Checked, Settings
from diffpatch.targets.target import Target

STEP = 2  # dB that the next step down may cost
LEVELS = (25, 28, 30, 32, 34, 36)  # dB at which caches alone and all are compared


@dataclass(frozen=True)
class Answer:
    """What one target comes to.

    Attributes:
        target: what was asked for.
        chosen: the settings; None where it cannot be reached.
        point: of the front that they are; None without a front.
        refused: why it cannot be reached.
    """

    target: str
    chosen: Chosen | None
    point: FrontPoint | None = None
    refused: str = ""


def answer(settings: Settings, target: str) -> Answer:
    """What a target comes to, or why it cannot be reached.

    Raises:
        BadParameter: it is not a target.
    """
    wanted = Target.parse(target)
    try:
        chosen = choose_for(settings, wanted)
    except BadParameter as error:
        return Answer(str(wanted), None, refused=str(error))
    point = None
    if settings.front and wanted.goal == "psnr":
        point = fastest(settings.front, wanted.value, target)
    elif settings.front and wanted.goal == "speedup":
        point = best_within(settings.front, 1 / wanted.value, target)
    return Answer(str(wanted), chosen, point)


def describe(settings: Settings, found: Answer | None = None) -> str:
    """Everything for a terminal: where the curves are from, the front, the choice, the checks."""
    on = settings.measured_on
    grid = "×".join(map(str, on.grid[:3]))
    lines = [
        f"tuned on {_prompts(len(on.prompts))}, {grid} tokens, {on.steps} steps, {on.dtype},"
        f" {on.time[:10]}"
    ]
    if settings.front:
        lines += ["", front_table(settings, found)]
    if gains := gain_table(settings):
        lines += ["", gains]
    if found is not None:
        lines += ["", f"target {found.target}", str(found.chosen or found.refused)]
        lines += [next_step(settings, found.point)] if found.point is not None else []
    if settings.checked:
        lines += ["", checked_table(settings.checked)]
    # A shared file may hold anything, and a terminal obeys some of it.
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in "\n".join(lines))


def next_step(settings: Settings, point: FrontPoint) -> str:
    """What `STEP` dB less would gain."""
    points = with_between(measured_points(settings.front))
    less = [p for p in points if p.psnr >= point.psnr - STEP and p.time < 0.99 * point.time]
    if not less:
        return f"next      {STEP} dB less would gain nothing"
    other = min(less, key=lambda p: p.time)
    return (
        f"next      {1 / other.time:.2f}× for {point.psnr - other.psnr:.1f} dB less"
        f" ({other.applied.label})"
    )


def front_table(settings: Settings, found: Answer | None = None) -> str:
    """A line for everything that was rendered, and for what was chosen; fastest first."""
    points = measured_points(settings.front)
    chosen = None if found is None else found.point
    if chosen is not None and not chosen.measured:
        points = sorted([*points, chosen], key=lambda point: point.time)
    best = pareto(points)
    rows = [["", "speedup", "PSNR, mean", "4 of 5 prompts", "calls made", ""]]
    for point in points:
        remarks = ["front"] if point in best else []
        remarks += ["chosen"] if point == chosen else []
        remarks += [] if point.measured else ["predicted"]
        rows.append([
            point.applied.label, f"{1 / point.time:.2f}×", f"{point.psnr:.1f} dB",
            f"≥ {point.low:.1f} dB", f"{point.calls:.0%}", ", ".join(remarks),
        ])  # fmt: skip
    prompts = len({run.prompt for run in settings.front})
    note = f"times and PSNR against dense, over {_prompts(prompts)}"
    if prompts == 1:
        note += ": others are taken to differ as usual"
    if any(point.applied.sparse < 1 for point in points):
        note += "; 'after': first steps that stay dense"
    return f"{table(rows)}\n{note}"


def _prompts(count: int) -> str:
    return f"{count} prompt" + "s" * (count != 1)


def gains(settings: Settings) -> list[tuple[int, float | None, float | None]]:
    """(dB, speedup of the best cache alone, of the best of all) at equal mean PSNR."""
    points = measured_points(settings.front)
    alone = with_between(p for p in points if p.applied.sparse >= 1 and p.applied.hold is None)
    everything = with_between(points)
    return [
        (level, _speed(time_at(alone, level)), _speed(time_at(everything, level)))
        for level in LEVELS
    ]


def _speed(time: float | None) -> float | None:
    return None if time is None else 1 / time


def gain_table(settings: Settings) -> str:
    """Caches alone against everything at equal quality; empty without caches."""
    known = [(level, alone, best) for level, alone, best in gains(settings) if best is not None]
    if not any(run.cache for run in settings.front) or not known:
        return ""
    rows = [["at equal PSNR", *(f"{level} dB" for level, *_ in known)]]
    rows.append(["best cache alone", *(_times(alone) for _, alone, _ in known)])
    rows.append(["best of all", *(_times(best) for *_, best in known)])
    rows.append(
        ["gain", *(f"{best / alone:.2f}" if alone and best else "" for _, alone, best in known)]
    )
    return table(rows)


def _times(speedup: float | None) -> str:
    return "not reached" if speedup is None else f"{speedup:.2f}×"


def checked_table(checked: Sequence[Checked]) -> str:
    """Prediction beside result, for prompts that were not tuned with."""
    rows = [["fresh prompt", "target", "predicted", "reached", "speedup, predicted", "speedup"]]
    for one in checked:
        rows.append([
            one.prompt if len(one.prompt) <= 48 else one.prompt[:47] + "…", one.target,
            "" if one.predicted is None else f"{one.predicted:.1f} dB", f"{one.psnr:.1f} dB",
            "" if one.predicted_speedup is None else f"{one.predicted_speedup:.2f}×",
            f"{one.dense_seconds / one.seconds:.2f}×",
        ])  # fmt: skip
    return f"{table(rows, left=2)}\n{summary_of(checked)}"


def summary_of(checked: Sequence[Checked]) -> str:
    """How often predictions held."""
    sure = [one for one in checked if one.predicted is not None and math.isfinite(one.predicted)]
    near = sum(abs(min(one.psnr, FINEST) - (one.predicted or 0)) <= 1.5 for one in sure)
    parts = [f"within ±1.5 dB of the prediction: {near} of {len(sure)}"] if sure else []
    wanted = [(Target.parse(one.target), one) for one in checked]
    decibels = [(target.value, one) for target, one in wanted if target.goal == "psnr"]
    if decibels:
        reached = sum(one.psnr >= value - 1 for value, one in decibels)
        parts.append(f"target reached within 1 dB: {reached} of {len(decibels)}")
    return "; ".join(parts)
