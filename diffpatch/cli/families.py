"""`diffpatch families`: the models that can be patched."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import diffpatch
from diffpatch.cli.errors import UsageError
from diffpatch.files import to_json
from diffpatch.pipelines.families.info import FamilyInfo
from diffpatch.tables import table

COLUMNS = ("family", "makes", "transformer", "text", "guidance", "compile", "GPUs", "presets")
ENTRIES = (  # of the JSON form, beside the names of the presets
    "name", "kind", "transformer", "text", "note", "refused", "guidance", "regional", "ulysses",
)  # fmt: skip
LEGEND = """\
text: where tokens stand that stay visible to all. guidance: with and without the prompt in one
batch, in a call each, or distilled into one forward. compile: blocks alone, or only the whole.
GPUs: Ulysses where diffusers can cut the sequence. presets: methods with published settings."""


def run(args: argparse.Namespace) -> int:
    """Print the table; returns the exit code."""
    known = [family for family in diffpatch.list_families() if _is_like(family, args.like or "")]
    if not known:
        raise UsageError(f"no family is like {args.like!r}: `diffpatch families` lists them all")
    if args.json:
        print(to_json([_entry(family) for family in known]), end="")
    elif args.markdown:
        print(markdown(known))
    else:
        rows = [[*COLUMNS, "note"]]
        rows += [[*_cells(family), family.note] for family in known if not family.refused]
        refused = [[f.name, f.transformer, f.refused] for f in known if f.refused]
        if len(rows) > 1:
            print(f"{table(rows, left=len(rows[0]))}\n\n{LEGEND}")
        if refused:
            gap = "\n" if len(rows) > 1 else ""
            print(f"{gap}Cannot be patched:\n{table(refused, left=3)}")
    return 0


def _is_like(family: FamilyInfo, part: str) -> bool:
    return any(
        part.lower() in text.lower() for text in (family.name, family.transformer, family.kind)
    )


def markdown(known: Sequence[FamilyInfo]) -> str:
    """The supported families and the refused ones, as two tables."""
    rows = [[*COLUMNS, "note"]]
    rows += [[*_cells(family, "`{}`"), family.note] for family in known if not family.refused]
    refused = [["family", "transformer", "why it cannot be patched"]]
    refused += [[f.name, f"`{f.transformer}`", f.refused] for f in known if f.refused]
    return f"{_markdown(rows)}\n\n{LEGEND}\n\n{_markdown(refused)}"


def _markdown(rows: list[list[str]]) -> str:
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(
        "|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|" for row in rows
    )


def _entry(family: FamilyInfo) -> dict[str, Any]:
    entry: dict[str, Any] = {name: getattr(family, name) for name in ENTRIES}
    return entry | {"presets": sorted(family.presets)}


def _cells(family: FamilyInfo, code: str = "{}") -> list[str]:
    return [
        family.name,
        family.kind,
        code.format(family.transformer),
        family.text,
        family.guidance,
        "blocks" if family.regional else "whole",
        "Ulysses" if family.ulysses else "",
        ", ".join(sorted(family.presets)),
    ]
