"""What `diffpatch bench` and its parts take."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffpatch.cli.options import arguments, names
from diffpatch.cli.options.arguments import later
from diffpatch.pipelines.shapes.table import MODELS

EXAMPLES = """\
examples:
  diffpatch bench attention --grid 33x16x16 --method radial
  diffpatch bench attention --grid 21x45x80 --heads 12 --head-dim 128 --dtype bf16 \\
      --method radial --method neighborhood --json bench.json
  diffpatch bench render --model demo-long --method radial --repeats 3
  diffpatch bench model --model wan-14b --kept 0.2 --method radial --method neighborhood
  diffpatch bench kernels --help
"""


PROMPT = "a large red circle moves left over a black background"


OF_MODEL = """\
examples:
  diffpatch bench model --model wan-14b --height 720 --width 1280 --num-frames 81 --kept 0.2 \\
      --method radial --method neighborhood --json wan-14b.json
  diffpatch bench model --model flux --height 2048 --width 2048 --method neighborhood --layers 8
"""


OF_PROFILE = """\
examples:
  diffpatch bench profile --json my-card.json
  diffpatch plan --model wan-14b --height 720 --width 1280 --num-frames 81 \\
      --device-profile my-card.json
"""


OF_KERNELS = """\
examples:
  diffpatch bench kernels --device cuda --json kernels.json
  diffpatch bench kernels --device cuda --parts checks choices --json choices.json
  diffpatch bench kernels --layout permuted gather ordered --loads auto pointer --int8 --gluon
"""


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "bench",
        help="measure speed",
        description="Measure speed against the fastest dense attention on this machine. Wrong\n"
        "results are an error, never a speedup.",
        epilog=EXAMPLES,
    )
    kinds = parser.add_subparsers(
        title="what to measure", metavar="WHAT", required=True, dest="what"
    )
    _add_attention(kinds)
    _add_render(kinds)
    _add_model(kinds)
    _add_profile(kinds)
    _add_kernels(kinds)


def _add_attention(kinds: Any) -> None:
    parser = kinds.add_parser(
        "attention",
        help="one attention call on random tensors",
        description="Time one attention call of each method and of the fastest dense attention,\n"
        "in turns, after checking the results against a masked softmax.",
        epilog=EXAMPLES,
    )
    count = arguments.number(int, 1)
    parser.add_argument(
        "--grid", type=grid, default="33x16x16", help="frames×height×width in tokens (33x16x16)"
    )
    parser.add_argument("--text", type=arguments.number(int, 0), default=0, help="text tokens (0)")
    parser.add_argument("--heads", type=count, default=3, help="attention heads (3)")
    parser.add_argument("--head-dim", type=count, default=64, help="their size (64)")
    parser.add_argument("--batch", type=count, default=1, help="sequences (1)")
    parser.add_argument("--dtype", choices=names.DTYPES, default="fp32", help="(fp32)")
    parser.add_argument("--device", help="cpu, cuda, … (the accelerator, if there is one)")
    arguments.add_backend_option(parser)
    _add_common(parser, repeats=5)
    parser.set_defaults(run=later("diffpatch.cli.bench", "run_attention"))


def _add_render(kinds: Any) -> None:
    parser = kinds.add_parser(
        "render",
        help="a whole pipeline call, dense and with each method",
        description="Time whole pipeline calls, dense and with each method in turns.",
        epilog=EXAMPLES,
    )
    parser.add_argument("-p", "--prompt", default=PROMPT, help=f"what to render ({PROMPT})")
    arguments.add_model_options(parser)
    arguments.add_generation_options(parser)
    arguments.add_method_options(parser)
    _add_common(parser, repeats=3)
    parser.set_defaults(run=later("diffpatch.cli.bench", "run_render"))


def _add_model(kinds: Any) -> None:
    """Add the command to `diffpatch bench`."""
    parser = kinds.add_parser(
        "model",
        help="one step of a model of published size, with random weights",
        description="Time one forward of a transformer of published size with random weights,\n"
        "which needs no checkpoint: dense and with each method in turns, after\n"
        "checking results.",
        epilog=OF_MODEL,
    )
    count = arguments.number(int, 1)
    models = [shape.name for shape in MODELS]
    parser.add_argument("-m", "--model", choices=models, default="wan-1.3b", help="(wan-1.3b)")
    parser.add_argument("--height", type=count, default=480, help="in pixels (480)")
    parser.add_argument("--width", type=count, default=832, help="in pixels (832)")
    parser.add_argument("--num-frames", type=count, help="of a video (about 80; 1 for images)")
    parser.add_argument("--layers", type=count, help="time fewer layers than the model has (all)")
    parser.add_argument("--batch", type=count, default=1, help="samples in the forward (1)")
    parser.add_argument(
        "--kept",
        type=arguments.fraction,
        help="fit every method to this fraction of the pairs (each method's own)",
    )
    parser.add_argument("--dtype", choices=names.DTYPES, help="(bf16; on the CPU fp32)")
    parser.add_argument("--device", help="cpu, cuda, … (the accelerator, if there is one)")
    arguments.add_backend_option(parser)
    _add_common(parser, repeats=5)
    parser.set_defaults(run=later("diffpatch.cli.bench.model"))


def _add_profile(kinds: Any) -> None:
    """Add the command to `diffpatch bench`."""
    parser = kinds.add_parser(
        "profile",
        help="what attention costs here, as a file for `diffpatch plan --device-profile`",
        description="Time dense attention and methods at several sizes, fit a cost model to them,\n"
        "and check it on sizes that it was not fitted to. Takes minutes.",
        epilog=OF_PROFILE,
    )
    parser.add_argument(
        "--dtype", action="append", choices=names.DTYPES,
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
    parser.set_defaults(run=later("diffpatch.cli.bench.profile"))


def _add_kernels(kinds: Any) -> None:
    """Add the command to `diffpatch bench`."""
    parser = kinds.add_parser(
        "kernels",
        help="the kernels alone",
        description="Check every kernel against its definition; time the block-sparse kernels at\n"
        "the shapes of known models, in turns with dense attention and what others\n"
        "ship; tiles that are chosen by content; and whole steps of models with\n"
        "random weights. On a GPU all of it, within 8 minutes; on a CPU the kernels\n"
        "at small shapes.",
        epilog=OF_KERNELS,
    )
    parser.add_argument("--device", help="cpu, cuda, … (the accelerator, if there is one)")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=names.PARTS,
        help="what to do (all on a GPU, kernels on a CPU)",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=names.SHAPES,
        help="of models (on a GPU all that are not small, on a CPU the small ones)",
    )
    parser.add_argument("--dtype", nargs="+", choices=names.DTYPES, default=["bf16"], help="(bf16)")
    parser.add_argument(
        "--kept",
        nargs="*",
        type=arguments.fraction,
        help="fractions of the pairs to keep, beside each shape's own window (0.5 0.25 0.1 0.05 on"
        " a GPU)",
    )
    parser.add_argument(
        "--layout", nargs="+", choices=names.LAYOUTS, default=["permuted"],
        help="keys and values are copied to tile order, read where they are, or in tile order"
        " already (permuted)",
    )  # fmt: skip
    parser.add_argument(
        "--loads", nargs="+", choices=names.LOADS, default=["auto"],
        help="how the Triton kernel reads them: by pointers or by descriptors, TMA (auto)",
    )  # fmt: skip
    parser.add_argument("--int8", action="store_true", help="measure 8 bits too (a GPU does)")
    parser.add_argument(
        "--gluon",
        action="store_true",
        help="measure the kernel made for Hopper too, in all its settings (a GPU does)",
    )
    parser.add_argument("--repeats", type=arguments.number(int, 1), default=5, help="rounds (5)")
    parser.add_argument(
        "--limit-seconds",
        type=arguments.number(float, 1),
        metavar="S",
        help="begin no row that may end later (460 on a GPU, no limit on a CPU)",
    )
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE",
        help="JSON to a file, which has every row as soon as it is measured, or - for stdout",
    )  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=later("diffpatch.cli.bench.kernels"))


def _add_common(parser: argparse.ArgumentParser, repeats: int) -> None:
    """--method, --set, --repeats, --json and --quiet."""
    parser.add_argument("--method", action="append", help="repeatable (radial)")
    if not any("--set" in action.option_strings for action in parser._actions):
        parser.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE",
            help="a parameter, for every method that has it",
        )  # fmt: skip
    parser.add_argument(
        "--repeats", type=arguments.number(int, 1), default=repeats, help=f"rounds ({repeats})"
    )
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="JSON to a file, or - for stdout"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")


def grid(text: str) -> Any:
    """33x16x16 as a `TokenGrid`."""
    from diffpatch import DiffpatchError, TokenGrid

    try:
        frames, height, width = (int(part) for part in text.lower().replace("×", "x").split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be frames×height×width, such as 33x16x16"
        ) from None
    try:
        return TokenGrid(frames, height, width)
    except DiffpatchError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
