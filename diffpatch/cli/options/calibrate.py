"""What `diffpatch calibrate` takes."""

from __future__ import annotations

from typing import Any

from diffpatch.cli.options import arguments
from diffpatch.cli.options.arguments import later

EXAMPLES = """\
examples:
  diffpatch calibrate --prompt "a large red circle moves left over a black background" \\
      --method dense+temporal --max-error 0.05
"""


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "calibrate",
        help="find thresholds for temporal attention from one prompt",
        description="Try thresholds of x+temporal in mode skip on one prompt, and print those\n"
        "that keep the attention error within a bound in each third of the run.",
        epilog=EXAMPLES,
    )
    group = parser.add_argument_group("what to calibrate")
    group.add_argument("-p", "--prompt", required=True, help="a typical one")
    group.add_argument("--method", default="dense+temporal", help="x+temporal (dense+temporal)")
    group.add_argument(
        "--max-error", type=arguments.number(float, 0), default=0.075, metavar="E",
        help="bound on the relative L1 error of attention, in the middle third (0.075)",
    )  # fmt: skip
    group.add_argument(
        "--spread", type=arguments.number(float, 0), default=0.01, metavar="E",
        help="how much lower the bound is in the first third, and higher in the last (0.01)",
    )  # fmt: skip
    arguments.add_model_options(parser)
    arguments.add_generation_options(parser)
    arguments.add_method_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=later("diffpatch.cli.calibrate"))
