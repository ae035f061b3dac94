"""`diffpatch bench`: how fast one attention call, a whole rendering, or a kernel is here."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffpatch
from diffpatch.cli import arguments, generation, output, progress
from diffpatch.cli.errors import RunError, UsageError
from diffpatch.cli.parameters import field_names, method_parameters
from diffpatch.cli.summary import table
from diffpatch.pipelines import loading

EXAMPLES = """\
examples:
  diffpatch bench attention --grid 33x16x16 --method radial
  diffpatch bench attention --grid 21x45x80 --heads 12 --head-dim 128 --dtype bf16 \\
      --method radial --method neighborhood --json bench.json
  diffpatch bench render --model demo-long --method radial --repeats 3
  diffpatch bench kernels --help
"""
PROMPT = "a large red circle moves left over a black background"


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "bench",
        help="measure speed",
        description="Measure speed against the fastest dense attention on this machine.\n"
        "Wrong results are an error, never a speedup.",
        epilog=EXAMPLES,
    )
    kinds = parser.add_subparsers(title="what to measure", metavar="WHAT", required=True)
    _add_attention(kinds)
    _add_render(kinds)
    kernels = kinds.add_parser("kernels", help="the kernels alone", add_help=False)
    kernels.passes_on = True
    kernels.set_defaults(run=run_kernels)


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
    parser.add_argument("--dtype", choices=tuple(loading.DTYPES), default="fp32", help="(fp32)")
    parser.add_argument("--device", help="cpu, cuda, … (the accelerator, if there is one)")
    arguments.add_backend_option(parser)
    _add_common(parser, repeats=5)
    parser.set_defaults(run=run_attention)


def _add_render(kinds: Any) -> None:
    parser = kinds.add_parser(
        "render",
        help="a whole pipeline call, dense and with each method",
        description="Time whole pipeline calls, dense and with each method in turns.",
        epilog=EXAMPLES,
    )
    parser.add_argument("-p", "--prompt", default=PROMPT, help="what to render")
    arguments.add_model_options(parser)
    arguments.add_generation_options(parser)
    arguments.add_method_options(parser)
    _add_common(parser, repeats=3)
    parser.set_defaults(run=run_render)


def _add_common(parser: argparse.ArgumentParser, repeats: int) -> None:
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


def grid(text: str) -> diffpatch.TokenGrid:
    """33x16x16 as a grid."""
    try:
        frames, height, width = (int(part) for part in text.lower().replace("×", "x").split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be frames×height×width, such as 33x16x16"
        ) from None
    try:
        return diffpatch.TokenGrid(frames, height, width)
    except diffpatch.DiffpatchError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def chosen(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The methods asked for, each with those --set parameters that it has."""
    known, found, used = diffpatch.methods(), {}, set()
    for name in args.method or ["radial"]:
        parts = [known[part].cls for part in name.split("+") if part in known]
        fields = {field for cls in parts for field in field_names(cls)}
        own = [text for text in args.set if text.partition("=")[0].replace("-", "_") in fields]
        found[name] = method_parameters(name, own)
        used |= set(own)
    for text in args.set:
        if text not in used:
            raise UsageError(f"--set {text}: {' and '.join(found)} have no such parameter")
    return found


def run_attention(args: argparse.Namespace) -> int:
    """Measure one attention call; returns the exit code."""
    from diffpatch.eval.bench_attention import Case, WrongResult, bench_attention

    found = chosen(args)
    made = {name: diffpatch.make_method(name, **values) for name, values in found.items()}
    case = Case(
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
        [f"dense ({dense['backend'].lower()})", *_times(dense["seconds"]), "1.000", "", "", ""]
    )
    for entry in result["methods"]:
        gain = entry["speedup"]["median"]
        last = [f"{1 / gain:.3f}", f"{gain:.2f}×", f"{entry['kept']:.1%}", f"{entry['error']:.0e}"]
        rows.append([entry["name"], *_times(entry["seconds"]), *last])
    _finish(args, result, rows)
    return 0


def run_render(args: argparse.Namespace) -> int:
    """Measure a whole pipeline call; returns the exit code."""
    from diffpatch.eval.bench_render import bench_render

    methods = chosen(args)
    shared = {n: getattr(args, n) for n in _SHARED}
    progress.hush_libraries()
    source = loading.find(args.model)
    call = generation.call_arguments(args, source)
    generation.check_dense_steps(args, generation.steps_of(call, source))
    pipe = loading.load_pipeline(
        source,
        dtype=loading.DTYPES.get(args.dtype),
        device=args.device,
        offload=args.offload,
        vae_tiling=args.vae_tiling,
        compile=args.compile,
    )
    pipe.set_progress_bar_config(disable=True)
    result = bench_render(
        pipe,
        generation.fit(call, pipe) | {"prompt": args.prompt},
        {name: shared | values for name, values in methods.items()},
        repeats=args.repeats,
        seed=args.seed,
        say=lambda text: progress.say(text, args.quiet),
    )
    result = {"model": args.model, "dtype": str(pipe.dtype).removeprefix("torch."), **result}
    rows = [["method", "step", "denoising", "total", "speedup", "(total)", "kept", "PSNR", "SSIM"]]
    rows += [_render_row(name, entry) for name, entry in result["variants"].items()]
    _finish(args, result, rows)
    return 0


def run_kernels(args: argparse.Namespace) -> int:
    """Hand over to the kernel benchmark; returns the exit code."""
    bench_kernels = importlib.import_module("diffpatch.eval.bench_kernels")
    return int(bench_kernels.main(args.rest) or 0)


_SHARED = ("quality", "dense_steps", "dense_layers", "dense_last_steps", "backend")


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


def _times(seconds: dict[str, float]) -> list[str]:
    low, high = seconds["low"] * 1e3, seconds["high"] * 1e3
    return [f"{seconds['median'] * 1e3:.2f} ms", f"{low:.2f}-{high:.2f}"]


def _finish(
    args: argparse.Namespace, result: dict[str, Any], rows: Sequence[Sequence[str]]
) -> None:
    """The table on stdout, the JSON where it was asked for."""
    if args.json == "-":
        print(output.to_json(result), end="")
        return
    print(table(rows))
    environment = result["environment"]
    print(f"{environment['device']}, {environment['threads']} threads, "
          f"torch {environment['versions']['torch']}")  # fmt: skip
    if args.json is not None:
        output.write_text(Path(args.json), output.to_json(result))
        print(f"wrote {args.json}")
