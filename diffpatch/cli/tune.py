"""`diffpatch tune`: what a quality costs on your model, found out once and kept in a file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffpatch
from diffpatch.cli import generation, output, progress
from diffpatch.cli.errors import UsageError
from diffpatch.eval.tuned.page import page
from diffpatch.eval.tuned.plot import front_svg
from diffpatch.eval.tuned.table import Answer, answer, describe
from diffpatch.files import write_text
from diffpatch.pipelines.running import loading, sampling
from diffpatch.pipelines.running.calls import fitted_call, steps_of
from diffpatch.targets.settings import Settings
from diffpatch.targets.target import Target
from diffpatch.tuning.cost import Cost, cost
from diffpatch.tuning.front import CACHES, Advance, check_prompts, measure_front
from diffpatch.tuning.tuned import finished
from diffpatch.tuning.unfinished import digest_of


def run(args: argparse.Namespace) -> int:
    """Tune, render the front, check and report; returns the exit code."""
    wanted = str(Target.parse(args.target))  # what is not a target is said before any work
    prompts = list(dict.fromkeys(generation.prompts(args)))
    held = prompts[len(prompts) - args.hold_out :] if args.hold_out else []
    own = prompts[: len(prompts) - len(held)]
    if not own:
        raise UsageError(f"--hold-out {args.hold_out} leaves none of the {len(prompts)} prompts")
    if args.output.suffix != ".json":
        raise UsageError(f"-o {args.output} must be a file that ends in .json")
    files = [args.output.with_suffix(suffix) for suffix in (".json", ".html", ".svg")]
    output.check_free(files, args.overwrite)
    output.check_writable(args.output.absolute().parent)
    progress.hush_libraries()
    source = loading.find(args.model)
    call = generation.call_arguments(args, source)
    pipe = generation.load(source, generation.load_options(args))
    call = fitted_call(call, pipe)
    rendered = own[: args.render]
    say_cost(pipe, args, call, steps_of(call, source) or 50, len(own), len(rendered), len(held))
    settings = _measure(pipe, args, call, own, rendered, held, wanted)
    found = answer(settings, wanted)
    files = write_reports(settings, args.output, found)
    if args.json:
        print(settings.model_dump_json(indent=1))
    else:
        print(describe(settings, found))
        for path in (args.output, *files):
            print(f"wrote {path}")
        print(f'use it: diffpatch.patch(pipe, settings="{args.output}", target="{wanted}")')
    return 0


def say_cost(
    pipe: Any, args: argparse.Namespace, call: dict[str, Any], steps: int, own: int, rendered: int,
    held: int,
) -> None:  # fmt: skip
    """How long it will take and what it needs, by two steps of the model."""
    caches = CACHES if args.caches is None else args.caches
    skips = len(set(caches)) + len(set(args.holds))
    probe = {**call, "prompt": "a test", "num_inference_steps": 2}
    progress.say("timing two steps", args.quiet)
    known = cost(
        sampling.sample(pipe, probe, args.seed), steps, curves=own, fronts=rendered, checks=held,
        ways=(1 + len(set(args.kept)) * len(set(args.dense_steps))) * (1 + skips) - 1,
    )  # fmt: skip
    progress.say(told(known), args.quiet)


def told(known: Cost) -> str:
    """The cost as a sentence."""
    return (
        f"this takes about {progress.span(known.seconds)}, the time of {known.dense_runs:.1f} dense"
        f" runs, and at most {known.extra_bytes / 2**20:,.0f} MiB beside a dense run"
    )


def _measure(
    pipe: Any, args: argparse.Namespace, call: dict[str, Any], own: Sequence[str],
    rendered: Sequence[str], held: Sequence[str], target: str,
) -> Settings:  # fmt: skip
    path: Path = args.output
    # Every stage has a file of its own until the last is done, named by what decides it.
    ties = [type(pipe).__name__, args.model, str(pipe.dtype), call, args.seed, own]
    curves = _stage(path, "curves", [*ties, args.curve_steps])
    ways = [args.kept, args.dense_steps, args.caches, args.holds]
    front = _stage(path, "front", [*ties, args.curve_steps, rendered, *ways])

    def prompt_done(prompt: str, done: int, of: int) -> None:
        progress.say(f"curves {done} of {of}: {prompt}", args.quiet)

    def begins(at: Advance) -> None:
        left = "" if at.left is None else f", {progress.span(at.left)} left"
        progress.say(f"clip {at.done + 1} of {at.units}{left}: {at.what}", args.quiet)

    settings = finished(curves)
    if settings is None:
        fewer = {} if args.curve_steps is None else {"num_inference_steps": args.curve_steps}
        settings = diffpatch.tune(
            pipe, own, call=call | fewer, seed=args.seed, pairs=0, path=curves,
            on_progress=prompt_done,
        )  # fmt: skip
    if (known := finished(front)) is not None:
        settings = known
    elif args.kept or args.caches != [] or args.holds:
        settings = measure_front(
            pipe, settings, rendered, call=call, seed=args.seed, sparse=args.kept,
            dense_steps=args.dense_steps, caches=args.caches, holds=args.holds, path=front,
            on_progress=begins,
        )  # fmt: skip
    if held and answer(settings, target).chosen is not None:
        settings = check_prompts(
            pipe, settings, target, held, call=call, seed=args.seed, path=path, on_progress=begins
        )
    settings.save(path)
    for stage in (curves, front):
        stage.unlink(missing_ok=True)
    return settings


def _stage(path: Path, name: str, ties: list[Any]) -> Path:
    """Where a stage is kept until the whole is done."""
    return path.with_name(f"{path.stem}.{name}-{digest_of(*ties)[:10]}.json")


def write_reports(settings: Settings, path: Path, found: Answer) -> list[Path]:
    """The page, and the picture of the front where there is one, beside the settings."""
    files = [path.with_suffix(".html")]
    write_text(files[0], page(settings, found))
    if settings.front:
        files.append(path.with_suffix(".svg"))
        write_text(files[1], front_svg(settings, found))
    return files
