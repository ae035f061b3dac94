"""Time against quality as inline SVG: one numbered mark a method, the best of them joined."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from html import escape

from diffpatch.eval.sweep.report.summary import Row

WIDTH, HEIGHT = 860, 430
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 20, 58
RADIUS = 11  # of a mark
ROUNDS = 60  # of pushing marks apart
# Dark enough for white numbers, and apart from each other for most colour-blind people.
COLOURS = (
    "#0072b2", "#b35900", "#00795a", "#a3427c", "#5b4bb5", "#7a6a00", "#a32a1e", "#4d5965",
    "#2f6b1f", "#8c3a63",
)  # fmt: skip

Place = tuple[float, float]


def colours(rows: Sequence[Row]) -> dict[str, str]:
    """A colour for every method name."""
    names = dict.fromkeys(str(row.facts["method"]) for row in rows if row.kind == "method")
    return {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}


def pareto(rows: Sequence[Row], bar: Mapping[str, float], pick: str | None) -> str:
    """Time relative to dense (left is faster) against PSNR (up is closer).

    Args:
        rows: of one setting; the methods are numbered from 1 in their order.
        bar: the quality bar; its PSNR is drawn.
        pick: label of the row that the verdict recommends.
    """
    methods = [row for row in rows if row.kind == "method"]
    if not methods:
        return ""
    seeds = [row.quality["psnr"] for row in rows if row.kind == "seed"]
    levels = {f"other seed {value:.1f} dB": value for value in seeds}
    if "psnr" in bar:
        levels[f"bar {bar['psnr']:g} dB"] = bar["psnr"]
    heights = [*(row.quality["psnr"] for row in methods), *levels.values()]
    bottom, top = math.floor(min(heights) - 1), math.ceil(max(heights) + 1)
    right = max(1.1, 1.05 * max(1 / row.gain for row in methods))

    def x(value: float) -> float:
        return LEFT + value / right * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    parts = [*_axes(x, y, right, bottom, top)]
    for text, value in levels.items():
        parts.append(_line("level", x(0), y(value), x(right), y(value)))
        parts.append(f'<text x="{LEFT + 6}" y="{y(value) - 5:.1f}">{text}</text>')
    best = sorted((1 / row.gain, row.quality["psnr"]) for row in methods if row.best)
    points = " ".join(f"{x(time):.1f},{y(quality):.1f}" for time, quality in best)
    parts.append(f'<polyline class="front" points="{points}"/>')
    known, places = colours(rows), [(x(1 / r.gain), y(r.quality["psnr"])) for r in methods]
    marks = list(zip(methods, places, apart(places), strict=True))
    # Leads first, so that they cover no mark.
    parts += [_lead(known[str(row.facts["method"])], place, at) for row, place, at in marks]
    for number, (row, _, at) in reversed(list(enumerate(marks, 1))):
        text = f"{number}: {row.label}, {row.gain:.2f}×, {row.quality['psnr']:.1f} dB"
        colour = known[str(row.facts["method"])]
        parts.append(_mark(number, text, colour, at, row.label == pick))
    about = (
        "Time of a whole call relative to dense against PSNR to dense; the table has the values."
    )
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{about}">'
        f"{''.join(parts)}</svg>"
    )


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


def _lead(colour: str, place: Place, at: Place) -> str:
    """From a mark that had to move, a line to a dot at its true place."""
    if math.dist(place, at) <= 2:
        return ""
    return (
        f'<line stroke="{colour}" x1="{place[0]:.1f}" y1="{place[1]:.1f}" x2="{at[0]:.1f}"'
        f' y2="{at[1]:.1f}"/><circle cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="3.5"'
        f' fill="{colour}"/>'
    )


def _mark(number: int, text: str, colour: str, at: Place, pick: bool) -> str:
    """A numbered circle."""
    chosen = ' class="pick"' if pick else ""
    return (
        f'<g><title>{escape(text)}</title><circle{chosen} cx="{at[0]:.1f}"'
        f' cy="{at[1]:.1f}" r="{RADIUS}" fill="{colour}"/>'
        f'<text class="mark" x="{at[0]:.1f}" y="{at[1] + 4:.1f}">{number}</text></g>'
    )


def _axes(x: object, y: object, right: float, bottom: float, top: float) -> list[str]:
    assert callable(x) and callable(y)
    parts = []
    step = 0.1 if right < 1.6 else 0.25 if right < 3 else 1.0
    for number in range(int(right / step) + 1):
        value = number * step
        parts.append(_line("grid", x(value), y(bottom), x(value), y(top)))
        label = f"{value:.2f}".rstrip("0").rstrip(".")
        parts.append(_text(x(value), HEIGHT - BOTTOM + 20, label, "middle"))
    step = next(s for s in (1, 2, 5, 10, 20) if (top - bottom) / s <= 9 or s == 20)
    for value in range(math.ceil(bottom / step) * step, int(top) + 1, step):
        parts.append(_line("grid", x(0), y(value), x(right), y(value)))
        parts.append(_text(LEFT - 8, y(value) + 4, str(value), "end"))
    parts.append(_line("axis", x(1), y(bottom), x(1), y(top)))
    parts.append(_text(x(1) - 6, TOP + 12, "dense", "end"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        _text(middle, HEIGHT - 12, "time of a whole call, dense = 1 (left is faster)", "middle")
    )
    parts.append(
        f'<text transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)"'
        ' text-anchor="middle">PSNR to dense in dB (up is closer)</text>'
    )
    return parts


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
