"""`diffpatch plan`: what a method will gain on a model at a size, before anything runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import diffpatch
from diffpatch.cli import arguments
from diffpatch.cli.errors import UsageError
from diffpatch.cli.output import to_json
from diffpatch.cli.parameters import field_names, method_parameters
from diffpatch.cli.summary import table
from diffpatch.pipelines.find_shape import find_shape
from diffpatch.pipelines.shapes import MODELS

EXAMPLES = """\
examples:
  diffpatch plan --model wan-14b --height 720 --width 1280 --num-frames 81
  diffpatch plan --model wan-14b --height 720 --width 1280 --num-frames 81 \\
      --method radial --set decay=0.5 --dense-steps 12 --draw radial.png
  diffpatch plan --model flux --height 2048 --width 2048 --method neighborhood --json
"""


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    names = ", ".join(row.name for row in MODELS)
    parser = commands.add_parser(
        "plan",
        help="what a method will gain, without running anything",
        description="Grid, kept pairs, the share of attention and bounds on the speedup. Built-in "
        "model shapes need no weights; pipelines are loaded and read.",
        epilog=EXAMPLES,
    )
    parser.add_argument("-m", "--model", required=True, help=f"{names}; or a pipeline as in render")
    parser.add_argument("--height", type=arguments.number(int, 1), required=True, help="in pixels")
    parser.add_argument("--width", type=arguments.number(int, 1), required=True, help="in pixels")
    parser.add_argument("--num-frames", type=arguments.number(int, 1), default=1, help="of a video")
    parser.add_argument(
        "--num-inference-steps", "--steps", type=arguments.number(int, 1), default=50,
        help="denoising steps (50)",
    )  # fmt: skip
    parser.add_argument("--method", help="one method in detail; without it, all are compared")
    arguments.add_method_options(parser)
    parser.add_argument("--draw", type=Path, metavar="FILE", help="save the tile map as a PNG")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan or the comparison; returns the exit code."""
    if args.method is None and (args.draw or args.set):
        raise UsageError("--set and --draw are about one method: name it with --method")
    if args.draw and not args.draw.absolute().parent.is_dir():
        raise UsageError(f"{args.draw.parent} is no folder; choose another --draw")
    target = find_shape(args.model)  # once, for all methods
    if args.method is not None:
        made = _plan(args, target, args.method, method_parameters(args.method, args.set))
        if args.draw:
            made.draw().save(args.draw, format="PNG")
        print(to_json(made.to_dict()) if args.json else made, end="" if args.json else "\n")
        return 0
    plans, refused = {}, {}
    for name in _comparable():
        try:
            plans[name] = _plan(args, target, name, {})
        except diffpatch.DiffpatchError as error:
            refused[name] = str(error)
    if not plans:
        raise UsageError(next(iter(refused.values())))
    if args.json:
        print(to_json([plan.to_dict() for plan in plans.values()]), end="")
        return 0
    print(_comparison(plans))
    for name, why in refused.items():
        print(f"{name}: {why}")
    return 0


def _comparable() -> list[str]:
    """Every method, and those that wrap another one over radial and neighborhood."""
    plain = [n for n, info in diffpatch.methods().items() if "over" not in field_names(info.cls)]
    wrappers = [n for n in diffpatch.methods() if n not in plain]
    return plain + [f"{n}+{w}" for w in wrappers for n in ("radial", "neighborhood")]


def _plan(
    args: argparse.Namespace, target: Any, method: str, params: dict[str, Any]
) -> diffpatch.Plan:
    return diffpatch.plan(
        target,
        method,
        height=args.height,
        width=args.width,
        num_frames=args.num_frames,
        num_inference_steps=args.num_inference_steps,
        dense_steps=args.dense_steps,
        dense_layers=args.dense_layers,
        dense_last_steps=args.dense_last_steps,
        quality=args.quality,
        **params,
    )


def _comparison(plans: dict[str, diffpatch.Plan]) -> str:
    first = next(iter(plans.values()))
    rows = [["", "kept, sparse calls", "kept, run", "attention", "transformer", "state"]]
    for name, plan in plans.items():
        rows.append([
            name,
            f"{plan.kept_sparse:.1%}",
            f"{plan.kept:.1%}",
            f"≤ {plan.attention_speedup:.2f}×",
            f"≤ {plan.step_speedup:.2f}×",
            f"{plan.state_bytes / 2**20:,.0f} MiB" if plan.state_bytes else "",
        ])  # fmt: skip
    return (
        f"{first.model}: grid {first.grid} = {first.tokens:,} tokens, {first.steps} steps,"
        f" attention {first.attention_share:.0%} of a dense step's operations\n"
        f"{table(rows)}\n"
        "bounds by operations, uncalibrated: `diffpatch bench` measures"
    )
