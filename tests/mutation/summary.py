"""What a session of mutants says, by part of the house."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

JUDGED = Path(__file__).with_name("judged.json")
ENDS = ("noticed", "hung", "equal", "unclear", "unnoticed")
ENOUGH = 30  # edits of a part, before their share says anything


def judged() -> dict[tuple[str, str, str], str]:
    """Survivors that change nothing a user could see: (file, line before, line after) -> why."""
    rows = json.loads(JUDGED.read_text(encoding="utf-8"))
    return {(row["file"], row["before"], row["after"]): row["why"] for row in rows}


def write_summary(found: Mapping[Any, dict[str, Any]], seed: int, root: Path) -> None:
    """Write eval/results/mutants.json and mutants.md."""
    why = judged()
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    survivors = []
    for row in found.values():
        key = (row["mutant"][0], row["before"], row["after"])
        survived = row["end"] in ("unnoticed", "unclear")
        end = "equal" if survived and key in why else row["end"]
        counts[row["part"]][end] += 1
        if end == "unnoticed":
            survivors.append(dict(zip(("file", "before", "after"), key, strict=True)))
    parts = {part: shares(ends) for part, ends in counts.items()}
    data = {"seed": seed, "parts": parts, "unnoticed": sorted(survivors, key=lambda s: s["file"])}
    results = root / "eval" / "results"
    text = json.dumps(data, indent=1, ensure_ascii=False)
    (results / "mutants.json").write_text(text + "\n", encoding="utf-8")
    (results / "mutants.md").write_text(_page(parts, seed, len(survivors)), encoding="utf-8")


def shares(ends: Counter[str]) -> dict[str, Any]:
    """How many of each end, and the fraction noticed of those that change anything."""
    counted = sum(ends.values()) - ends["equal"]
    noticed = ends["noticed"] + ends["hung"]
    return {"tried": sum(ends.values()), **ends, "share": round(noticed / max(counted, 1), 3)}


def _page(parts: Mapping[str, Mapping[str, Any]], seed: int, survivors: int) -> str:
    lines = [
        "# Small wrong edits that the tests notice",
        "",
        f"`make mutants SEED={seed}`: a random sample of cosmic-ray's edits. Equal: a survivor that"
        " changes nothing",
        "a user could see, listed with the reason in `tests/mutation/judged.json`; not in the"
        " share. Unclear:",
        "no test had noticed it when its time was up, and some had not run; counts as unnoticed.",
        "",
        "| part | tried | noticed | hung | equal | unclear | unnoticed | noticed, at least |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for part, row in parts.items():
        ends = [str(row.get(end, 0)) for end in ENDS]
        lines.append(f"| {part} | {row['tried']} | {' | '.join(ends)} | {row['share']:.0%} |")
    if any(row["tried"] - row.get("unclear", 0) < ENOUGH for row in parts.values()):
        lines += ["", f"Fewer than {ENOUGH} tried in a part say nothing about it."]
    lines += ["", f"The {survivors} unnoticed ones are listed in `mutants.json`.", ""]
    return "\n".join(lines)
