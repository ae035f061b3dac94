"""Render a VBench prompt list as VBench wants it, then read the scores VBench wrote.

    python examples/vbench_prompts.py render all_dimension.txt -o videos/dense \\
        --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers
    python examples/vbench_prompts.py render all_dimension.txt -o videos/radial --method radial \\
        --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --set decay=1.0
    # in VBench's own environment: vbench evaluate --videos_path videos/radial ...
    python examples/vbench_prompts.py read dense_eval_results.json radial_eval_results.json

Rendering goes on where an earlier attempt stopped, and is shared among the processes of
`accelerate launch` or `torchrun`.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

import diffpatch
from diffpatch import files
from diffpatch.cli import scripts
from diffpatch.eval import media
from diffpatch.eval.processes import Process
from diffpatch.eval.quality import vbench
from diffpatch.pipelines.running import loading, sampling
from diffpatch.pipelines.running.calls import fitted_call, frames_per_second


def render(args: argparse.Namespace) -> None:
    """Render what is missing, every video from a seed of its own."""
    parameters = {} if args.method == "dense" else scripts.method_parameters(args.method, args.set)
    source = loading.find(args.model)
    scripts.check_format("mp4", source.is_video)
    call = scripts.call_arguments(args, source)
    made = {key: getattr(args, key) for key in ("model", "dtype", "method", "set", "seed")}
    scripts.keep_settings(args.output / ".settings.json", made | {"call": call})
    process, wanted = Process.current(), vbench.videos(args.prompts, args.samples)
    missing = [
        (number, *wanted[number])
        for number in process.mine(range(len(wanted)))
        if not (args.output / vbench.file_name(*wanted[number])).exists()
    ]
    scripts.say(f"{len(missing)} of {len(wanted)} videos are left for this process")
    if not missing:
        return
    options = scripts.load_options(args)
    pipe = scripts.load(source, options | {"device": process.device(args.device)})
    applied: Any = contextlib.nullcontext()
    if args.method != "dense":
        applied = diffpatch.patched(pipe, args.method, **parameters)
    with applied:
        for number, prompt, index in missing:
            arguments = fitted_call(call, pipe) | {"prompt": prompt}
            frames = sampling.sample(pipe, arguments, args.seed + number).frames
            with files.staged(args.output) as stage:
                path = stage / vbench.file_name(prompt, index)
                media.save(media.to_images(frames), path, args.fps or frames_per_second(source))
            scripts.say(path.name)


def read(args: argparse.Namespace) -> None:
    """Print the scores of every result side by side."""
    results = [vbench.read_result([path]) for path in args.results]
    names = [path.name.removesuffix("_eval_results.json") for path in args.results]
    if args.json:
        print(files.to_json(dict(zip(names, results, strict=True))), end="")
        return
    print(scripts.vbench_table(dict(zip(names, results, strict=True))))


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run one of the two commands."""
    parser = scripts.Parser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("render", help="make the videos")
    first.add_argument("prompts", type=Path, help="all_dimension.txt or VBench_full_info.json")
    first.add_argument("-o", "--output", type=Path, required=True, help="folder of the videos")
    first.add_argument("--method", default="dense", help="of diffpatch (dense)")
    first.add_argument("--set", action="append", default=[], help="its parameters, key=value")
    first.add_argument("--samples", type=int, default=vbench.SAMPLES, help="videos a prompt (5)")
    first.add_argument("--fps", type=float, help="frames per second")
    scripts.add_model_options(first)
    scripts.add_generation_options(first)
    first.set_defaults(run=render)
    second = commands.add_parser("read", help="show the scores")
    second.add_argument("results", nargs="+", type=Path, help="*_eval_results.json of VBench")
    second.add_argument("--json", action="store_true", help="print JSON")
    second.set_defaults(run=read)
    try:
        args = parser.parse_args(argv)
        scripts.hush_libraries()
        args.run(args)
    except (scripts.UsageError, diffpatch.DiffpatchError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
