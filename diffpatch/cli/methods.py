"""`diffpatch methods`: what there is to choose from."""

from __future__ import annotations

import argparse
from typing import Any

import diffpatch
from diffpatch.files import to_json
from diffpatch.methods import MethodInfo
from diffpatch.tables import table


def run(args: argparse.Namespace) -> int:
    """Print the table; returns the exit code."""
    infos = diffpatch.list_methods().values()
    if args.json:
        print(to_json([_entry(info) for info in infos]), end="")
        return 0
    blocks = []
    for info in infos:
        rows = [[f"    {name}={default!r}", text] for name, (_, default, text) in
                info.parameters.items()]  # fmt: skip
        lines = [f"{info.name}: {info.summary}", f"  after {info.source}"]
        blocks.append("\n".join([*lines, table(rows, left=2)]))
    print("\n\n".join(blocks))
    return 0


def _entry(info: MethodInfo) -> dict[str, Any]:
    parameters = {
        name: {"type": kind, "default": default, "help": text}
        for name, (kind, default, text) in info.parameters.items()
    }
    return {
        "name": info.name,
        "summary": info.summary,
        "source": info.source,
        "class": info.cls.__name__,
        "parameters": parameters,
    }
