"""Time against quality as inline SVG: one numbered mark a method, the best of them joined."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from diffpatch.eval.report import Row

WIDTH, HEIGHT = 860, 430
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 20, 58
# Dark enough for white numbers, and apart from each other for most colour-blind people.
COLOURS = ("#0072b2", "#b35900", "#00795a", "#a3427c", "#5b4bb5", "#7a6a00", "#a32a1e", "#4d5965")


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
    known = colours(rows)
    for number, row in reversed(list(enumerate(methods, 1))):
        at = x(1 / row.gain), y(row.quality["psnr"])
        chosen = ' class="pick"' if row.label == pick else ""
        text = f"{number}: {row.label}, {row.gain:.2f}×, {row.quality['psnr']:.1f} dB"
        parts.append(
            f'<g><title>{escape(text)}</title><circle{chosen} cx="{at[0]:.1f}" cy="{at[1]:.1f}"'
            f' r="11" fill="{known[str(row.facts["method"])]}"/>'
            f'<text class="mark" x="{at[0]:.1f}" y="{at[1] + 4:.1f}">{number}</text></g>'
        )
    about = (
        "Time of a whole call relative to dense against PSNR to dense; the table has the values."
    )
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{about}">'
        f"{''.join(parts)}</svg>"
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
