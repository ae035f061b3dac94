"""`diffpatch sweep`: methods × parameters × prompts × seeds, and a report of what to pick."""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path
from typing import Any

from diffpatch.cli import progress
from diffpatch.cli.errors import UsageError
from diffpatch.eval.files import to_json

EXAMPLES = """\
keys of SWEEP.yaml; prompts and methods are needed, lists are axes:
  title             heads the report
  model             one or several, as for render (demo)
  dtype, offload, vae_tiling    as for render
  prompts           texts, or {prompt: TEXT, image: FILE}; prompt_file: a line each
  seeds             (0)
  sizes             {height: …, width: …, num_frames: …}
  steps             denoising steps
  call              other arguments of the pipeline's call
  schedules         {dense_steps: …, dense_layers: …, dense_last_steps: …}
  methods           names, or {method: NAME, set: {…}, vary: {KEY: [VALUES]}, and for this one
                    method dense_steps, dense_layers, dense_last_steps, backend, kept}
  kept              fractions of the pairs, such as [0.5, 0.25], that methods are fitted to
  noise_floor       dense beside itself: [kernel, seed] unless said otherwise
  attention_error   for how many prompts attention outputs are compared with dense (0)
  dense_every       dense is timed anew after so many runs (8; 0 never)
  bar               quality that a pick must have ({psnr: 25}); also ssim, caption_accuracy,
                    clip_score
  networks          {clip: …, features: …, lpips: …}, as for eval

examples:
  diffpatch sweep examples/demo_sweep.yaml -o runs/demo
  diffpatch sweep examples/demo_sweep.yaml -o runs/demo     # goes on where it was stopped
  diffpatch sweep examples/demo_sweep.yaml --dry-run
  diffpatch sweep --report-only runs/demo
  accelerate launch --num_processes 8 -m diffpatch sweep my_sweep.yaml -o runs/mine
"""


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "sweep",
        help="compare methods, parameters and kept fractions, with a report",
        description="Render prompts dense and with many methods, and write report.html,\n"
        "summary.md, summary.csv and summary.json. Stopped at any moment, the same command goes\n"
        "on; several processes may share the work (accelerate launch, or several terminals).",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "what", type=Path, metavar="SWEEP.yaml",
        help="what to sweep; with --report-only the folder of an earlier sweep",
    )  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, default=Path("runs"), help="folder (runs)")
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


def run(args: argparse.Namespace) -> int:
    """Sweep and report; returns the exit code: 1 if runs have failed."""
    started = time.time()
    if args.report_only:
        if not (args.what / "sweep.json").is_file():
            raise UsageError(f"{args.what} is no folder of a sweep: it has no sweep.json")
        return _report(args, args.what)
    from diffpatch.eval.sweep.plan import describe_plan, plan_sweep
    from diffpatch.eval.sweep.spec import read_spec

    spec = read_spec(args.what)
    progress.hush_libraries()
    plan = plan_sweep(spec)
    if args.dry_run:
        print(describe_plan(plan, args.output))
        return 0
    from diffpatch.eval.processes import Process
    from diffpatch.eval.sweep.drive import run_sweep
    from diffpatch.eval.sweep.store import Store

    process = Process.current()
    store = Store(args.output)
    if args.retry_failed:
        store.forget_failures(before=started)
    try:
        say = functools.partial(progress.say, quiet=args.quiet)
        run_sweep(spec, plan, store, process, say, device=args.device, rescore=args.rescore)
        if process.rank:  # the first process waits for all runs, and reports
            return 0
        with store.alone():
            return _report(args, args.output)
    finally:
        store.close()


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
