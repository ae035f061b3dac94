"""What `diffpatch eval` takes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffpatch.cli.options import arguments
from diffpatch.cli.options.arguments import later

EXAMPLES = """\
examples:
  diffpatch eval out/                 # what `render --compare dense` wrote, against its dense
  diffpatch eval out/radial --reference out/dense
  diffpatch eval fast.mp4 --reference dense.mp4
  diffpatch eval a/ b/ --reference dense/ --captions prompts.json --json scores.json
  diffpatch eval --model demo --method radial --method window --count 8
  diffpatch eval -m Wan-AI/Wan2.1-T2V-1.3B-Diffusers --method radial --prompt-file prompts.txt \\
      --clip openai/clip-vit-large-patch14 --features facebook/dinov2-base --lpips lpips/
  accelerate launch --num_processes 8 -m diffpatch eval -m demo --method radial --count 64
  diffpatch eval --vbench-results dense=a_eval_results.json --vbench-results radial=b.json
"""


CAPTIONS = 8  # drawn for the demo where no prompts are given


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "eval",
        help="measure quality: of files, or of methods on a model",
        description="Compare files or folders with a reference, or render prompts dense and with\n"
        "methods and compare those. Every table shows the noise floor: dense compared\n"
        "with dense.",
        epilog=EXAMPLES,
    )
    group = parser.add_argument_group("folders")
    group.add_argument(
        "folders", nargs="*", type=Path, help="files or folders; matched by their names"
    )
    group.add_argument(
        "--reference", type=Path, metavar="FOLDER",
        help="the dense results, a file or a folder (dense beside the others)",
    )  # fmt: skip
    group.add_argument(
        "--floor", type=Path, metavar="FOLDER", help="other dense results, for the noise floor"
    )
    group.add_argument(
        "--captions", type=arguments.existing_file,
        help="prompts of the files: JSON {name: prompt}, or lines of name, tab, prompt",
    )  # fmt: skip
    group = parser.add_argument_group("prompts, where there are no folders")
    group.add_argument("-p", "--prompt", action="append", default=[], help="text, repeatable")
    group.add_argument("--prompt-file", type=arguments.existing_file, help="a prompt on each line")
    group.add_argument(
        "--count", type=arguments.number(int, 1),
        help=f"how many prompts; the demo draws its own captions where none are given ({CAPTIONS})",
    )  # fmt: skip
    group.add_argument("--method", action="append", help="repeatable (radial)")
    arguments.add_model_options(parser)
    arguments.add_generation_options(parser)
    arguments.add_method_options(parser)
    group = parser.add_argument_group("what judges (all by default shipped and offline)")
    group.add_argument(
        "--clip", default="contrast", metavar="MODEL",
        help="contrast (the demo's captions only), or a folder or hub id of a CLIP",
    )  # fmt: skip
    group.add_argument(
        "--features", action="append", metavar="MODEL",
        help="for set distances, repeatable: contrast (clips), frames (single ones), judge, a "
        "folder or hub id of CLIP, DINOv2, SigLIP, VideoMAE, or FID's Inception as "
        "safetensors (contrast and frames)",
    )  # fmt: skip
    group.add_argument("--lpips", type=Path, help="AlexNet and linear heads as safetensors")
    _add_vbench(parser)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="JSON to a file, or - for stdout"
    )
    group.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=later("diffpatch.cli.eval"))


def _add_vbench(parser: argparse.ArgumentParser) -> None:
    """Add what reads and writes for VBench."""
    group = parser.add_argument_group("VBench (runs in an environment of its own)")
    group.add_argument(
        "--vbench-export", type=Path, metavar="FOLDER",
        help="also write every clip as FOLDER/ROW/PROMPT-INDEX.mp4, where VBench finds it",
    )  # fmt: skip
    group.add_argument(
        "--vbench-results", action="append", default=[], metavar="ROW=FILE",
        help="scores that VBench wrote for a row (*_eval_results.json), repeatable; alone, or "
        "beside a measurement",
    )  # fmt: skip
    group.add_argument(
        "--fps", type=arguments.number(float, 0.1),
        help="frames per second of exported clips (8 for files; else the model's own, or 16)",
    )  # fmt: skip
