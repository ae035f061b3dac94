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
USUAL = 0.25  # kept fraction at which heads are compared that all stay dense


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
    """Kept fraction and error of every head in every transformer; where nothing is sparse, what
    heads would lose at `USUAL`."""
    points = settings.points()
    budgets = {} if found is None or found.chosen is None else found.chosen.budgets
    if not budgets:
        return [
            _map(f"{name}: error of each head where {USUAL:.0%} is kept", {
                layer: [error_at(points[f"{name}.{layer}.{h}"], "virtual", USUAL) for h in heads]
                for layer, heads in layers.items()
            }) for name, layers in _heads(points).items()
        ]  # fmt: skip
    assert found is not None and found.chosen is not None
    maps = []
    for name, layers in budgets.items():
        kept = {layer: list(heads) for layer, heads in layers.items()}
        error = {
            layer: [
                error_at(points[f"{name}.{layer}.{head}"], found.chosen.rest, fraction)
                for head, fraction in enumerate(heads)
            ]
            for layer, heads in layers.items()
        }
        maps.append(_map(f"{name}: kept fraction of each head", kept, 1.0))
        maps.append(_map(f"{name}: error of each head", error))
    return maps


def _heads(points: Mapping[str, list[Point]]) -> dict[str, dict[int, list[int]]]:
    """Transformer -> layer -> heads."""
    found: dict[str, dict[int, list[int]]] = {}
    for unit in points:
        name, layer, head = unit.rsplit(".", 2)
        found.setdefault(name, {}).setdefault(int(layer), []).append(int(head))
    return {n: {layer: sorted(layers[layer]) for layer in layers} for n, layers in found.items()}


def error_at(curve: list[Point], rule: str, kept: float) -> float:
    """Error of a head at the size nearest to a kept fraction."""
    return min(
        (point for point in curve if point.rule in (rule, "dense")),
        key=lambda point: abs(point.kept - kept),
    ).error


def _map(title: str, values: Mapping[int, list[float]], most: float = 0.0) -> HeatMap:
    most = most or max(value for row in values.values() for value in row) or 1.0
    rows = []
    for layer, heads in sorted(values.items()):
        cells = []
        for head, value in enumerate(heads):
            part = min(value / most, 1.0)
            mixed = [round(c + (h - c) * part) for c, h in zip(COLD, HOT, strict=True)]
            colour = "#" + "".join(f"{channel:02x}" for channel in mixed)
            cells.append((colour, f"layer {layer}, head {head}: {value:.3g}"))
        rows.append(cells)
    return HeatMap(f"{title} (layers down, heads across; dark 0, bright {most:.2g})", rows)
