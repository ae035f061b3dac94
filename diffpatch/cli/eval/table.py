"""What `diffpatch eval` shows: scores of clips, distances of sets, and what to take with care."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffpatch.tables import table

SCORES: tuple[tuple[str, str, str], ...] = (
    ("psnr", "PSNR", ".2f"),
    ("ssim", "SSIM", ".4f"),
    ("ms_ssim", "MS-SSIM", ".4f"),
    ("lpips", "LPIPS", ".4f"),
    ("clip_i", "CLIP-I", ".4f"),
    ("clip_score", "CLIP score", ".2f"),
    ("temporal_consistency", "consistency", ".4f"),
    ("flicker", "flicker", ".4f"),
    ("caption_accuracy", "caption", ".1%"),
)
DISTANCES: tuple[tuple[str, str, str], ...] = (("fd", "FD", ".3f"), ("kd", "KD", ".4f"))


def describe(result: Mapping[str, Any]) -> str:
    """The result as tables, with what is missing or to be taken with care below them."""
    rows = result["rows"]
    lines = [
        table(_scores(rows)),
        f"by CLIP ({result['tools']['clip']}): CLIP-I to the frames of the reference, CLIP score to"
        " the prompt, consistency of neighbouring frames",
    ]
    if any(row["sets"] for row in rows):
        lines += [table(_distances(rows))]
        lines += ["FD and KD: Fréchet and kernel distance to the reference; "
                  "a row a clip is FVD-style, a row a frame FID-style"]  # fmt: skip
    lines += [f"no {key}: {why}" for key, why in result["missing"].items()]
    lines += [("* " if "Fréchet" in note else "") + note for note in result["notes"]]
    return "\n".join(lines)


def _scores(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    used = [column for column in SCORES if any(column[0] in row["scores"] for row in rows)]
    kept = ["kept"] if any("kept" in row for row in rows) else []
    lines = [["", "clips", *kept, *(label for _, label, _ in used)]]
    for row in rows:
        share = [f"{row['kept']:.1%}" if "kept" in row else ""] if kept else []
        lines.append([row["name"], str(row["count"]), *share, *_cells(row["scores"], used)])
    return lines


def _distances(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    makers = list(dict.fromkeys(maker for row in rows for maker in row["sets"]))
    found = [sets for row in rows for sets in row["sets"].values()]
    used = [column for column in DISTANCES if any(column[0] in sets for sets in found)]
    short = {maker: Path(maker).name for maker in makers}
    heads = [f"{label} {short[maker]}" for maker in makers for _, label, _ in used]
    lines = [["distance of sets", *heads, "rows"]]
    for row in rows:
        if not row["sets"]:
            continue
        cells = [cell for maker in makers for cell in _cells(row["sets"].get(maker, {}), used)]
        counts = " ".join(str(row["sets"][m]["count"]) if m in row["sets"] else "-" for m in makers)
        lines.append([row["name"], *cells, counts])
    return lines


def _cells(found: Mapping[str, Any], used: Sequence[tuple[str, str, str]]) -> list[str]:
    """The values there are; a Fréchet distance of too few rows with a star."""
    flag = "*" if found.get("small_sample") else ""
    return [
        format(found[key], form) + flag * (key == "fd") if key in found else ""
        for key, _, form in used
    ]
