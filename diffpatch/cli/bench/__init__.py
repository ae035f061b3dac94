"""`diffpatch bench`: how fast an attention call, a rendering, a model or a kernel is here."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import diffpatch
from diffpatch.cli import generation, progress
from diffpatch.cli.bench.output import chosen, finish, times
from diffpatch.cli.errors import RunError
from diffpatch.cli.options import arguments
from diffpatch.cli.output import check_file
from diffpatch.pipelines.running import loading
from diffpatch.pipelines.running.calls import fitted_call, steps_of

__all__ = ["chosen", "run_attention", "run_render"]  # other commands choose methods in the same way


def run_attention(args: argparse.Namespace) -> int:
    """Measure one attention call; returns the exit code."""
    from diffpatch.eval.bench.attention import bench_attention
    from diffpatch.eval.bench.case import AttentionCase
    from diffpatch.eval.bench.checking import WrongResult

    check_file(args.json)
    found = chosen(args)
    made = {name: diffpatch.make_method(name, **values) for name, values in found.items()}
    case = AttentionCase(
        grid=dataclasses.replace(args.grid, text_after=args.text),
        heads=args.heads,
        head_dim=args.head_dim,
        batch=args.batch,
        dtype=loading.DTYPES[args.dtype],
        device=str(loading.choose_device(args.device)),
    )
    progress.say(f"measuring {case.grid.num_tokens} tokens", args.quiet)
    try:
        result = bench_attention(case, made, repeats=args.repeats, backend=args.backend)
    except WrongResult as error:
        raise RunError(str(error)) from error
    rows = [["method", "median", "quartiles", "of dense", "speedup", "kept", "error"]]
    dense = result["dense"]
    rows.append(
        [f"dense ({dense['backend'].lower()})", *times(dense["seconds"]), "1.000", "", "", ""]
    )
    for entry in result["methods"]:
        gain = entry["speedup"]["median"]
        last = [f"{1 / gain:.3f}", f"{gain:.2f}×", f"{entry['kept']:.1%}", f"{entry['error']:.0e}"]
        rows.append([entry["name"], *times(entry["seconds"]), *last])
    finish(args, result, rows)
    return 0


def run_render(args: argparse.Namespace) -> int:
    """Measure a whole pipeline call; returns the exit code."""
    from diffpatch.eval.bench.render import bench_render

    check_file(args.json)
    shared = arguments.method_options(args)
    progress.hush_libraries()
    source = loading.find(args.model)
    methods = chosen(args, generation.method_for("auto", source))
    call = generation.call_arguments(args, source)
    generation.check_dense_steps(shared, steps_of(call, source))
    pipe = generation.load(source, generation.load_options(args))
    result = bench_render(
        pipe,
        fitted_call(call, pipe) | {"prompt": args.prompt},
        {name: shared | values for name, values in methods.items()},
        repeats=args.repeats,
        seed=args.seed,
        say=lambda text: progress.say(text, args.quiet),
    )
    result = {"model": args.model, "dtype": str(pipe.dtype).removeprefix("torch."), **result}
    rows = [["method", "step", "denoising", "total", "speedup", "(total)", "kept", "PSNR", "SSIM"]]
    rows += [_render_row(name, entry) for name, entry in result["variants"].items()]
    finish(args, result, rows)
    return 0


def _render_row(name: str, entry: dict[str, Any]) -> list[str]:
    seconds, gains = entry["seconds"], entry["speedup"]

    def show(values: dict[str, Any], key: str, unit: str) -> str:
        return f"{values[key]['median']:.2f}{unit}" if key in values else "-"

    return [
        name,
        *(show(seconds, key, " s") for key in ("step_median", "denoising", "total")),
        show(gains, "denoising", "×"),
        show(gains, "total", "×"),
        f"{entry['kept']:.1%}",
        f"{entry['psnr']:.1f}",
        f"{entry['ssim']:.3f}",
    ]
