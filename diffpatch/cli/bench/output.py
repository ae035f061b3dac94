"""What the benchmarks share: which methods, how often, and where the result goes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffpatch.checking import refuse_dense
from diffpatch.cli import output
from diffpatch.cli.errors import UsageError
from diffpatch.cli.parameters import method_parameters
from diffpatch.eval.environment import threads
from diffpatch.files import to_json
from diffpatch.methods.registry import parameter_types
from diffpatch.tables import table


def chosen(args: argparse.Namespace, default: str = "radial") -> dict[str, dict[str, Any]]:
    """The methods asked for, each with those --set parameters that it has.

    Raises:
        UsageError: a parameter that none of them has.
        BadParameter: dense is among them, or a value that a method refuses.
    """
    refuse_dense(args.method or ())
    found, used = {}, set()
    for name in args.method or [default]:
        fields = parameter_types(name)
        own = [text for text in args.set if text.partition("=")[0].replace("-", "_") in fields]
        found[name] = method_parameters(name, own)
        used |= set(own)
    for text in args.set:
        if text not in used:
            names = f"{' and '.join(found)} {'has' if len(found) == 1 else 'have'}"
            raise UsageError(
                f"--set {text}: {names} no such parameter; `diffpatch methods` lists them"
            )
    return found


def times(seconds: dict[str, float]) -> list[str]:
    """Median and quartiles in milliseconds."""
    low, high = seconds["low"] * 1e3, seconds["high"] * 1e3
    return [f"{seconds['median'] * 1e3:.2f} ms", f"{low:.2f}-{high:.2f}"]


def finish(args: argparse.Namespace, result: dict[str, Any], rows: Sequence[Sequence[str]]) -> None:
    """The table on stdout, the JSON where it was asked for."""
    if args.json == "-":
        print(to_json(result), end="")
        return
    print(table(rows))
    environment = result["environment"]
    device = ", ".join(
        environment[part] for part in ("device", "instructions") if part in environment
    )
    print(f"{device}, {threads(environment)}, torch {environment['versions']['torch']}")
    if args.json is not None:
        output.write_text(Path(args.json), to_json(result))
        print(f"wrote {args.json}")
