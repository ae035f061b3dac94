"""`diffpatch sweep`: methods × parameters × prompts × seeds, and a report of what to pick."""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpatch.cli import progress
from diffpatch.cli.errors import UsageError
from diffpatch.cli.options.sweep import MINUTES
from diffpatch.files import to_json
from diffpatch.pipelines.running import loading
from diffpatch.pipelines.running.calls import preset_call

if TYPE_CHECKING:
    from diffpatch.eval.sweep.plan import Rendering
    from diffpatch.eval.sweep.spec import SweepSpec

_SIZES = ("height", "width", "num_frames")
_OWN = ("prompt", "image", "height", "width", "num_frames", "num_inference_steps", "kept")


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
        for sizes in {tuple(run.scene.call.get(name) for name in _SIZES) for run in runs}:
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
