"""The card of a sweep: what its first verdict picks, beside dense."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from diffpatch.eval.card import CardText, machine, write_card
from diffpatch.eval.media import load_frames
from diffpatch.eval.sweep.pictures import PATTERN
from diffpatch.eval.sweep.report.summary import Summary
from diffpatch.eval.sweep.report.verdict import paste

NAMES = ("card.webp", "card.png")  # the moving one first


def sweep_card(summary: Summary, folder: Path) -> list[Path]:
    """Write the card of the first setting that has a pick; returns what was written, if anything.

    The clip is that of the prompt with the middle PSNR: neither the best nor the worst is shown.
    """
    for name in NAMES:
        (folder / name).unlink(missing_ok=True)  # of an earlier verdict
    verdict = next((verdict for verdict in summary.verdicts if verdict.pick), None)
    if verdict is None:
        return []
    [row] = [r for r in summary.rows if (r.setting, r.label) == (verdict.setting, verdict.pick)]
    found = [
        result
        for result in summary.results
        if (result["setting"], result["label"]) == (row.setting, row.label)
    ]
    middle = median(result["quality"]["psnr"] for result in found)
    shown = min(found, key=lambda result: abs(result["quality"]["psnr"] - middle))
    runs = folder / "runs"
    paths = [runs / name / "frames.npz" for name in (shown["dense"]["name"], shown["name"])]
    if not all(path.is_file() for path in paths):
        return []
    dense, fast = map(load_frames, paths)
    text = CardText(
        label=row.label,
        speedup=row.gain,
        psnr=row.quality["psnr"],
        kept=row.kept,
        line=paste(row).partition("  #")[0],
        prompt=shown["prompt"],
        small=machine(row.facts["environment"], [row.setting]),
        busy=row.busy,
    )
    return write_card(folder, dense, fast, text, _pattern(runs / shown["name"]), _fps(shown))


def _pattern(run: Path) -> Image.Image | None:
    path = run / PATTERN
    return Image.open(path).convert("RGB") if path.is_file() else None


def _fps(result: Mapping[str, Any]) -> float:
    return float(result.get("clip", {}).get("fps", 8.0))
