"""The picture of the front: how much faster against how close to dense; SVG by a template."""

from __future__ import annotations

import math
from collections.abc import Iterator
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

LETTER, TALL, APART = 6.4, 12, 8  # pixels: of a label's letters, its height, and from its mark
ENTRY = 6.5  # pixels of a letter in the legend
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Labelled:
    """A point of the front, and where its label begins or, with anchor "end", ends."""

    x: float
    y: float
    label: str
    about: str
    at: tuple[float, float]
    anchor: str


@dataclass(frozen=True)
class Series:
    """Marks of one kind, the line through the best, and where its name stands in the legend."""

    name: str
    colour: str
    line: str
    marks: list[Labelled]
    entry: float

    @property
    def next_entry(self) -> float:
        """Where the next name stands."""
        return self.entry + ENTRY * len(self.name) + 24


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
    legend: float = LEFT + 88  # where its next entry stands
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
    if wanted is not None and wanted.goal == "psnr":
        made.target = y.at(wanted.value), f"target {found.target}" if found else ""
    taken = [_around(x.at(speed), y.at(psnr), 6) for speed, psnr in places]
    if found is not None and found.point is not None:
        p = found.point
        least = max(p.low, y.low)
        made.chosen = x.at(1 / p.time), y.at(p.psnr), y.at(least), "chosen: " + _about(p)
        taken.append((made.chosen[0] - 9, made.chosen[1] - 9, made.chosen[0] + 9, made.chosen[2]))
    if made.target is not None:
        taken.append((WIDTH - RIGHT - 90, made.target[0] - 16, WIDTH - RIGHT, made.target[0]))
    made.series = list(_series(points, x, y, taken, made.legend))
    made.legend = made.series[-1].next_entry
    made.front = _line(pareto(with_between(points)), x, y)
    made.checked = [
        (x.at(speed), y.at(quality), f"“{run.prompt}”: {run.psnr:.1f} dB")
        for run, (speed, quality) in zip(checked, reached, strict=True)
    ]
    return made


def _series(
    points: list[FrontPoint], x: _Ruler, y: _Ruler, taken: list[Box], entry: float
) -> Iterator[Series]:
    """Every kind of point that there is; labels join what is `taken`."""
    groups = {name: [point for point in points if kind(point) == name] for name in COLOURS}
    lines = [
        _around(x.at(1 / p.time), y.at(p.psnr), 2)
        for group in (points, *groups.values())
        for p in pareto(with_between(group))
    ]
    for name, own in groups.items():
        if own:
            marks = [_mark(x.at(1 / p.time), y.at(p.psnr), p, taken, lines) for p in own]
            line = _line(pareto(with_between(own)), x, y)
            yield (one := Series(name, COLOURS[name], line, marks, entry))
            entry = one.next_entry


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


def _mark(x: float, y: float, point: FrontPoint, taken: list[Box], lines: list[Box]) -> Labelled:
    """A mark whose label covers as little as can be of what is `taken`, which it joins, and then
    of the lines."""
    label = _short(point)
    wide = LETTER * len(label)
    found: list[tuple[float, Box, tuple[float, float], str]] = []
    for down in (-5, 17, 5, -17, 29):
        for anchor in ("start", "end"):
            begin = x + APART if anchor == "start" else x - APART
            left = begin if anchor == "start" else begin - wide
            box = (left, y + down - TALL + 2, left + wide, y + down + 2)
            outside = max(0.0, LEFT - left) + max(0.0, left + wide - (WIDTH - RIGHT))
            covered = 100 * (outside + sum(_shared(box, other) for other in taken))
            covered += sum(_shared(box, other) for other in lines)
            found.append((covered, box, (round(begin, 1), round(y + down, 1)), anchor))
    _, box, at, anchor = min(found, key=lambda one: one[0])  # of equal ones the first
    taken.append(box)
    return Labelled(x, y, label, _about(point), at, anchor)


def _around(x: float, y: float, size: float) -> Box:
    return x - size, y - size, x + size, y + size


def _shared(one: Box, other: Box) -> float:
    """The area that two boxes share."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    tall = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, wide) * max(0.0, tall)


def _line(points: list[FrontPoint], x: _Ruler, y: _Ruler) -> str:
    return " ".join(f"{x.at(1 / p.time)},{y.at(p.psnr)}" for p in points)


def _short(point: FrontPoint) -> str:
    """Kept fraction and threshold, as they stand beside a mark."""
    return point.applied.label.replace("attention ", "").replace("cache ", "").replace("hold ", "h")


def _about(point: FrontPoint) -> str:
    return f"{point.applied.label}: {1 / point.time:.2f}×, {point.psnr:.1f} dB"
