"""What `diffpatch plan` takes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffpatch.cli.options import arguments, names
from diffpatch.cli.options.arguments import later
from diffpatch.pipelines.shapes.table import MODELS

EXAMPLES = """\
examples:
  diffpatch plan --model wan-14b --height 720 --width 1280 --num-frames 81 --device-profile h100
  diffpatch plan --model wan-14b --height 720 --width 1280 --num-frames 81 \\
      --method radial --set decay=0.5 --dense-steps 12 --draw pictures/
  diffpatch plan --model flux --height 2048 --width 2048 --method neighborhood --json
  diffpatch plan --model ./my-model --height 480 --width 832 --num-frames 81 --quality balanced
  diffpatch plan --settings wan.json --target "30 dB"
"""


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    models = ", ".join(row.name for row in MODELS)
    parser = commands.add_parser(
        "plan",
        help="what a method will gain, without running anything",
        description="Grid, kept pairs, costs beyond them, the share of attention, bounds on the\n"
        "speedup and, for a device, times. No weights are needed: built-in model shapes, or the\n"
        "configs of a folder or a hub id.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "-m", "--model",
        help=f"{models}; a pipeline as in render, or a transformer's config.json",
    )  # fmt: skip
    parser.add_argument("--height", type=arguments.number(int, 1), help="in pixels")
    parser.add_argument("--width", type=arguments.number(int, 1), help="in pixels")
    parser.add_argument("--num-frames", type=arguments.number(int, 1), default=1, help="of a video")
    parser.add_argument(
        "--num-inference-steps", "--steps", type=arguments.number(int, 1),
        help="denoising steps (those of the pipeline; 50 for a built-in shape)",
    )  # fmt: skip
    parser.add_argument("--method", help="one method in detail; without it, all are compared")
    arguments.add_method_options(parser)
    arguments.add_target_options(parser)
    parser.add_argument(
        "--device-profile", metavar="NAME|FILE",
        help=f"predict times on a device: {', '.join(names.DEVICES)}, or a file that"
        " `diffpatch bench profile --json FILE` wrote",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=names.DTYPES, help="for the times (bf16; with the torch backend fp32)"
    )
    parser.add_argument(
        "--draw", type=Path, metavar="FILE.png",
        help="save a picture of the mask, or of every method's; all kinds in a folder/",
    )  # fmt: skip
    parser.add_argument(
        "--draw-kind", choices=names.PICTURES, default="tiles",
        help="pairs of tiles, what one query sees, or kept by the distance of frames (tiles)",
    )  # fmt: skip
    parser.add_argument(
        "--draw-query", type=place, metavar="T,H,W", help="the query to draw (the middle one)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=later("diffpatch.cli.plan"))


def place(text: str) -> tuple[int, ...]:
    """A token such as 4,10,12: frame, row, column."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if len(found) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} must be frame,row,column, such as 4,10,12")
    return found
