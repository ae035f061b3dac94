"""`diffpatch bench model`: one step of a model of published size, without its weights."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from diffpatch.cli import output, progress
from diffpatch.cli.bench.output import chosen, finish, times
from diffpatch.cli.errors import RunError, UsageError
from diffpatch.patching.options.settle import AUTO
from diffpatch.pipelines.running import loading
from diffpatch.pipelines.shapes import table as shapes


def run(args: argparse.Namespace) -> int:
    """Measure one forward of a model; returns the exit code."""
    from diffpatch.eval.bench.checking import WrongResult
    from diffpatch.eval.bench.model import ModelCase, bench_model

    output.check_file(args.json)
    shape = shapes.shape_of(args.model)
    methods = chosen(args, AUTO[shape.kind])
    device = loading.choose_device(args.device)
    if shape.kind == "image" and args.num_frames not in (None, 1):
        raise UsageError(f"{shape.name} makes images; drop --num-frames")
    frames = 1 if shape.kind == "image" else args.num_frames or shape.frames_up_to(81)
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
