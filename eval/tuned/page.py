"""The page about tuned settings: one HTML file that needs nothing else and no script."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from diffpatch.eval.tuned.plot import front_svg
from diffpatch.eval.tuned.table import Answer, describe
from diffpatch.targets.curves import Point
from diffpatch.targets.settings import Settings

HERE = Path(__file__).parent
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
COLD, HOT = (38, 50, 74), (242, 193, 78)
CELL = 14  # pixels


@dataclass(frozen=True)
class HeatMap:
    """Layers down, heads across; each cell with its colour and what it says."""

    title: str
    rows: list[list[tuple[str, str]]]


def page(settings: Settings, found: Answer | None = None) -> str:
    """The page as HTML: the front, the choice, the checks, and the maps of its heads."""
    templates = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return templates.get_template("page.html").render(
        policy=Markup(POLICY),
        title="What tuning found",
        picture=Markup(front_svg(settings, found)) if settings.front else None,
        text=describe(settings, found),
        maps=heat_maps(settings, found),
        measured_on=settings.measured_on,
        cell=CELL,
    )


def heat_maps(settings: Settings, found: Answer | None) -> list[HeatMap]:
    """Kept fraction and error of every head, in every transformer; empty without sparse heads."""
    if found is None or found.chosen is None:
        return []
    maps = []
    for name, layers in found.chosen.budgets.items():
        kept = {layer: list(heads) for layer, heads in layers.items()}
        points = settings.points()
        error = {
            layer: [
                error_at(points[f"{name}.{layer}.{head}"], found.chosen.rest, fraction)
                for head, fraction in enumerate(heads)
            ]
            for layer, heads in layers.items()
        }
        maps.append(_map(f"{name}: kept fraction by layer (down) and head (across)", kept, 1.0))
        most = max(value for row in error.values() for value in row)
        maps.append(_map(f"{name}: error of each head's output, relative L1", error, most or 1.0))
    return maps


def error_at(curve: list[Point], rule: str, kept: float) -> float:
    """Error of a head at the size nearest to a kept fraction."""
    return min(
        (point for point in curve if point.rule in (rule, "dense")),
        key=lambda point: abs(point.kept - kept),
    ).error


def _map(title: str, values: Mapping[int, list[float]], most: float) -> HeatMap:
    rows = []
    for layer, heads in sorted(values.items()):
        cells = []
        for head, value in enumerate(heads):
            part = min(value / most, 1.0)
            mixed = [round(c + (h - c) * part) for c, h in zip(COLD, HOT, strict=True)]
            colour = "#" + "".join(f"{channel:02x}" for channel in mixed)
            cells.append((colour, f"layer {layer}, head {head}: {value:.3g}"))
        rows.append(cells)
    return HeatMap(title, rows)
