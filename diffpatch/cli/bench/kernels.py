"""`diffpatch bench kernels`: kernels at the shapes of known models, and all of a day on a GPU."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from diffpatch.cli import output, progress
from diffpatch.eval.bench.kernels.bench import PARTS, bench_kernels
from diffpatch.eval.bench.kernels.measurements import reason_of
from diffpatch.eval.bench.kernels.shapes import KEPT, LARGE, SMALL
from diffpatch.files import to_json
from diffpatch.pipelines.running.loading import choose_device
from diffpatch.tables import table

Row = dict[str, Any]

SLOT = 460.0  # seconds of a run on a GPU, where nothing else is asked for
KINDS = ("checks", "rows", "choices", "steps")
TIMED = ("choosing", "attending", "dense")
COLUMNS = (
    "shape", "dtype", "backend", "tokens", "kept", "ms", "speedup", "TFLOP/s", "of bound",
    "host ms",
)  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit code, 1 if something was wrong or failed."""
    output.check_file(args.json)
    small = choose_device(args.device).type == "cpu"
    file = None if args.json in (None, "-") else Path(args.json)
    result = bench_kernels(
        args.device,
        args.shapes or (SMALL if small else LARGE),
        dtypes=args.dtype,
        kept=(() if small else KEPT) if args.kept is None else args.kept,
        layouts=args.layout,
        loads=args.loads,
        int8=args.int8 or not small,
        gluon=args.gluon or not small,
        parts=args.parts or (("kernels",) if small else PARTS),
        repeats=args.repeats,
        limit_seconds=args.limit_seconds or (None if small else SLOT),
        say=lambda text: progress.say(text, args.quiet),
        save=partial(_write, file) if file else lambda result: None,
    )
    print(to_json(result) if args.json == "-" else describe(result))
    if file:
        print(f"wrote {file}")
    rows = [row for kind in KINDS for row in result.get(kind, ())]
    every = [each for row in rows for each in (row, *row.get("sparse", {}).values())]
    return int(any("failed" in each for each in every))


def _write(file: Path, result: dict[str, Any]) -> None:
    output.write_text(file, to_json(result))


def describe(result: dict[str, Any]) -> str:
    """Everything measured as tables, and below each why something has no speed."""
    shown = [
        _checks(result.get("checks", [])),
        _kernels(result["rows"]),
        _choices(result.get("choices", [])),
        _steps(result.get("steps", [])),
    ]
    return "\n\n".join(text for text in shown if text)


def _checks(rows: list[Row]) -> str:
    if not rows:
        return ""
    words = ("operator", "backend", "dtype", "head_dim")
    lines = [[*words, ""]]
    for row in rows:
        said = f"cannot run: {row['unsupported']}" if "unsupported" in row else "right"
        said = reason_of(row) or said
        lines.append([*(str(row[word]) for word in words), said])
    return table(lines, left=5)


def _choices(rows: list[Row]) -> str:
    lines = [["choice", "dtype", "kept", "choosing", "attending", "dense", "share", "speedup"]]
    reasons = []
    for row in rows:
        if reason := reason_of(row):
            reasons.append(f"{row['shape']}, {row['dtype']}: {reason}")
            continue
        took = (f"{1e3 * row['seconds'][name]['median']:.2f} ms" for name in TIMED)
        gain = f"{row['speedup']['median']:.2f}×"
        start = [row["shape"], row["dtype"], f"{row['kept']:.1%}"]
        lines.append([*start, *took, f"{row['share']:.1%}", gain])
    return "\n".join([table(lines, left=2), *reasons]) if rows else ""


def _steps(rows: list[Row]) -> str:
    lines = [["step", "dtype", "method", "kept", "seconds", "speedup"]]
    reasons = []
    for row in rows:
        start = [row["step"], row["dtype"]]
        if reason := reason_of(row):
            reasons.append(f"{', '.join(start)}: {reason}")
            continue
        lines.append([*start, "dense", "", f"{row['dense']['seconds']['median']:.2f}", "1.00×"])
        for name, entry in row["methods"].items():
            took, gain = entry["seconds"]["median"], entry["speedup"]["median"]
            lines.append([*start, name, f"{entry['kept']:.1%}", f"{took:.2f}", f"{gain:.2f}×"])
    return "\n".join([table(lines, left=3), *reasons]) if rows else ""


def _kernels(measured: list[Row]) -> str:
    rows, reasons, notes = [list(COLUMNS)], [], []
    for row in measured:
        name = f"{row['shape']}, {row['dtype']}"
        if reason := reason_of(row):
            wanted = "" if row["wanted"] is None else f", {row['wanted']:.1%} kept"
            reasons.append(f"{name}{wanted}: {reason}")
            continue
        start = [row["shape"], row["dtype"]]
        sizes = [str(row["tokens"]), f"{row['kept']:.3f}"]
        dense = [f"{1e3 * row['dense_seconds']['median']:.2f}", "1.00"]
        rows.append([*start, "dense", *sizes, *dense, f"{row['dense_tflops']:.2f}", "", ""])
        for backend, entry in row["sparse"].items():
            if reason := reason_of(entry):
                reasons.append(f"{name}, {row['kept']:.1%} kept, {backend}: {reason}")
            else:
                rows.append([*start, backend, *sizes, *_numbers(entry)])
        computed = (f"{name} {share:.1%}" for name, share in row.get("computed", {}).items())
        notes.append(
            f"{name}, {row['kept']:.1%} kept: {row['visited']:.1%} of the pairs lie in visited"
            f" tiles; with padding {', '.join(computed)} are computed"
        )
        permuting = f"{1e3 * row['permuting']['median']:.2f}"
        rows.append([*start, "(permuting)", *sizes, permuting, "", "", "", ""])
    return "\n".join([table(rows, left=3), *notes, *reasons]) if measured else ""


def _numbers(entry: dict[str, Any]) -> list[str]:
    host = entry["host_seconds"]
    return [
        f"{1e3 * entry['seconds']['median']:.2f}",
        f"{entry['speedup']['median']:.2f}",
        f"{entry['tflops']:.2f}",
        f"{entry['of_bound']:.0%}",
        "" if host is None else f"{1e3 * host:.2f}",
    ]
