"""A rendering as asked for, checked as far as possible before any weights are loaded."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffpatch import patched
from diffpatch.cli import arguments, generation, output
from diffpatch.cli.errors import UsageError
from diffpatch.cli.parameters import method_parameters
from diffpatch.cli.render import resume as shares
from diffpatch.cli.render import sheets as media
from diffpatch.pipelines.running import loading


@dataclass(frozen=True)
class Variant:
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
        return patched(pipe, self.name, **self.options | changes)


@dataclass(frozen=True)
class Job:
    """Everything a rendering needs besides the pipeline itself."""

    source: loading.Source
    variants: list[Variant]
    prompts: list[str]
    call: dict[str, Any]
    steps: int | None
    fps: float
    format: str
    folders: list[Path]

    def only(self, which: list[int]) -> Job:
        """The same for some of its prompts."""
        prompts, folders = [self.prompts[i] for i in which], [self.folders[i] for i in which]
        return dataclasses.replace(self, prompts=prompts, folders=folders)

    def files(self, folder: Path) -> dict[str, Path]:
        """What is written for one prompt."""
        video = self.source.is_video
        stems = {v.name: v.name.replace("+", "_") for v in self.variants}
        names = {name: media.file_name(stem, self.format, video) for name, stem in stems.items()}
        if len(self.variants) > 1:
            pair = f"{stems[self.variants[-1].name]}_vs_dense"
            names["side_by_side"] = media.file_name(pair, self.format, video)
            if video:
                names["contact_sheet"] = f"{pair}.png"
        names["result"] = "render.json"
        return {key: folder / name for key, name in names.items()}


def check_variants(args: argparse.Namespace) -> list[Variant]:
    """What to run, in order: dense first if asked for; checks the method and its parameters."""
    dense = Variant("dense", {})
    if args.method == "dense":
        if args.set or args.quality:
            option = "--set" if args.set else "--quality"
            raise UsageError(
                f"{option} changes a method and dense has none; choose another --method"
            )
        return [dense]
    parameters = method_parameters(args.method, args.set)
    fast = Variant(args.method, arguments.method_options(args) | parameters)
    return [dense, fast] if args.compare == "dense" else [fast]


def plan(
    args: argparse.Namespace, variants: list[Variant], texts: list[str], process: shares.Process
) -> Job:
    """Everything that can be found out, and go wrong, before weights are loaded.

    Of the prompts those that this process renders, without those that an earlier attempt finished
    if that is to be resumed.
    """
    source = loading.find(args.model)
    call = generation.call_arguments(args, source)
    steps = generation.steps_of(call, source)
    generation.check_dense_steps(args, steps)
    form = args.format or media.default_format(source.is_video)
    media.check_format(form, source.is_video)
    folders = [args.output]
    if len(texts) > 1:
        folders = [args.output / f"{i:03d}-{_slug(text)}" for i, text in enumerate(texts, 1)]
    fps = generation.frames_per_second(args, source)
    job = Job(source, variants, texts, call, steps, fps, form, folders)
    job = job.only(process.share(len(texts)))
    if args.resume:
        return job.only([i for i in range(len(job.prompts)) if not _is_finished(job, args, i)])
    files = [path for folder in job.folders for path in job.files(folder).values()]
    output.check_free(files, args.overwrite)
    return job


def request(job: Job, args: argparse.Namespace, prompt: str) -> dict[str, Any]:
    """What was asked for, as the result file says it."""
    return {
        "prompt": prompt,
        "seed": args.seed,
        "model": job.source.name,
        "settings": generation.settings(job.call, job.source),
        "options": {n: getattr(args, n) for n in ("offload", "vae_tiling", "compile")},
    }


def _is_finished(job: Job, args: argparse.Namespace, index: int) -> bool:
    runs = {v.name: v.options for v in job.variants}
    return shares.is_finished(
        job.files(job.folders[index]), request(job, args, job.prompts[index]), runs
    )


def describe(job: Job) -> str:
    """What a dry run prints: the call, the variants and the files."""
    rows = [["model", f"{job.source.name} ({job.source.pipeline.__name__})"]]
    rows += [[key, str(value)] for key, value in generation.settings(job.call, job.source).items()]
    for variant in job.variants:
        given = {key: value for key, value in variant.options.items() if value is not None}
        rows.append(["run", " ".join([variant.name, *(f"{k}={v}" for k, v in given.items())])])
    for prompt, folder in zip(job.prompts, job.folders, strict=True):
        rows.append(["prompt", prompt])
        rows += [["file", str(path)] for path in job.files(folder).values()]
    width = max(len(key) for key, _ in rows)
    return "\n".join(f"{key.ljust(width)}  {value}" for key, value in rows)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].rstrip("-") or "prompt"
