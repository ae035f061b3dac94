"""Time against quality: a numbered mark a method, its prompts around it, the best of them joined.

This computes where everything is; `plot.svg` is the template that shows it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from diffpatch.eval.sweep.report.rows import Row

WIDTH, HEIGHT = 1120, 460
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 20, 58
RADIUS = 11  # of a mark
ROUNDS = 60  # of pushing marks apart
LETTER = 7.2  # width of a letter of a name, about
NEAR_DENSE = 0.6  # relative time of the slowest method from which on dense is in the picture
# Dark enough for white numbers, and apart from each other for most colour-blind people.
COLOURS = (
    "#0072b2", "#b35900", "#00795a", "#a3427c", "#5b4bb5", "#7a6a00", "#a32a1e", "#4d5965",
    "#2f6b1f", "#8c3a63",
)  # fmt: skip

Place = tuple[float, float]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Line:
    """A line of the picture; `kind` is its class in the style sheet."""

    kind: str
    x1: float
    y1: float
    x2: float
    y2: float
    colour: str = ""


@dataclass(frozen=True)
class Text:
    """A text; `anchor` is SVG's."""

    x: float
    y: float
    words: str
    anchor: str = "start"


@dataclass(frozen=True)
class Mark:
    """A method: its circle with a number, the dot at its true place if it had to move, a name."""

    number: int
    about: str
    colour: str
    x: float
    y: float
    true: Place | None
    pick: bool
    name: Text | None


@dataclass
class Plot:
    """Everything in the picture."""

    lines: list[Line] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)
    prompts: list[tuple[float, float, str, str]] = field(default_factory=list)
    front: str = ""
    marks: list[Mark] = field(default_factory=list)
    width: int = WIDTH
    height: int = HEIGHT
    radius: int = RADIUS


@dataclass(frozen=True)
class _Scale:
    """Where values are in the picture; its ranges are those of the data."""

    left: float
    right: float
    bottom: float
    top: float

    def x(self, time: float) -> float:
        return LEFT + (time - self.left) / (self.right - self.left) * (WIDTH - LEFT - RIGHT)

    def y(self, quality: float) -> float:
        share = (quality - self.bottom) / (self.top - self.bottom)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def colours(rows: Sequence[Row]) -> dict[str, str]:
    """A colour for every method name."""
    names = dict.fromkeys(str(row.facts["method"]) for row in rows if row.kind == "method")
    return {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}


def pareto(rows: Sequence[Row], bar: Mapping[str, float], pick: str | None) -> Plot | None:
    """Time relative to dense (left is faster) against PSNR (up is closer); None without methods.

    Args:
        rows: of one setting; the methods are numbered from 1 in their order.
        bar: the quality bar; its PSNR is drawn.
        pick: label of the row that the verdict recommends.
    """
    methods = [row for row in rows if row.kind == "method"]
    if not methods:
        return None
    levels = {f"other seed {r.quality['psnr']:.1f} dB": r.quality["psnr"] for r in rows
              if r.kind == "seed"}  # fmt: skip
    if "psnr" in bar:
        levels[f"bar {bar['psnr']:g} dB"] = bar["psnr"]
    scale = _scale(methods, list(levels.values()))
    plot = Plot()
    _axes(plot, scale)
    for words, value in levels.items():
        y = scale.y(value)
        plot.lines.append(Line("level", LEFT, y, WIDTH - RIGHT, y))
        plot.texts.append(Text(LEFT + 6, y - 5, words))
    best = sorted((1 / row.gain, row.quality["psnr"]) for row in methods if row.best)
    plot.front = " ".join(f"{scale.x(time):.1f},{scale.y(quality):.1f}" for time, quality in best)
    known = colours(rows)
    for row in methods:
        colour = known[str(row.facts["method"])]
        for each in row.each if len(row.each) > 1 else ():
            about = f"{row.label}, “{each['prompt']}”: {each['gain']:.2f}×, {each['psnr']:.1f} dB"
            place = scale.x(1 / each["gain"]), scale.y(each["psnr"])
            plot.prompts.append((*place, colour, about))
    plot.marks = _marks(methods, scale, known, pick)
    return plot


def apart(places: Sequence[Place]) -> list[Place]:
    """Places for marks of `RADIUS` that would cover each other, pushed apart; in pixels."""
    found = list(places)
    for _ in range(ROUNDS):
        for i, j in itertools.combinations(range(len(found)), 2):
            one, other = found[i], found[j]
            dx, dy = other[0] - one[0], other[1] - one[1]
            distance = math.hypot(dx, dy)
            lack = 2 * RADIUS + 1 - distance
            if lack <= 0:
                continue
            if distance < 0.1:  # those at one place leave it in different directions
                dx, dy, distance = math.cos(i + j), math.sin(i + j), 1.0
            shift = lack / 2 * dx / distance, lack / 2 * dy / distance
            found[i] = _inside(one[0] - shift[0], one[1] - shift[1])
            found[j] = _inside(other[0] + shift[0], other[1] + shift[1])
    return found


def _inside(x: float, y: float) -> Place:
    right, bottom = WIDTH - RIGHT - RADIUS, HEIGHT - BOTTOM - RADIUS
    return min(max(x, LEFT + RADIUS), right), min(max(y, TOP + RADIUS), bottom)


def _scale(methods: Sequence[Row], levels: Sequence[float]) -> _Scale:
    """The range of everything that is drawn, with some air around it."""
    points = [(1 / each["gain"], each["psnr"]) for row in methods for each in row.each]
    points += [(1 / row.gain, row.quality["psnr"]) for row in methods]
    times = [time for time, _ in points]
    if max(times) > NEAR_DENSE:
        times.append(1.0)
    heights = [*(quality for _, quality in points), *levels]
    air = max(0.03, 0.08 * (max(times) - min(times)))
    left = max(0.0, min(times) - air)
    return _Scale(left, max(times) + air, math.floor(min(heights) - 1), math.ceil(max(heights) + 1))


def _marks(
    methods: Sequence[Row], scale: _Scale, known: Mapping[str, str], pick: str | None
) -> list[Mark]:
    places = [(scale.x(1 / row.gain), scale.y(row.quality["psnr"])) for row in methods]
    moved = apart(places)
    taken: list[Box] = [_around(x, y) for x, y in moved]
    marks = []
    for number, (row, place, at) in enumerate(zip(methods, places, moved, strict=True), 1):
        marks.append(
            Mark(
                number=number,
                about=f"{number}: {row.label}, {row.gain:.2f}×, {row.quality['psnr']:.1f} dB",
                colour=known[str(row.facts["method"])],
                x=at[0],
                y=at[1],
                true=place if math.dist(place, at) > 2 else None,
                pick=row.label == pick,
                name=_name(row.label, at, taken),
            )
        )
    return marks


def _name(label: str, at: Place, taken: list[Box]) -> Text | None:
    """The name of a mark beside it where there is room, else none: the number is enough."""
    width, gap = LETTER * len(label), RADIUS + 5
    for x, y, anchor, start in (
        (at[0] + gap, at[1] + 4, "start", at[0] + gap),
        (at[0] - gap, at[1] + 4, "end", at[0] - gap - width),
        (at[0], at[1] - gap, "middle", at[0] - width / 2),
        (at[0], at[1] + gap + 10, "middle", at[0] - width / 2),
    ):
        box = (start, y - 12, start + width, y + 4)
        inside = box[0] > LEFT and box[2] < WIDTH - 2 and box[1] > 2 and box[3] < HEIGHT - BOTTOM
        if inside and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            return Text(x, y, label, anchor)
    return None


def _around(x: float, y: float) -> Box:
    return x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _axes(plot: Plot, scale: _Scale) -> None:
    low, high = HEIGHT - BOTTOM, TOP
    for value in ticks(scale.left, scale.right, 9):
        plot.lines.append(Line("grid", scale.x(value), low, scale.x(value), high))
        plot.texts.append(Text(scale.x(value), low + 20, f"{value:g}", "middle"))
    for value in ticks(scale.bottom, scale.top, 9):
        y = scale.y(value)
        plot.lines.append(Line("grid", LEFT, y, WIDTH - RIGHT, y))
        plot.texts.append(Text(LEFT - 8, y + 4, f"{value:g}", "end"))
    if scale.left <= 1 <= scale.right:
        plot.lines.append(Line("axis", scale.x(1), low, scale.x(1), high))
        plot.texts.append(Text(scale.x(1) - 6, TOP + 12, "dense", "end"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    words = "time of a whole call, dense = 1 (left is faster)"
    plot.texts.append(Text(middle, HEIGHT - 12, words, "middle"))


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round values within a range, at most so many: steps of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * s for s in (1, 2, 5, 10) if (high - low) / (power * s) <= most)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 10) for n in range(first, math.floor(high / step + 1e-9) + 1)]
