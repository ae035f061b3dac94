"""What `diffpatch tune` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffpatch.cli.options import arguments
from diffpatch.cli.options.arguments import later

EXAMPLES = """\
examples:
  diffpatch tune -m demo --prompt-file prompts.txt -o demo.json
  diffpatch tune -m Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt-file prompts.txt --hold-out 2 \\
      --target "30 dB" -o wan.json
  diffpatch render -m demo -p "a large red circle moves left over a black background" \\
      --settings demo.json --target "30 dB" --compare dense -o out/
"""


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "tune",
        help="measure your model, to choose settings for targets such as '30 dB'",
        description="Measure what every attention head loses when its attention is sparse; then\n"
        "render with sparse attention, with steps cached or held and with both, and\n"
        "print speed and quality of each. Writes the settings, a page and a picture. You\n"
        "can stop it at any time: the same command resumes.",
        epilog=EXAMPLES,
    )
    group = parser.add_argument_group("what to tune with")
    group.add_argument("-p", "--prompt", action="append", default=[], help="text, repeatable")
    group.add_argument("--prompt-file", type=arguments.existing_file, help="a prompt on each line")
    group.add_argument(
        "--hold-out", type=arguments.number(int, 0), default=0, metavar="N",
        help="check with the last N prompts what the target really comes to (0)",
    )  # fmt: skip
    group.add_argument(
        "--target", default="30 dB", help="what to choose: '30 dB', '2x', 'kept 0.25' (30 dB)"
    )
    group.add_argument(
        "--render", type=arguments.number(int, 1), default=2, metavar="N",
        help="prompts that the front is rendered with (2)",
    )  # fmt: skip
    group.add_argument(
        "--kept", nargs="*", type=arguments.fraction, default=[0.25], metavar="F",
        help="kept fractions of sparse calls that are rendered (0.25)",
    )  # fmt: skip
    group.add_argument(
        "--dense-steps", nargs="+", type=arguments.number(float, 0), default=[0.15, 0.5],
        metavar="F", help="parts of a run that stay dense before sparse calls (0.15 0.5)",
    )  # fmt: skip
    group.add_argument(
        "--caches", nargs="*", type=arguments.number(float, 1e-6), metavar="T",
        help="thresholds of diffusers' FirstBlockCache, none without any (0.05 0.1 0.2 where"
        " diffusers knows the model)",
    )  # fmt: skip
    group.add_argument(
        "--holds", nargs="*", type=arguments.number(float, 1e-6), metavar="T",
        default=[0.0025, 0.005, 0.01],
        help="tolerances within which steps are held (0.0025 0.005 0.01)",
    )  # fmt: skip
    group.add_argument(
        "--curve-steps", type=arguments.number(int, 3), metavar="N",
        help="denoising steps of the runs that curves are made from (those of the others)",
    )  # fmt: skip
    arguments.add_model_options(parser)
    arguments.add_generation_options(parser)
    group = parser.add_argument_group("output")
    group.add_argument(
        "-o", "--output", type=Path, default=Path("settings.json"),
        help="file of the settings (settings.json)",
    )  # fmt: skip
    group.add_argument("--overwrite", action="store_true", help="replace an earlier file")
    group.add_argument("--json", action="store_true", help="print the settings as JSON")
    group.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=later("diffpatch.cli.tune"))
