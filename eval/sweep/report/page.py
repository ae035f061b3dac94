"""report.html: one file that needs nothing else, no network, and for its tables no JavaScript."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from diffpatch.eval.media import TYPES, find_clip
from diffpatch.eval.sweep.report.plot import colours, pareto
from diffpatch.eval.sweep.report.summary import MEASURED, QUALITY, Row, Summary, Verdict
from diffpatch.eval.sweep.report.table import cells, circumstances, columns

HERE = Path(__file__).parent
MOST_CLIPS = 64 * 2**20  # bytes of clips in one page; the rest stays in the folder
FRONT = "no other method is both faster and closer to dense"
WIDE = 24  # layers above which a heat map shows colours only
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline';"
    " img-src data:; media-src data:"
)


def page(summary: Summary, folder: Path) -> str:
    """The report of a sweep.

    Args:
        summary: its rows and verdicts.
        folder: of the sweep, where its clips are.
    """
    style = (HERE / "page.css").read_text(encoding="utf-8")
    script = (HERE / "page.js").read_text(encoding="utf-8")
    body = [f"<h1>{escape(summary.title)}</h1>"]
    body += [_card(verdict) for verdict in summary.verdicts]
    room = MOST_CLIPS
    for verdict in summary.verdicts:
        rows = [row for row in summary.rows if row.setting == verdict.setting]
        results = [r for r in summary.results if r["setting"] == verdict.setting]
        clips, room = _clips(rows, results, folder, room)
        body += [
            f"<section><h2>{escape(verdict.setting)}</h2>",
            _table(rows, verdict.pick),
            "<h3>Time and quality</h3>",
            pareto(rows, summary.bar, verdict.pick),
            clips,
            _heat("Kept pairs by layer", [(row, row.kept_per_layer) for row in rows]),
            _heat("Attention error by layer", [(row, row.error_per_layer) for row in rows]),
            "</section>",
        ]
    body += [_failures(summary), _notes(summary)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(summary.title)}</title>\n<style>\n{style}</style></head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + f"\n<script>\n{script}</script>\n</body></html>\n"
    )


def _card(verdict: Verdict) -> str:
    kind = "verdict" if verdict.pick else "verdict none"
    return (
        f'<div class="{kind}"><span class="soft">{escape(verdict.setting)}</span>'
        f"<strong>{escape(verdict.text)}</strong>"
        f'<span class="rule">{escape(verdict.rule)}</span></div>'
    )


def _table(rows: Sequence[Row], pick: str | None) -> str:
    headings = columns(rows)
    head = "".join(
        f'<th scope="col"{_LABEL if i == 0 else ""}>{escape(heading)}</th>'
        for i, heading in enumerate(headings)
    )
    lines, known, number = [], colours(rows), 0
    for row in rows:
        first, *rest = (escape(cell) for cell in cells(row, headings))
        kind = {"method": "", "dense": "", "kernel": "floor", "seed": "floor"}[row.kind]
        if row.kind == "method":
            number += 1
            colour = known[str(row.facts["method"])]
            first = f'<span class="number" style="--mark:{colour}">{number}</span>{first}'
        if row.label == pick:
            kind, first = "pick", first + '<span class="badge">pick</span>'
        elif row.best:
            first += f'<span class="badge" title="{FRONT}">front</span>'
        cellules = "".join(f"<td>{cell}</td>" for cell in rest)
        lines.append(f'<tr class="{kind}"><th scope="row"{_LABEL}>{first}</th>{cellules}</tr>')
    return _scroll(
        "Results", f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    )


_LABEL = ' class="label"'


def _scroll(name: str, content: str, kind: str = "scroll") -> str:
    """Something wide, in a box that can be scrolled with the keyboard too."""
    attributes = f'class="{kind}" role="region" tabindex="0" aria-label="{escape(name)}"'
    return f"<div {attributes}>{content}</div>"


def _heat(title: str, tables: Sequence[tuple[Row, Mapping[str, float]]]) -> str:
    """A line a method, a cell a layer."""
    shown = [(row, values) for row, values in tables if values]
    if not shown:
        return ""
    layers = list(dict.fromkeys(layer for _, values in shown for layer in values))
    names = [layer.removeprefix("transformer.") for layer in layers]
    wide = len(layers) > WIDE
    most = max(1.0 if "Kept" in title else 1e-9, *(max(v.values()) for _, v in shown))
    head = "".join(
        f'<th scope="col">{"" if wide and i % 5 else escape(n)}</th>' for i, n in enumerate(names)
    )
    lines = []
    for row, values in shown:
        boxes = ""
        for layer in layers:
            value = values.get(layer, 0.0)
            text = "" if wide else f"{100 * value:.0f}"
            boxes += (
                f'<td style="--v:{value / most:.3f}" title="layer {escape(layer)}: {value:.1%}">'
                f"{text}</td>"
            )
        lines.append(f'<tr><th scope="row"{_LABEL}>{escape(row.label)}</th>{boxes}</tr>')
    kind = "heat dense" if wide else "heat"
    corner = f'<th scope="col"{_LABEL}>percent, by layer</th>'
    table = (
        f'<table class="{kind}"><thead><tr>{corner}{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table>"
    )
    return f"<h3>{title}</h3>{_scroll(title, table, 'scroll narrow')}"


def _clips(
    rows: Sequence[Row], results: Sequence[Mapping[str, Any]], folder: Path, room: int
) -> tuple[str, int]:
    """Every prompt with its clips, dense in front; and how many bytes of clips still fit."""
    cases: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for result in results:
        if result["kind"] in ("dense", "method"):
            cases.setdefault((result["prompt"], result["seed"]), []).append(result)
    parts, left_out = ["<h3>Clips</h3>"], 0
    for (prompt, seed), found in cases.items():
        paths = [find_clip(folder / "runs" / result["name"]) for result in found]
        size = sum(path.stat().st_size for path in paths if path is not None)
        if size > room:
            left_out += 1
            continue
        room -= size
        figures = "".join(
            _figure(result, path) for result, path in zip(found, paths, strict=True) if path
        )
        opened = " open" if len(parts) == 1 else ""
        parts.append(
            f"<details{opened}><summary>“{escape(prompt)}”, seed {seed}</summary>"
            '<div class="clips" role="region" tabindex="0" aria-label="Clips">'
            f"{figures}</div></details>"
        )
    if left_out:
        parts.append(
            f'<p class="soft">The clips of {left_out} more prompts would make this page too large;'
            " they are in the folders under runs/.</p>"
        )
    return "".join(parts), room


def _figure(result: Mapping[str, Any], path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    source = f"data:{TYPES[path.suffix]};base64,{data}"
    label = escape(result["label"])
    if path.suffix == ".mp4":
        media = (
            f'<video src="{source}" controls muted playsinline preload="auto"'
            f' aria-label="{label}"></video>'
        )
    else:
        media = f'<img src="{source}" alt="{label}">'
    facts = []
    if "speedup" in result:
        facts.append(f"{result['speedup']['total']:.2f}×")
        facts.append(f"{result['quality']['psnr']:.1f} dB")
        facts.append(f"{result['kept']:.0%} kept")
    else:
        facts.append(f"{result['seconds']['total']:.1f} s")
    return f"<figure>{media}<figcaption><b>{label}</b><br>{', '.join(facts)}</figcaption></figure>"


def _failures(summary: Summary) -> str:
    parts = []
    if summary.missing:
        parts.append(f"<p>{summary.missing} runs have not been done yet.</p>")
    for failure in summary.failures:
        label, prompt, error, traceback = (
            escape(failure[key]) for key in ("label", "prompt", "error", "traceback")
        )
        line = f"<summary>{label}, “{prompt}”: {error}</summary>"
        parts.append(f"<details>{line}<pre>{traceback}</pre></details>")
    return "<h2>Not in these numbers</h2>" + "".join(parts) if parts else ""


def _notes(summary: Summary) -> str:
    shared = any(row.shared for row in summary.rows)
    parts = [MEASURED, QUALITY, circumstances(summary)]
    if shared:
        parts.insert(0, "Processes shared the processor while these times were taken.")
    texts = "".join(f'<p class="soft">{escape(text)}</p>' for text in parts)
    return f"<h2>How this was measured</h2>{texts}"
