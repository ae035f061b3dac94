"""A rendering as asked for, checked as far as possible before any weights are loaded."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffpatch import patched
from diffpatch.cli import generation, output
from diffpatch.cli.errors import UsageError
from diffpatch.cli.options import arguments
from diffpatch.cli.parameters import method_parameters
from diffpatch.cli.render import sheets
from diffpatch.cli.render.resume import is_finished
from diffpatch.eval.processes import Process
from diffpatch.pipelines.running import loading
from diffpatch.pipelines.running.calls import frames_per_second, settings_of, steps_of
from diffpatch.tables import table
from diffpatch.targets.settings import Settings
from diffpatch.tuning.unfinished import digest_of

TUNED = "tuned"  # the name of what settings choose
HELD = "held"  # and of dense attention in a run that holds steps


@dataclass(frozen=True)
class RenderVariant:
    """One way to run the pipeline: a method with its options, or dense."""

    name: str
    options: dict[str, Any]

    @property
    def is_dense(self) -> bool:
        return self.name == "dense"

    def applied(self, pipe: Any, **changes: Any) -> contextlib.AbstractContextManager[Any]:
        """The pipeline patched for the length of a with block; as it is for dense."""
        if self.is_dense:
            return contextlib.nullcontext(pipe)
        if self.name == HELD:
            return patched(pipe, "dense", dense_steps=0, dense_layers=0, **self.options)
        if self.name == TUNED:
            return patched(pipe, **self.options | changes)
        return patched(pipe, self.name, **self.options | changes)


@dataclass(frozen=True)
class Job:
    """Everything a rendering needs besides the pipeline itself.

    Attributes:
        source: the pipeline, found but not loaded.
        load: how it is loaded, as `load_pipeline` takes it.
        variants: dense first, if it is asked for.
        prompts: those of this process.
        call: every other argument of the pipeline's call.
        seed: of the noise.
        steps: denoising steps; None if the pipeline does not tell.
        fps: of the clips.
        format: of the files.
        folders: one a prompt.
        quiet: whether nothing is told while it works.
        strength: of the second of two stages; None for one stage.
        first: height and width of the first of two, in pixels.
    """

    source: loading.Source
    load: Mapping[str, Any]
    variants: list[RenderVariant]
    prompts: list[str]
    call: dict[str, Any]
    seed: int
    steps: int | None
    fps: float
    format: str
    folders: list[Path]
    quiet: bool = False
    strength: float | None = None
    first: tuple[int, int] | None = None

    @property
    def compiled(self) -> bool:
        """Whether the denoiser is compiled."""
        return bool(self.load["compile"])

    def only(self, which: Sequence[int]) -> Job:
        """The same for some of its prompts."""
        prompts, folders = [self.prompts[i] for i in which], [self.folders[i] for i in which]
        return dataclasses.replace(self, prompts=prompts, folders=folders)

    def files(self, folder: Path) -> dict[str, Path]:
        """What is written for one prompt."""
        video = self.source.is_video
        stems = {v.name: v.name.replace("+", "_") for v in self.variants}
        names = {name: sheets.file_name(stem, self.format, video) for name, stem in stems.items()}
        if len(self.variants) > 1:
            pair = f"{stems[self.variants[-1].name]}_vs_dense"
            names["side_by_side"] = sheets.file_name(pair, self.format, video)
            names["card"] = "card.png"
            names["page"] = "index.html"
            if video:
                names["contact_sheet"] = f"{pair}.png"
                names["moving_card"] = "card.webp"
        names["result"] = "render.json"
        return {key: folder / name for key, name in names.items()}


def check_variants(args: argparse.Namespace, source: loading.Source) -> list[RenderVariant]:
    """What to run, in order: dense first if asked for; checks the method and its parameters."""
    dense = RenderVariant("dense", {})
    arguments.check_target(args, None if args.method == "auto" else args.method)
    if args.settings is not None:
        Settings.load(args.settings)  # what is wrong with the file is said before weights load
        options = {"settings": str(args.settings), "target": args.target}
        schedule = arguments.method_options(args)
        del schedule["quality"]
        fast = RenderVariant(TUNED, options | schedule)
        return [dense, fast] if args.compare == "dense" else [fast]
    beside = {} if args.hold is None else {"hold": args.hold}
    if args.method == "dense":
        if args.set or args.quality:
            option = "--set" if args.set else "--quality"
            raise UsageError(
                f"{option} changes a method and dense has none; choose another --method"
            )
        if not beside:
            return [dense]
        held = RenderVariant(HELD, beside)
        return [dense, held] if args.compare == "dense" else [held]
    name = generation.method_for(args.method, source)
    parameters = method_parameters(name, args.set)
    fast = RenderVariant(name, arguments.method_options(args) | parameters | beside)
    return [dense, fast] if args.compare == "dense" else [fast]


def plan(
    args: argparse.Namespace,
    source: loading.Source,
    variants: list[RenderVariant],
    texts: list[str],
    process: Process,
) -> Job:
    """Everything that can be found out, and go wrong, before weights are loaded.

    Of the prompts those that this process renders, without those that an earlier attempt finished
    if that is to be resumed.
    """
    device = process.device(args.device)
    generation.check_place(torch.device(device), args.backend, args.offload)
    call = generation.call_arguments(args, source)
    steps = steps_of(call, source)
    generation.check_dense_steps(vars(args), steps)
    for variant in variants:
        if variant.name not in ("dense", HELD, TUNED):
            options = {key: value for key, value in variant.options.items() if key != "hold"}
            generation.check_fit(source, call, variant.name, options)
    form = args.format or sheets.default_format(source.is_video)
    sheets.check_format(form, source.is_video)
    folders = [args.output]
    if len(texts) > 1:
        folders = [args.output / f"{i:03d}-{_slug(text)}" for i, text in enumerate(texts, 1)]
    job = Job(
        source=source,
        load=generation.load_options(args) | {"device": device},
        variants=variants,
        prompts=texts,
        call=call,
        seed=args.seed,
        steps=steps,
        fps=args.fps or frames_per_second(source),
        format=form,
        folders=folders,
        quiet=args.quiet or process.rank > 0,  # one bar on a screen
        strength=args.strength,
        first=None if args.strength is None else generation.first_size(source, call, args.strength),
    ).only(process.mine(range(len(texts))))
    if args.resume:
        return job.only([i for i in range(len(job.prompts)) if not _is_finished(job, i)])
    files = [path for folder in job.folders for path in job.files(folder).values()]
    output.check_free(files, args.overwrite)
    return job


def request(job: Job, prompt: str) -> dict[str, Any]:
    """What was asked for, as the result file says it."""
    return {
        "prompt": prompt,
        "seed": job.seed,
        "model": job.source.name,
        "settings": settings_of(job.call, job.source),
        "options": {name: job.load[name] for name in ("offload", "vae_tiling", "compile")},
        "asked_dtype": None if job.load["dtype"] is None else str(job.load["dtype"]),
        "strength": job.strength,
        "inputs": _inputs(job) or None,
    }


def _inputs(job: Job) -> dict[str, str]:
    """What pictures and settings hold that the result is made from."""
    found = {}
    if "image" in job.call:
        found["image"] = digest_of(job.call["image"])
    for variant in job.variants:
        if variant.name == TUNED:
            found["settings"] = digest_of(Path(variant.options["settings"]).read_text("utf-8"))
    return found


def _is_finished(job: Job, index: int) -> bool:
    runs = {v.name: v.options for v in job.variants}
    return is_finished(job.files(job.folders[index]), request(job, job.prompts[index]), runs)


def describe(job: Job) -> str:
    """What a dry run prints: the call, the variants and the files."""
    rows = [["model", f"{job.source.name} ({job.source.pipeline.__name__})"]]
    rows += [[key, str(value)] for key, value in settings_of(job.call, job.source).items()]
    for variant in job.variants:
        given = {key: value for key, value in variant.options.items() if value is not None}
        rows.append(["run", " ".join([variant.name, *(f"{k}={v}" for k, v in given.items())])])
    for prompt, folder in zip(job.prompts, job.folders, strict=True):
        rows.append(["prompt", prompt])
        rows += [["file", str(path)] for path in job.files(folder).values()]
    return table(rows, left=2)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].rstrip("-") or "prompt"
