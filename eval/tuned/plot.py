"""The picture of the front: how much faster against how close to dense; SVG by a template."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from diffpatch.eval.sweep.report.plot import ticks
from diffpatch.eval.tuned.table import Answer
from diffpatch.targets.front import FINEST, FrontPoint, measured_points, pareto, with_between
from diffpatch.targets.settings import Settings
from diffpatch.targets.target import Target

HERE = Path(__file__).parent
WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 56, 20, 34, 50
COLOURS = {
    "caches alone": "#b35900", "attention alone": "#0072b2", "held steps alone": "#8a3fa0",
    "attention and steps": "#00795a",
}  # fmt: skip

Place = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Marks of one kind (place, what it is, what it came to), and the line through the best."""

    name: str
    colour: str
    line: str
    marks: list[tuple[float, float, str, str]]


@dataclass
class Picture:
    """Everything that is drawn."""

    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM
    across: list[tuple[float, str]] = field(default_factory=list)
    up: list[tuple[float, str]] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    front: str = ""
    target: tuple[float, str] | None = None
    chosen: tuple[float, float, float, str] | None = None  # the third: what four of five reach
    checked: list[tuple[float, float, str]] = field(default_factory=list)


def front_svg(settings: Settings, found: Answer | None = None) -> str:
    """The picture as the text of an SVG file; the front must have been measured."""
    templates = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return templates.get_template("front.svg").render(p=picture(settings, found))


def picture(settings: Settings, found: Answer | None = None) -> Picture:
    """Where everything stands."""
    points = measured_points(settings.front)
    wanted = None if found is None else Target.parse(found.target)
    checked = [one for one in settings.checked if found is None or one.target == found.target]
    places = [(1 / point.time, point.psnr) for point in points]
    reached = [(one.dense_seconds / one.seconds, min(one.psnr, FINEST)) for one in checked]
    places += reached
    heights = [psnr for _, psnr in places]
    if found is not None and found.point is not None:
        heights.append(found.point.low)
    if wanted is not None and wanted.goal == "psnr":
        heights.append(wanted.value)
    speeds = [speed for speed, _ in places]
    x = _Ruler(min(1.0, *speeds) * 0.98, max(1.0, *speeds) * 1.04, LEFT, WIDTH - RIGHT)
    y = _Ruler(math.floor(min(heights)) - 1, math.ceil(max(heights)) + 1, HEIGHT - BOTTOM, TOP)
    made = Picture()
    made.across = [(x.at(v), f"{v:g}×") for v in ticks(x.low, x.high, 8)]
    made.up = [(y.at(v), f"{v:g}") for v in ticks(y.low, y.high, 8)]
    for name, colour in COLOURS.items():
        own = [point for point in points if kind(point) == name]
        if own:
            marks = [(x.at(1 / p.time), y.at(p.psnr), _short(p), _about(p)) for p in own]
            line = _line(pareto(with_between(own)), x, y)
            made.series.append(Series(name, colour, line, marks))
    made.front = _line(pareto(with_between(points)), x, y)
    if wanted is not None and wanted.goal == "psnr":
        made.target = y.at(wanted.value), f"target {found.target}" if found else ""
    if found is not None and found.point is not None:
        p = found.point
        least = max(p.low, y.low)
        made.chosen = x.at(1 / p.time), y.at(p.psnr), y.at(least), "chosen: " + _about(p)
    made.checked = [
        (x.at(speed), y.at(quality), f"“{one.prompt}”: {one.psnr:.1f} dB")
        for one, (speed, quality) in zip(checked, reached, strict=True)
    ]
    return made


def kind(point: FrontPoint) -> str:
    """Which series a point belongs to."""
    if point.applied.sparse >= 1:
        return "caches alone" if point.applied.hold is None else "held steps alone"
    return "attention and steps" if point.applied.skips else "attention alone"


@dataclass(frozen=True)
class _Ruler:
    """From values to pixels."""

    low: float
    high: float
    first: float
    last: float

    def at(self, value: float) -> float:
        part = (value - self.low) / (self.high - self.low)
        return round(self.first + part * (self.last - self.first), 1)


def _line(points: list[FrontPoint], x: _Ruler, y: _Ruler) -> str:
    return " ".join(f"{x.at(1 / p.time)},{y.at(p.psnr)}" for p in points)


def _short(point: FrontPoint) -> str:
    """Kept fraction and threshold, as they stand beside a mark."""
    return point.applied.label.replace("attention ", "").replace("cache ", "").replace("hold ", "h")


def _about(point: FrontPoint) -> str:
    return f"{point.applied.label}: {1 / point.time:.2f}×, {point.psnr:.1f} dB"
