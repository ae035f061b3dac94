"""`diffpatch bench model`: one step of a model of published size, without its weights."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from diffpatch.cli import arguments, progress
from diffpatch.cli.bench.output import add_common, chosen, finish, times
from diffpatch.cli.errors import RunError, UsageError
from diffpatch.patching.options.settle import AUTO
from diffpatch.pipelines.running import loading
from diffpatch.pipelines.shapes import table as shapes

EXAMPLES = """\
examples:
  diffpatch bench model --model wan-14b --height 720 --width 1280 --num-frames 81 --kept 0.2 \\
      --method radial --method neighborhood --json wan-14b.json
  diffpatch bench model --model flux --height 2048 --width 2048 --method neighborhood --layers 8
"""


def add_parser(kinds: Any) -> None:
    """Add the command to `diffpatch bench`."""
    parser = kinds.add_parser(
        "model",
        help="one step of a model of published size, with random weights",
        description="Time one forward of a transformer of published size with random weights,\n"
        "which needs no checkpoint: dense and with each method in turns, after checking results.",
        epilog=EXAMPLES,
    )
    count = arguments.number(int, 1)
    names = [shape.name for shape in shapes.MODELS]
    parser.add_argument("-m", "--model", choices=names, default="wan-1.3b", help="(wan-1.3b)")
    parser.add_argument("--height", type=count, default=480, help="in pixels (480)")
    parser.add_argument("--width", type=count, default=832, help="in pixels (832)")
    parser.add_argument("--num-frames", type=count, help="of a video (about 80; 1 for images)")
    parser.add_argument("--layers", type=count, help="time fewer layers than the model has")
    parser.add_argument("--batch", type=count, default=1, help="samples in the forward (1)")
    parser.add_argument(
        "--kept", type=arguments.fraction, help="fit every method to this share of the pairs"
    )
    parser.add_argument("--dtype", choices=tuple(loading.DTYPES), help="(bf16; on the CPU fp32)")
    parser.add_argument("--device", help="cpu, cuda, … (the accelerator, if there is one)")
    arguments.add_backend_option(parser)
    add_common(parser, repeats=5)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure one forward of a model; returns the exit code."""
    from diffpatch.eval.bench.checking import WrongResult
    from diffpatch.eval.bench.model import ModelCase, bench_model

    shape = shapes.shape_of(args.model)
    methods = chosen(args, AUTO[shape.kind])
    device = loading.choose_device(args.device)
    if shape.kind == "image" and args.num_frames not in (None, 1):
        raise UsageError(f"{shape.name} makes images; drop --num-frames")
    frames = 1 if shape.kind == "image" else args.num_frames or 80 // shape.time * shape.time + 1
    dtype = loading.DTYPES[args.dtype] if args.dtype else loading.default_dtype(device)
    case = ModelCase(shape, frames, args.height, args.width, args.layers, args.batch, dtype, device)
    progress.hush_libraries()
    try:
        result = bench_model(
            case,
            methods,
            kept=args.kept,
            backend=args.backend,
            repeats=args.repeats,
            say=lambda text: progress.say(text, args.quiet),
        )
    except WrongResult as error:
        raise RunError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise RunError(f"out of memory; time fewer --layers or a smaller size ({error})") from error
    finish(args, result, _rows(result))
    return 0


def _rows(result: dict[str, Any]) -> list[list[str]]:
    rows = [["method", "median", "quartiles", "of dense", "speedup", "kept", "error", "GiB"]]
    dense = result["dense"]
    name = f"dense ({dense['attention'].lower()})"
    rows.append([name, *times(dense["seconds"]), "1.000", "", "", "", _gib(dense)])
    rows.append(["a patch, all kept", "", "", f"{result['overhead']['median']:.3f}", "", "100.0%"])
    for name, entry in result["methods"].items():
        gain = entry["speedup"]["median"]
        last = [f"{1 / gain:.3f}", f"{gain:.2f}×", f"{entry['kept']:.1%}", f"{entry['error']:.0e}"]
        rows.append([name, *times(entry["seconds"]), *last, _gib(entry)])
    return rows


def _gib(entry: dict[str, Any]) -> str:
    return "" if entry["peak_gib"] is None else f"{entry['peak_gib']:.1f}"
