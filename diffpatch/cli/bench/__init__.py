"""`diffpatch bench`: how fast an attention call, a rendering, a model or a kernel is here."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import diffpatch
from diffpatch.cli import arguments, generation, progress
from diffpatch.cli.bench import kernels as bench_kernels
from diffpatch.cli.bench import model as bench_model
from diffpatch.cli.bench import profile as bench_profile
from diffpatch.cli.bench.output import add_common, chosen, finish, times
from diffpatch.cli.errors import RunError
from diffpatch.pipelines.running import loading
from diffpatch.pipelines.running.calls import fitted_call, steps_of

__all__ = ["add_parser", "chosen"]  # other commands choose methods in the same way

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
    bench_model.add_parser(kinds)
    bench_profile.add_parser(kinds)
    bench_kernels.add_parser(kinds)


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
    add_common(parser, repeats=5)
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
    add_common(parser, repeats=3)
    parser.set_defaults(run=run_render)


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


def run_attention(args: argparse.Namespace) -> int:
    """Measure one attention call; returns the exit code."""
    from diffpatch.eval.bench.attention import bench_attention
    from diffpatch.eval.bench.case import AttentionCase
    from diffpatch.eval.bench.checking import WrongResult

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
