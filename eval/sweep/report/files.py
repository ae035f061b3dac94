"""The reports of a sweep: report.html, summary.md, summary.csv, summary.json, and the card."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffpatch.eval.sweep.report.card import sweep_card
from diffpatch.eval.sweep.report.page import page
from diffpatch.eval.sweep.report.rows import Row
from diffpatch.eval.sweep.report.summary import MEASURED, QUALITY, Summary
from diffpatch.eval.sweep.report.table import cells, circumstances, columns
from diffpatch.files import write_json, write_text
from diffpatch.tables import table


def write_reports(summary: Summary, folder: Path) -> list[Path]:
    """Write every report into the folder of the sweep; returns their paths."""
    cards = sweep_card(summary, folder)  # before the page, which shows it
    texts = {
        "report.html": page(summary, folder),
        "summary.md": markdown(summary),
        "summary.csv": comma_separated(summary),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    write_json(folder / "summary.json", summary.to_dict())
    return [*(folder / name for name in (*texts, "summary.json")), *cards]


def describe(summary: Summary) -> str:
    """Tables and verdicts for a terminal."""
    lines = []
    for verdict in summary.verdicts:
        rows = [row for row in summary.rows if row.setting == verdict.setting]
        headings = columns(rows)
        shown = table([headings, *(cells(row, headings) for row in rows)])
        lines += [verdict.setting, shown, verdict.text, verdict.rule]
        lines += [f"  {verdict.line}", ""] if verdict.line else [""]
    return "\n".join(lines[:-1])


def markdown(summary: Summary) -> str:
    """summary.md: verdicts, tables, what the numbers mean, where they come from."""
    lines = [f"# {_escape(summary.title)}", ""]
    for verdict in summary.verdicts:
        rows = [row for row in summary.rows if row.setting == verdict.setting]
        headings = columns(rows)
        lines += [f"## {_escape(verdict.setting)}", "", f"**{_escape(verdict.text)}**", ""]
        if verdict.line:
            lines += ["```python", verdict.line, "```", ""]
        lines += [verdict.rule, "", "| " + " | ".join(headings) + " |"]
        lines.append("|" + "|".join([" --- ", *[" ---: "] * (len(headings) - 1)]) + "|")
        for row in rows:
            lines.append("| " + " | ".join(map(_escape, cells(row, headings))) + " |")
        lines.append("")
    lines += [MEASURED, "", QUALITY, "", _escape(circumstances(summary)), ""]
    if summary.failures or summary.missing:
        lines += [f"{len(summary.failures)} runs failed, {summary.missing} are missing.", ""]
    return "\n".join(lines)


def comma_separated(summary: Summary) -> str:
    """summary.csv: every number of every row."""
    metrics = sorted({key for row in summary.rows for key in row.quality})
    stream = io.StringIO()
    lines = [_csv_row(row, metrics) for row in summary.rows]
    writer = csv.DictWriter(stream, list(lines[0]) if lines else ["model"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


def _csv_row(row: Row, metrics: Sequence[str]) -> dict[str, Any]:
    facts, about = row.facts, row.facts["environment"]
    line: dict[str, Any] = {
        "model": facts["model"],
        "setting": row.setting,
        "kind": row.kind,
        "method": facts["method"] or row.label,
        "parameters": json.dumps(facts["parameters"], ensure_ascii=False),
        "options": json.dumps(facts["options"], ensure_ascii=False),
        "fitted": facts.get("fitted"),
        "wanted": facts["wanted"],
        "kept": row.kept,
        "warmup_steps": row.dense_steps,
        "dense_layers": row.dense_layers,
    }
    for clock in ("total", "denoising", "step_median"):
        for part in ("median", "low", "high"):
            line[f"seconds_{clock}_{part}"] = row.seconds.get(clock, {}).get(part)
    for clock in ("total", "denoising"):
        for part in ("median", "low", "high"):
            line[f"speedup_{clock}_{part}"] = row.speedup.get(clock, {}).get(part)
        line[f"dense_{clock}"] = row.dense_seconds.get(clock, {}).get("median")
    line |= {"peak_gib": row.peak_gib, "attention_error": row.attention_error}
    line |= {key: row.quality.get(key) for key in metrics}
    line |= {"psnr_min": row.least.get("psnr"), "psnr_median": row.middle.get("psnr")}
    line |= {key: row.distances.get(key) for key in ("fd", "kd", "clips", "small_sample")}
    return line | {
        "runs": row.runs,
        "shared_timing": row.shared,
        "busy": row.busy or "",
        "dtype": facts["dtype"],
        "device": about["device"],
        "torch": about["versions"].get("torch"),
        "diffusers": about["versions"].get("diffusers"),
        "diffpatch": about["versions"].get("diffpatch"),
        "commit": about["commit"],
    }


def _escape(text: str) -> str:
    """Text as it is, in Markdown tables too."""
    for mark in "\\`*_|[]<>":
        text = text.replace(mark, "\\" + mark)
    return text
