"""What `diffpatch render` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffpatch.cli.options import arguments, names
from diffpatch.cli.options.arguments import later

EXAMPLES = """\
examples:
  diffpatch render --prompt "a large red circle moves left over a black background" \\
      --method radial --compare dense -o out/
  diffpatch render -m demo-long -p "a small blue ring grows over a gray background" \\
      --method neighborhood --set window=0.5 --dense-steps 0.25 -o out/
  diffpatch render -m Wan-AI/Wan2.1-T2V-1.3B-Diffusers -p "a fox in snow" --offload model -o out/
  diffpatch render -p "a large red circle moves left over a black background" \\
      --height 256 --width 256 --method larger --strength 0.7 -o out/
  accelerate launch -m diffpatch render -m Wan-AI/Wan2.1-T2V-1.3B-Diffusers \\
      --prompt-file prompts.txt --resume -o out/
  diffpatch render -m ./my-wan-i2v --image start.png -p "the fox runs" --dtype bf16 -o out/
"""


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "render",
        help="make a video or an image, and compare it with dense attention",
        description="Run a pipeline with faster attention. With --compare dense, run it without\n"
        "as well, from the same noise, and report both times and how similar the\n"
        "results are.",
        epilog=EXAMPLES,
    )
    group = parser.add_argument_group("what to make")
    group.add_argument("-p", "--prompt", action="append", default=[], help="text, repeatable")
    group.add_argument("--prompt-file", type=arguments.existing_file, help="a prompt on each line")
    group.add_argument(
        "--method", default="auto",
        help="one of `diffpatch methods`, or dense (radial; neighborhood on image models)",
    )  # fmt: skip
    group.add_argument(
        "--compare", choices=("dense", "none"), default="none",
        help="also render dense, from the same noise, and compare (none)",
    )  # fmt: skip
    group.add_argument(
        "--strength", type=float, metavar="S",
        help="render in two stages: dense at the size the model was trained at, then enlarged and"
        " denoised again with the method, in the last S of the steps (such as 0.7)",
    )  # fmt: skip
    arguments.add_model_options(parser)
    arguments.add_generation_options(parser)
    arguments.add_method_options(parser)
    arguments.add_hold_option(parser)
    arguments.add_target_options(parser)
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output", type=Path, default=Path("out"), help="folder (out)")
    again = group.add_mutually_exclusive_group()
    again.add_argument("--overwrite", action="store_true", help="replace earlier results")
    again.add_argument("--resume", action="store_true", help="render only what is missing")
    group.add_argument(
        "--format", choices=names.VIDEO_FORMATS,
        help="of the files (mp4, or webp without ffmpeg; png for images)",
    )  # fmt: skip
    group.add_argument(
        "--fps",
        type=arguments.number(float, 0.1),
        help="frames per second (the model's own, else 16)",
    )
    group.add_argument(
        "--json", action="store_true", help="print the result as JSON (a list for several prompts)"
    )
    group.add_argument("--quiet", action="store_true", help="no progress and no summary")
    group.add_argument("--dry-run", action="store_true", help="check everything, render nothing")
    parser.set_defaults(run=later("diffpatch.cli.render"))
