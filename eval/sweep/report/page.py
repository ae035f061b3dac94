"""report.html: one file that needs nothing else, no network, and for its tables no JavaScript.

`page.html` is the template, which escapes whatever it is given; here is what it is given.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from diffpatch.eval.media import TYPES, find_clip
from diffpatch.eval.sweep.pictures import ATTENTION, CLIP, DIFFERENCE, PATTERN
from diffpatch.eval.sweep.report.card import NAMES
from diffpatch.eval.sweep.report.plot import colours, pareto
from diffpatch.eval.sweep.report.rows import METRICS, Row, prompt_of
from diffpatch.eval.sweep.report.summary import MEASURED, QUALITY, Summary
from diffpatch.eval.sweep.report.table import cells, circumstances, columns
from diffpatch.eval.sweep.report.verdict import Verdict

HERE = Path(__file__).parent
MOST_CLIPS = 64 * 2**20  # bytes of clips in one page; the rest stays in the folder
WIDE = 24  # layers above which a heat map shows colours only
COLD, HOT, NONE = (38, 50, 74), (242, 193, 78), (120, 120, 120)  # of a map
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline';"
    " img-src data:; media-src data:"
)
HIGHER = ("speedup", "denoising", *(METRICS[k].heading for k in ("psnr", "ssim", "clip_score")))


@dataclass
class _Room:
    """How many bytes of clips still fit into the page, and how many prompts did not."""

    left: int = MOST_CLIPS
    left_out: int = 0


def page(summary: Summary, folder: Path) -> str:
    """The report of a sweep.

    Args:
        summary: its rows and verdicts.
        folder: of the sweep, where its clips are.
    """
    templates = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    room = _Room()
    return templates.get_template("page.html").render(
        title=summary.title,
        policy=Markup(POLICY),
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
        card=next((_address(folder / name) for name in NAMES if (folder / name).is_file()), None),
        verdicts=summary.verdicts,
        settings=[_setting(summary, verdict, folder, room) for verdict in summary.verdicts],
        missing=summary.missing,
        failures=summary.failures,
        notes=_notes(summary),
    )


def _setting(summary: Summary, verdict: Verdict, folder: Path, room: _Room) -> dict[str, Any]:
    """Everything about one setting: table, plot, clips and maps."""
    rows = [row for row in summary.rows if row.setting == verdict.setting]
    results = [r for r in summary.results if r["setting"] == verdict.setting]
    room.left_out = 0
    return {
        "name": verdict.setting,
        "table": _table(rows, results, verdict, summary.bar, folder),
        "plot": pareto(rows, summary.bar, verdict.pick),
        "prompts": _prompts(results, folder, room, verdict.pick),
        "left_out": room.left_out,
        "maps": [
            {"label": row.label, "picture": _map(row.kept_map), "steps": len(row.kept_map),
             "layers": len(row.kept_map[0])}
            for row in rows if row.kept_map and row.kept_map[0]
        ],
        "looks": _looks(results, folder),
        "errors": _heat([(row.label, row.error_per_layer) for row in rows]),
    }  # fmt: skip


def _table(
    rows: Sequence[Row],
    results: Sequence[Mapping[str, Any]],
    verdict: Verdict,
    bar: Mapping[str, float],
    folder: Path,
) -> dict[str, Any]:
    """Headings and lines, each with what is shown beside its name."""
    headings, known = columns(rows), colours(rows)
    patterns: dict[str, Path] = {}
    for result in results:
        path = folder / "runs" / result["name"] / PATTERN
        if path.is_file():
            patterns.setdefault(result["label"], path)
    lines, texts = [], [cells(row, headings) for row in rows]
    for row, (_, *rest) in zip(rows, texts, strict=True):
        is_method = row.kind == "method"
        below = any(row.quality.get(key, 0.0) < least for key, least in bar.items())
        lines.append({
            "label": row.label,
            "kind": "pick" if row.label == verdict.pick else
                    "below" if is_method and below else {"kernel": "floor", "seed": "floor"}.get(
                        row.kind, ""),
            "colour": known[str(row.facts["method"])] if is_method else None,
            "pattern": _address(patterns[row.label]) if row.label in patterns else None,
            "badge": "pick" if row.label == verdict.pick else "front" if row.best else None,
            "busy": row.busy,
            "cells": rest,
        })  # fmt: skip
    for index, heading in enumerate(headings[1:]):
        if heading in HIGHER:
            _mark_best(index, [line for line, row in zip(lines, rows, strict=True)
                               if row.kind == "method"])  # fmt: skip
    return {"headings": headings, "lines": lines}


def _mark_best(index: int, lines: Sequence[dict[str, Any]]) -> None:
    """Note the highest value of a column in its lines."""
    values = [float(line["cells"][index].split()[0].rstrip("×%") or 0) if line["cells"][index]
              else 0.0 for line in lines]  # fmt: skip
    for line, value in zip(lines, values, strict=True):
        if value and value == max(values):
            line.setdefault("best", set()).add(index)


def _prompts(
    results: Sequence[Mapping[str, Any]], folder: Path, room: _Room, pick: str | None
) -> list[dict[str, Any]]:
    """Every prompt with its clips, dense in front, as long as they fit into the page."""
    scenes: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for result in results:
        if result["kind"] in ("dense", "method"):
            scenes.setdefault((prompt_of(result), result["seed"]), []).append(result)
    found = []
    for (prompt, seed), runs in scenes.items():
        paths = [
            [find_clip(folder / "runs" / run["name"], name) for name in (CLIP, DIFFERENCE)]
            for run in runs
        ]
        size = sum(path.stat().st_size for pair in paths for path in pair if path is not None)
        if size > room.left:
            room.left_out += 1
            continue
        room.left -= size
        clips = [
            _clip(run, clip, difference)
            for run, (clip, difference) in zip(runs, paths, strict=True)
            if clip is not None
        ]
        frames = max((run.get("clip", {}).get("frames", 0) for run in runs), default=0)
        found.append({"text": prompt, "seed": seed, "clips": clips, "frames": frames, "pick": pick})
    return found


def _clip(run: Mapping[str, Any], clip: Path, difference: Path | None) -> dict[str, Any]:
    """One clip with what there is to say about it."""
    if "speedup" in run:
        facts = [f"{run['speedup']['total']:.2f}×", f"{run['quality']['psnr']:.1f} dB",
                 f"{run['kept']:.0%} kept"]  # fmt: skip
    else:
        facts = [f"{run['seconds']['total']:.1f} s"]
    return {
        "label": run["label"],
        "kind": run["kind"],
        "video": clip.suffix == ".mp4",
        "address": _address(clip),
        "difference": None if difference is None else _address(difference),
        "facts": ", ".join(facts),
    }


def _map(kept: Sequence[Sequence[float | None]]) -> str:
    """A picture of what every layer (to the right) kept in every step (down)."""
    pixels = np.array([
        [NONE if value is None else [c + (h - c) * value for c, h in zip(COLD, HOT, strict=True)]
         for value in step] for step in kept
    ])  # fmt: skip
    small = Image.fromarray(pixels.round().astype(np.uint8))
    scale = max(4, min(24, 240 // max(small.size)))
    large = small.resize((small.width * scale, small.height * scale), Image.Resampling.NEAREST)
    stream = io.BytesIO()
    large.save(stream, "PNG", optimize=True)
    return _data(stream.getvalue(), "image/png")


def _looks(results: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Attention maps, one a method: where a query looks, and the mass that each head keeps."""
    found: dict[str, dict[str, Any]] = {}
    for result in results:
        path, mass = folder / "runs" / result["name"] / ATTENTION, result.get("attention")
        if mass is None or result["label"] in found or not path.is_file():
            continue
        heads = list(mass["mass_kept"].values())
        found[result["label"]] = {
            "label": result["label"],
            "picture": _address(path),
            "heads": _map(heads),
            "layers": len(heads),
            "kept": sum(map(sum, heads)) / sum(map(len, heads)),
        }
    return list(found.values())


def _heat(tables: Sequence[tuple[str, Mapping[str, float]]]) -> dict[str, Any] | None:
    """A line a method, a cell a layer; None where nobody measured it."""
    shown = [(label, values) for label, values in tables if values]
    if not shown:
        return None
    layers = list(dict.fromkeys(layer for _, values in shown for layer in values))
    most = max(value for _, values in shown for value in values.values()) or 1.0
    return {
        "layers": layers,
        "wide": len(layers) > WIDE,
        "lines": [
            {"label": label, "cells": [
                {"layer": layer, "value": values[layer], "share": f"{values[layer] / most:.3f}"}
                if layer in values else None for layer in layers
            ]} for label, values in shown
        ],
    }  # fmt: skip


def _address(path: Path) -> str:
    return _data(path.read_bytes(), TYPES[path.suffix])


def _data(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _notes(summary: Summary) -> list[str]:
    notes = [MEASURED, QUALITY, circumstances(summary)]
    if any(row.shared for row in summary.rows):
        notes.insert(0, "Processes shared the processor while these times were taken.")
    return notes
