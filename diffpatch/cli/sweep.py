"""`diffpatch sweep`: methods × parameters × prompts × seeds, and a report of what to pick."""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpatch.cli import arguments, progress
from diffpatch.cli.errors import UsageError
from diffpatch.files import to_json
from diffpatch.pipelines.running import loading
from diffpatch.pipelines.running.calls import preset_call
from diffpatch.pipelines.running.loading import DTYPES, OFFLOADS

if TYPE_CHECKING:
    from diffpatch.eval.sweep.plan import Rendering
    from diffpatch.eval.sweep.spec import SweepSpec

EXAMPLES = """\
keys of SWEEP.yaml; prompts and methods are needed, lists are axes:
  title             heads the report
  model             one or several, as for render (demo)
  dtype, offload, vae_tiling    as for render
  prompts           texts, or {prompt: TEXT, image: FILE}; prompt_file: a line each
  seeds             (0); seeds_in_turn: true gives each prompt one of them
  sizes             {height: …, width: …, num_frames: …}
  steps             denoising steps
  call              other arguments of the pipeline's call
  schedules         {dense_steps: …, dense_layers: …, dense_last_steps: …}
  methods           names, or {method: NAME, set: {…}, vary: {KEY: [VALUES]}, and for this one
                    method dense_steps, dense_layers, dense_last_steps, backend, kept, cache
                    (thresholds of a step cache)}, or {settings: FILE, target: [TARGETS]} of
                    `diffpatch tune`
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
  diffpatch sweep examples/demo_sweep.yaml -o runs/demo     # goes on where it was stopped
  diffpatch sweep examples/demo_sweep.yaml --dry-run
  diffpatch sweep --report-only runs/demo
  accelerate launch --num_processes 8 -m diffpatch sweep my_sweep.yaml -o runs/mine
"""
MINUTES = 15.0  # of a sweep without a file
_SIZES = ("height", "width", "num_frames")
_OWN = ("prompt", "image", "height", "width", "num_frames", "num_inference_steps", "kept")


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "sweep",
        help="which method makes a model faster, and what it costs: a report and a card",
        description="Render prompts dense and with many methods, and say which one to use: with\n"
        "-m MODEL -p PROMPT those that suit the model, or what a YAML file describes. Writes\n"
        "report.html, card.png, summary.md, summary.csv and summary.json. Stopped at any moment,\n"
        "the same command goes on; several processes may share the work.",
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
        help=f"begin no run that would not end by then (without a file {MINUTES:g})",
    )  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda, … (the accelerator, if there is one)")
    parser.add_argument("--dry-run", action="store_true", help="check and list the runs")
    parser.add_argument(
        "--retry-failed", action="store_true", help="try again what failed in earlier starts"
    )
    parser.add_argument(
        "--report-only", action="store_true", help="only write the reports of a folder anew"
    )
    parser.add_argument(
        "--rescore", action="store_true", help="compute the metrics anew from the stored frames"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run)


def _add_own(parser: argparse.ArgumentParser) -> None:
    """What replaces a file."""
    group = parser.add_argument_group("without a file")
    group.add_argument("-m", "--model", help=f"{arguments.MODEL_HELP} (demo)")
    group.add_argument("-p", "--prompt", action="append", default=[], help="text, repeatable")
    group.add_argument("--image", type=arguments.existing_file, help="first frame")
    for name in ("--height", "--width", "--num-frames"):
        group.add_argument(name, type=arguments.number(int, 1), help="(the model's own)")
    group.add_argument(
        "--num-inference-steps", "--steps", type=arguments.number(int, 1),
        help="denoising steps (the model's own)",
    )  # fmt: skip
    group.add_argument(
        "--kept", nargs="+", type=arguments.fraction, metavar="F",
        help="fractions of the pairs that methods are fitted to (0.5 0.25)",
    )  # fmt: skip
    group.add_argument("--dtype", choices=("auto", *DTYPES), help="of the weights (auto)")
    group.add_argument("--offload", choices=OFFLOADS, help="weights that wait in main memory")


def run(args: argparse.Namespace) -> int:
    """Sweep and report; returns the exit code: 1 if runs have failed."""
    started = time.time()
    if args.report_only:
        if args.what is None or not (args.what / "sweep.json").is_file():
            raise UsageError(f"{args.what} is not the folder of a sweep: it has no sweep.json")
        return _report(args, args.what)
    from diffpatch.eval.sweep.plan import describe_plan, plan_sweep

    progress.hush_libraries()
    spec, own = _spec(args)
    plan = plan_sweep(spec)
    _check(plan, args)
    if args.dry_run:
        print(describe_plan(plan, args.output))
        return 0
    from diffpatch.eval.processes import Process
    from diffpatch.eval.sweep.drive import run_sweep
    from diffpatch.eval.sweep.quick import keep_file
    from diffpatch.eval.sweep.store import Store

    process = Process.current()
    store = Store(args.output)
    if own is not None:
        keep_file(own, args.output)
    if args.retry_failed:
        store.forget_failures(before=started)
    minutes = args.minutes if own is None or args.minutes is not None else MINUTES
    try:
        say = functools.partial(progress.say, quiet=args.quiet)
        run_sweep(
            spec, plan, store, process, say,
            device=args.device, rescore=args.rescore, minutes=minutes,
        )  # fmt: skip
        if process.rank:  # the first process waits for all runs, and reports
            return 0
        with store.alone():
            return _report(args, args.output)
    finally:
        store.close()


def _check(plan: Mapping[str, Sequence[Rendering]], args: argparse.Namespace) -> None:
    """Refuse sizes that a model cannot make, and a folder that cannot be written to."""
    from diffpatch.cli import generation
    from diffpatch.cli.output import check_writable

    for model, runs in plan.items():
        source = loading.find(model)
        for sizes in {tuple(run.case.call.get(name) for name in _SIZES) for run in runs}:
            call = {name: size for name, size in zip(_SIZES, sizes, strict=True) if size}
            generation.check_size(source, {**preset_call(source), **call})
    check_writable(args.output)


def _spec(args: argparse.Namespace) -> tuple[SweepSpec, dict[str, Any] | None]:
    """What to sweep: a file, or the model and prompts given, and then what a file would hold."""
    from diffpatch.eval.sweep.quick import quick_sweep
    from diffpatch.eval.sweep.spec import check_spec, read_spec

    given = [name for name in (*_OWN, "model", "dtype", "offload") if getattr(args, name)]
    if args.what is not None:
        if given:
            option = "--" + given[0].replace("_", "-")
            raise UsageError(f"{option} is for a sweep without a file; write it into {args.what}")
        return read_spec(args.what), None
    if not args.prompt:
        raise UsageError("nothing to sweep: give SWEEP.yaml, or --model MODEL --prompt TEXT")
    call = {name: getattr(args, name) for name in _OWN[2:6] if getattr(args, name)}
    more = {name: getattr(args, name) for name in ("dtype", "offload") if getattr(args, name)}
    if args.kept:
        more["kept"] = args.kept
    source = loading.find(args.model or "demo")
    own = quick_sweep(source, args.prompt, image=args.image, call=call, **more)
    return check_spec(own, Path.cwd()), own


def _report(args: argparse.Namespace, folder: Path) -> int:
    """Write every report and show the table; returns the exit code."""
    from diffpatch.eval.sweep.report.files import write_reports
    from diffpatch.eval.sweep.report.summary import summarize

    if args.rescore:
        from diffpatch.eval.sweep.scores import rescore

        count = rescore(folder)
        progress.say(f"scored {count} runs anew", args.quiet)
    summary = summarize(folder)
    files = write_reports(summary, folder)
    if args.json:
        print(to_json(summary.to_dict()), end="")
    else:
        from diffpatch.eval.sweep.report.files import describe

        print(describe(summary))
        for path in files:
            print(f"wrote {path}")
    for failure in summary.failures:
        progress.say(f"failed: {failure['label']}: {failure['error']}", args.quiet)
    if summary.failures:
        progress.say(
            f"{len(summary.failures)} runs failed; {folder / 'failed'} says why, "
            "--retry-failed tries them again"
        )
    return 1 if summary.failures else 0
