"""`diffpatch bench profile`: measure this machine, for the times that `diffpatch plan` predicts."""

from __future__ import annotations

import argparse

from diffpatch.cli import output, progress
from diffpatch.files import to_json
from diffpatch.pipelines.running import loading
from diffpatch.tables import table


def run(args: argparse.Namespace) -> int:
    """Measure, fit, check and write; returns the exit code."""
    from diffpatch.eval.bench import profile as device_costs

    output.check_file(args.json)
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
