"""What `diffpatch sweep` takes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffpatch.cli.options import arguments, names
from diffpatch.cli.options.arguments import later

EXAMPLES = """\
keys of SWEEP.yaml; prompts and methods are needed, lists are axes:
  title             heads the report
  model             one or several, as for render (demo)
  dtype, offload, vae_tiling    as for render
  prompts           texts, or {prompt: TEXT, image: FILE}; prompt_file: a line each
  seeds             (0); seeds_in_turn: true gives each prompt one of them
  sizes             {height: …, width: …, num_frames: …} in pixels (the model's own)
  steps             denoising steps (the model's own)
  call              other arguments of the pipeline's call
  schedules         {dense_steps: …, dense_layers: …, dense_last_steps: …}
  methods           names, or {method: NAME, set: {…}, vary: {KEY: [VALUES]}, and for this one
                    method dense_steps, dense_layers, dense_last_steps, backend, kept, cache
                    (thresholds of a step cache), hold (tolerances of held steps)}, or
                    {settings: FILE, target: [TARGETS]} of `diffpatch tune`
  kept              fractions of the pairs, such as [0.5, 0.25], that methods are fitted to
  noise_floor       dense beside itself: [kernel, seed] unless said otherwise
  attention_error   for how many prompts attention outputs are compared with dense (0)
  dense_every       dense is timed anew after so many runs (8; 0 never)
  bar               quality that a pick must have ({psnr: 25}); also ssim, caption_accuracy,
                    clip_score
  details           true: the judge's answers one by one, objects and repetitions in the report
  networks          {clip: …, features: …, lpips: …}, as for eval

examples:
  diffpatch sweep -m demo -p "a large red circle moves left over a black background" -o runs/demo
  diffpatch sweep -m Wan-AI/Wan2.1-T2V-1.3B-Diffusers -p "a fox in snow" --minutes 60 -o runs/wan
  diffpatch sweep examples/demo_sweep.yaml -o runs/demo
  diffpatch sweep examples/demo_sweep.yaml -o runs/demo     # resumes where it was stopped
  diffpatch sweep examples/demo_sweep.yaml --dry-run
  diffpatch sweep --report-only runs/demo
  accelerate launch --num_processes 8 -m diffpatch sweep my_sweep.yaml -o runs/mine
"""


MINUTES = 15.0  # of a sweep without a file


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "sweep",
        help="compare methods on your model: which one is fastest, and at what quality",
        description="Render prompts dense and with several methods, and say which method to use.\n"
        "-m MODEL -p PROMPT compares the methods that suit the model; a YAML file\n"
        "describes a sweep of your own. Writes report.html, card.webp, card.png,\n"
        "summary.md, summary.csv, summary.json, and without a file sweep.yaml, which runs\n"
        "the same again. You can stop it at any time: the same command resumes. Processes\n"
        "can share the work.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "what", nargs="?", type=Path, metavar="SWEEP.yaml",
        help="what to sweep; with --report-only the folder of an earlier sweep",
    )  # fmt: skip
    _add_own(parser)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs"), help="folder (runs)")
    parser.add_argument(
        "--minutes", type=arguments.number(float, 0), metavar="M",
        help=f"start no run that would end later than this ({MINUTES:g} without a file)",
    )  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda, … (the accelerator, if there is one)")
    parser.add_argument("--dry-run", action="store_true", help="check and list the runs")
    parser.add_argument(
        "--retry-failed", action="store_true", help="retry the runs that failed before"
    )
    parser.add_argument(
        "--report-only",
        action="store_true",
        help="render nothing, only rewrite the reports of a folder",
    )
    parser.add_argument(
        "--rescore", action="store_true", help="compute the metrics again, from the stored frames"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=later("diffpatch.cli.sweep"))


def _add_own(parser: argparse.ArgumentParser) -> None:
    """What replaces a file."""
    group = parser.add_argument_group("without a file")
    group.add_argument("-m", "--model", help=f"{arguments.MODEL_HELP} (demo)")
    group.add_argument("-p", "--prompt", action="append", default=[], help="text, repeatable")
    group.add_argument(
        "--image", type=arguments.existing_file, help="first frame, or image to start from"
    )
    for name in ("--height", "--width", "--num-frames"):
        what = "of a video" if name == "--num-frames" else "in pixels"
        group.add_argument(name, type=arguments.number(int, 1), help=f"{what} (the model's own)")
    group.add_argument(
        "--num-inference-steps", "--steps", type=arguments.number(int, 1),
        help="denoising steps (the model's own)",
    )  # fmt: skip
    group.add_argument(
        "--kept", nargs="+", type=arguments.fraction, metavar="F",
        help="fractions of the pairs that methods are fitted to (0.5 0.25)",
    )  # fmt: skip
    group.add_argument("--dtype", choices=("auto", *names.DTYPES), help="of the weights (auto)")
    group.add_argument(
        "--offload", choices=names.OFFLOADS, help="keep idle weights in main memory (none)"
    )
