"""`diffpatch bench profile`: measure this machine, for the times that `diffpatch plan` predicts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffpatch.cli import arguments, output, progress
from diffpatch.cli.errors import UsageError
from diffpatch.files import to_json
from diffpatch.pipelines.running import loading
from diffpatch.tables import table

EXAMPLES = """\
examples:
  diffpatch bench profile --json my-card.json
  diffpatch plan --model wan-14b --height 720 --width 1280 --num-frames 81 \\
      --device-profile my-card.json
"""


def add_parser(kinds: Any) -> None:
    """Add the command to `diffpatch bench`."""
    parser = kinds.add_parser(
        "profile",
        help="what attention costs here, as a file for `diffpatch plan --device-profile`",
        description="Time dense attention and methods at several sizes, fit a cost model to them,\n"
        "and check it on sizes that it was not fitted to. Takes minutes.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--dtype", action="append", choices=tuple(loading.DTYPES),
        help="repeatable (bf16; on the CPU fp32 and bf16)",
    )  # fmt: skip
    parser.add_argument(
        "--head-dim", action="append", type=arguments.number(int, 8), help="repeatable (64, 128)"
    )
    parser.add_argument(
        "--repeats", type=arguments.number(int, 1), default=4, help="rounds; the fastest counts (4)"
    )
    parser.add_argument("--device", help="cpu, cuda, … (the accelerator, if there is one)")
    parser.add_argument("--json", metavar="FILE", type=Path, required=True, help="the profile")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, fit, check and write; returns the exit code."""
    from diffpatch.eval.bench import profile as device_costs

    if args.json.is_dir():
        raise UsageError(f"{args.json} is a folder; name a file with --json")
    output.check_free([args.json], overwrite=True, option="--json")
    device = loading.choose_device(args.device)
    result = device_costs.profile(
        str(device),
        dtypes=args.dtype or (("fp32", "bf16") if device.type == "cpu" else ("bf16",)),
        head_dims=args.head_dim or (64, 128),
        repeats=args.repeats,
        say=lambda text: progress.say(text, args.quiet),
    )
    output.write_text(args.json, to_json(result))
    found = device_costs.check(result)
    rows = [["method", "grid", "dtype", "head", "measured", "predicted", "off by"]]
    for row in found:
        off = row["predicted"] / row["measured"] - 1
        grid = "×".join(map(str, row["grid"]))
        gains = [f"{row['measured']:.2f}×", f"{row['predicted']:.2f}×", f"{off:+.0%}"]
        rows.append([row["method"], grid, row["dtype"], str(row["head_dim"]), *gains])
    worst = max(abs(row["predicted"] / row["measured"] - 1) for row in found)
    print(table(rows))
    print(f"speedups of attention at sizes that were not fitted to; at most {worst:.0%} off")
    print(f"wrote {args.json}: diffpatch plan … --device-profile {args.json}")
    return 0
