"""The table of a report, whatever it is shown in: headings, cells, where the numbers come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffpatch.eval.environment import threads
from diffpatch.eval.sweep.report.rows import KD, METRICS, Row
from diffpatch.eval.sweep.report.summary import Summary

DENSE, WORST, BUSY = "dense beside", "worst PSNR", "busy"
BEHIND = "dB to the best"
BRANCHES, BETWEEN, SLOPE = "by branch", "between branches", "slope"


def columns(rows: Sequence[Row]) -> list[str]:
    """The headings of a table of these rows; what nobody measured has no column."""
    found = ["method", "kept", "time", "speedup", "denoising", DENSE]
    if any(row.busy for row in rows):
        found.append(BUSY)
    if any(row.facts.get("wanted") is not None for row in rows):
        found.insert(1, "wanted")
    if any(row.peak_gib is not None for row in rows):
        found.append("GiB")
    if any(row.attention_error is not None for row in rows):
        found.append("attention error")
    if any(len(row.error_per_branch) > 1 for row in rows):
        found += [BRANCHES, BETWEEN]
    if any(row.slope is not None for row in rows):
        found.append(SLOPE)
    known = {key for row in rows for key in row.quality}
    found += [metric.heading for key, metric in METRICS.items() if key in known]
    if "psnr" in known and any(row.runs > 1 for row in rows):
        found.insert(found.index(METRICS["psnr"].heading) + 1, WORST)
    if any(row.behind for row in rows):
        found.insert(found.index(METRICS["psnr"].heading) + 1, BEHIND)
    if any("kd" in row.distances for row in rows):
        found.append(KD)
    return [*found, "runs"]


def cells(row: Row, headings: Sequence[str]) -> list[str]:
    """One line of a table."""
    values: dict[str, str] = {
        "method": row.label,
        "wanted": _number(row.facts.get("wanted"), "{:.0%}"),
        "kept": f"{row.kept:.1%}",
        "time": _number(row.seconds.get("total", {}).get("median"), "{:.2f} s"),
        "speedup": _number(row.speedup.get("total", {}).get("median"), "{:.2f}×"),
        DENSE: _number(row.dense_seconds.get("total", {}).get("median"), "{:.2f} s"),
        BUSY: row.busy or "",
        WORST: _number(row.least.get("psnr"), METRICS["psnr"].form),
        "denoising": _number(row.speedup.get("denoising", {}).get("median"), "{:.2f}×"),
        "GiB": _number(row.peak_gib, "{:.2f}"),
        "attention error": _number(row.attention_error, "{:.1%}"),
        BRANCHES: " / ".join(f"{error:.1%}" for error in row.error_per_branch.values()),
        BETWEEN: _number(row.error_between, "{:.1%}"),
        SLOPE: _number(row.slope, "{:.2f}"),
        BEHIND: ""
        if row.behind is None
        else "{mean:+.1f} ({low:+.1f} to {high:+.1f})".format(**row.behind),
        KD: _number(row.distances.get("kd"), "{:.2f}", 1000),
        "runs": str(row.runs),
    }
    for key, metric in METRICS.items():
        count = row.counts.get(key, row.runs)
        few = f" ({count} of {row.runs})" if count < row.runs else ""
        values[metric.heading] = _number(row.quality.get(key), metric.form) + few
    return [values[heading] for heading in headings]


def circumstances(summary: Summary) -> str:
    """Device, versions and commits, in one sentence each."""
    found = dict.fromkeys(_circumstances(result) for result in summary.results)
    return " ".join(found)


def _circumstances(result: dict[str, Any]) -> str:
    about = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"{about['device']}, {threads(about)}, {result['dtype']}; {versions};"
        f" commit {about['commit'] or 'unknown'}."
    )


def _number(value: float | None, form: str, scale: float = 1) -> str:
    return "" if value is None else form.format(scale * value)
