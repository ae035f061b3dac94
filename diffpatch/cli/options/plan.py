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
  diffpatch plan --model demo-long
  diffpatch plan --model flux --height 2048 --width 2048 --method neighborhood --json
  diffpatch plan --model minimax-h3 --height 768 --width 1344 --num-frames 124 \\
      --reference 124,768,1344
  diffpatch plan --model ./my-model --height 480 --width 832 --num-frames 81 --quality balanced
  diffpatch plan --settings wan.json --target "30 dB"
"""


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    own = "(the pipeline's own; a built-in shape has none)"
    models = ", ".join(row.name for row in MODELS)
    parser = commands.add_parser(
        "plan",
        help="estimate what methods save, without running the model",
        description="Print the token grid, the fraction of pairs kept, the share of attention in\n"
        "a step, memory, bounds on the speedup and, for a known device, predicted\n"
        "times. Needs no weights, only the shape of the model: a built-in one, or the\n"
        "configs of a folder or a hub id.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "-m", "--model",
        help=f"{models}; a pipeline as in render, or a transformer's config.json",
    )  # fmt: skip
    parser.add_argument("--height", type=arguments.number(int, 1), help=f"in pixels {own}")
    parser.add_argument("--width", type=arguments.number(int, 1), help=f"in pixels {own}")
    parser.add_argument("--num-frames", type=arguments.number(int, 1), help=f"of a video {own}")
    parser.add_argument(
        "--reference", type=size, action="append", default=[], metavar="FRAMES,HEIGHT,WIDTH",
        help="a video or image that stands in the sequence before the one to make (minimax-h3), in"
        " frames and pixels; repeatable",
    )  # fmt: skip
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
        "--dtype",
        choices=names.DTYPES,
        help="of the predicted times (bf16; fp32 with the torch backend)",
    )
    parser.add_argument(
        "--draw", type=Path, metavar="FILE.png",
        help="save a picture of the pattern (without --method of all); a folder/ gets all kinds",
    )  # fmt: skip
    parser.add_argument(
        "--draw-kind", choices=names.PICTURES, default="tiles",
        help="what to draw: the kept part of each pair of tiles, what one query sees, or the kept"
        " part by the distance between frames (tiles)",
    )  # fmt: skip
    parser.add_argument(
        "--draw-query",
        type=place,
        metavar="T,H,W",
        help="frame, row and column of the query to draw, in tokens (the middle one)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=later("diffpatch.cli.plan"))


def place(text: str) -> tuple[int, ...]:
    """A token such as 4,10,12: frame, row, column."""
    return _three(text, "frame,row,column, such as 4,10,12")


def size(text: str) -> tuple[int, ...]:
    """A clip such as 124,768,1344: frames, height, width."""
    found = _three(text, wanted := "frames,height,width, such as 124,768,1344")
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be {wanted}, all at least 1")
    return found


def _three(text: str, wanted: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if len(found) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} must be {wanted}")
    return found
