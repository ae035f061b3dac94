"""`diffpatch families`: the models that can be patched."""

from __future__ import annotations

import argparse
from typing import Any

import diffpatch
from diffpatch.cli.output import to_json
from diffpatch.cli.summary import table

EXAMPLES = """\
examples:
  diffpatch families
  diffpatch families --json
"""


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "families",
        help="list the supported model families",
        description="The diffusers transformers that diffpatch knows; every pipeline that holds "
        "one can be patched, unless the note says why not.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table; returns the exit code."""
    entries = [_entry(family) for family in diffpatch.families()]
    if args.json:
        print(to_json(entries), end="")
        return 0
    rows = [["family", "makes", "transformer", "text tokens", "note"]]
    rows += [[e["name"], e["kind"], e["transformer"], e["text"], _remark(e)] for e in entries]
    print(table(rows, left=5))
    return 0


def _entry(family: Any) -> dict[str, Any]:
    names = ("name", "kind", "transformer", "text", "note", "refused")
    return {name: getattr(family, name) for name in names} | {"presets": sorted(family.presets)}


def _remark(entry: dict[str, Any]) -> str:
    return f"cannot be patched: {entry['refused']}" if entry["refused"] else entry["note"]
