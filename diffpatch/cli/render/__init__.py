"""`diffpatch render`: a prompt to a video or image, accelerated and, if asked, dense beside it."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import diffpatch
from diffpatch.cli import generation, progress
from diffpatch.cli.errors import RunError, UsageError
from diffpatch.cli.render import sheets, summary
from diffpatch.cli.render.job import (
    TUNED,
    Job,
    RenderVariant,
    check_variants,
    describe,
    plan,
    request,
)
from diffpatch.cli.render.page import page
from diffpatch.eval import media
from diffpatch.eval.card import thumbnail, write_card
from diffpatch.eval.environment import environment
from diffpatch.eval.load import load_of
from diffpatch.eval.processes import Process
from diffpatch.eval.sweep.pictures import planned_pattern
from diffpatch.files import staged, to_json
from diffpatch.pipelines.running import loading, sampling
from diffpatch.pipelines.running import two_stages as two_stage
from diffpatch.pipelines.running.calls import fitted_call
from diffpatch.tuning.chosen import chosen_tiles


def run(args: argparse.Namespace) -> int:
    """Render every prompt; returns the exit code."""
    progress.hush_libraries()
    source = loading.find(args.model)
    variants = check_variants(args, source)
    texts = generation.prompts(args)
    process = Process.current()
    if args.json and process.count > 1:
        raise UsageError(
            f"--json prints one document and there are {process.count} processes; drop it and read"
            " render.json in the folders"
        )
    job = plan(args, source, variants, texts, process)
    if args.dry_run:
        print(describe(job))
        return 0
    if not job.prompts:
        progress.say("nothing is left to render", job.quiet)
    results = render_all(job, printing=not (args.quiet or args.json)) if job.prompts else []
    if args.json:
        print(to_json(results[0] if results and len(texts) == 1 else results), end="")
    return 0


def render_all(job: Job, printing: bool) -> list[dict[str, Any]]:
    """Load the pipeline and render every prompt of the job; returns the results."""
    progress.say(f"loading {job.source.name}", job.quiet)
    pipe = generation.load(job.source, job.load)
    call = fitted_call(job.call, pipe)
    if job.strength is not None:  # two stages warm up in the first
        return [
            _shown(two_stages(job, pipe, call | {"prompt": prompt}, folder), printing)
            for prompt, folder in zip(job.prompts, job.folders, strict=True)
        ]
    # The method warms up first, so that settings that cannot work fail before the dense run.
    chosen: torch.Tensor | None = None
    for variant in reversed(job.variants):
        progress.say(f"warming up {variant.name}", job.quiet)
        seen = _warm_up(job, pipe, variant, call | {"prompt": job.prompts[0]})
        chosen = seen if variant is job.variants[-1] else chosen
    return [
        _shown(render(job, pipe, call | {"prompt": prompt}, folder, chosen), printing)
        for prompt, folder in zip(job.prompts, job.folders, strict=True)
    ]


def _shown(result: dict[str, Any], printing: bool) -> dict[str, Any]:
    if printing:
        print(summary.describe(result), flush=True)
    return result


def two_stages(job: Job, pipe: Any, call: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The first stage dense at the trained size, and every variant as the second; the result."""
    assert job.strength is not None and job.first is not None
    height, width = job.first
    progress.say(f"first stage at {width}×{height}", job.quiet)
    with _explained("first stage"):
        small = sampling.sample(pipe, call | {"height": height, "width": width}, job.seed)
    refiner, again = two_stage.second_stage(pipe, small.frames, call, job.strength)
    result = render(job, refiner, again, folder)
    return result


def render(
    job: Job, pipe: Any, call: dict[str, Any], folder: Path, chosen: torch.Tensor | None = None
) -> dict[str, Any]:
    """Run every variant on one prompt and write its files; returns the result.

    Args:
        job: what to render.
        pipe: the pipeline.
        call: arguments of its call.
        folder: where to.
        chosen: what the method chose by content while it was warming up, for the card.
    """
    from diffpatch.internals import execution_device  # diffusers is slow to import

    device = execution_device(pipe)
    samples, runs = {}, {}
    for variant in job.variants:
        samples[variant.name], runs[variant.name] = _timed(job, pipe, variant, call, device)
    result = request(job, call["prompt"]) | {
        "pipeline": type(pipe).__name__,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": str(device),
        "runs": runs,
    }
    if len(samples) > 1:
        dense, fast = (variant.name for variant in job.variants)
        result["speedup"] = summary.speedup(runs[dense]["seconds"], runs[fast]["seconds"])
        result["quality"] = summary.quality(samples[fast], samples[dense])
    result["measured"] = summary.MEASURED + (summary.COMPILED if job.compiled else "")
    result["environment"] = environment(device)
    files = job.files(folder)
    result["files"] = {key: str(path) for key, path in files.items()}
    picture = _pattern(pipe, job.variants[-1], job.call, chosen) if len(samples) > 1 else None
    _write(job, samples, result, folder, picture)
    return result


def _warm_up(
    job: Job, pipe: Any, variant: RenderVariant, call: dict[str, Any]
) -> torch.Tensor | None:
    """Two steps, and what was chosen by content in them, if anything was."""
    # They must show the method at work, so none of them is dense.
    applied = variant.applied(pipe, dense_steps=0, dense_last_steps=0)
    with _explained(variant.name), applied, chosen_tiles(pipe) as seen:
        try:
            sampling.warm_up(pipe, call, job.seed)
        except diffpatch.DiffpatchError:
            raise
        except ValueError as error:
            # Pipelines check their arguments on entry and say what they expect.
            raise UsageError(f"{type(pipe).__name__}: {' '.join(str(error).split())}") from error
    return seen.map


def _timed(
    job: Job, pipe: Any, variant: RenderVariant, call: dict[str, Any], device: torch.device
) -> tuple[sampling.Sample, dict[str, Any]]:
    """One measured run: what it made, and its entry in the result."""
    with _explained(variant.name), variant.applied(pipe):
        if job.compiled:  # compiled code belongs to this very patch
            sampling.sample(pipe, call, job.seed)
        kept = None if variant.is_dense else lambda: diffpatch.report(pipe).kept
        with progress.steps(variant.name, job.steps, kept, job.quiet) as advance:
            sample = sampling.sample(pipe, call, job.seed, advance)
        entry: dict[str, Any] = {"seconds": summary.timing(sample), "kept": 1.0}
        entry["load"] = load_of(sample, device)
        if not variant.is_dense:
            report = diffpatch.report(pipe)
            entry |= {"kept": round(report.kept, 5), "options": variant.options}
            entry["report"] = report.to_dict()
    return sample, entry


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what can go wrong while a pipeline runs into one line that says what to do."""
    try:
        yield
    except sampling.NonFiniteOutput as error:
        raise RunError(
            f"{name}: {error}; nothing was written. Check the weights, or try --dtype bf16 or fp32"
        ) from error
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"{name}: out of memory; try --offload model, --vae-tiling, or fewer or smaller frames"
        ) from error


def _pattern(
    pipe: Any, variant: RenderVariant, call: dict[str, Any], chosen: torch.Tensor | None
) -> Image.Image | None:
    """A small picture of what is kept, for the card: chosen by content, or else as planned.

    `call` is the one that was asked for: what `fitted_call` makes of it is not what comes out.
    """
    if chosen is not None:
        return thumbnail(chosen)
    sizes = {key: call[key] for key in ("height", "width", "num_frames") if call.get(key)}
    if variant.name == TUNED:
        return None
    options = {key: value for key, value in variant.options.items() if key != "backend"}
    try:
        made = diffpatch.plan(pipe, variant.name, **sizes, **options)
    except (diffpatch.DiffpatchError, TypeError):  # no size is known, or no plan of the model
        return None
    return planned_pattern(made)


def _write(
    job: Job,
    samples: dict[str, sampling.Sample],
    result: dict[str, Any],
    folder: Path,
    pattern: Image.Image | None,
) -> None:
    """All files of one prompt, at once."""
    clips = {name: media.to_images(sample.frames) for name, sample in samples.items()}
    names = {key: path.name for key, path in job.files(folder).items()}
    with staged(folder, last=names["result"]) as stage:
        for name, clip in clips.items():
            media.save(clip, stage / names[name], job.fps)
        if len(clips) > 1:
            labels = _labels(result)
            pair = sheets.side_by_side(list(clips.values()), labels)
            media.save(pair, stage / names["side_by_side"], job.fps)
            if "contact_sheet" in names:
                sheet = sheets.contact_sheet(list(clips.values()), labels)
                media.save([sheet], stage / names["contact_sheet"], job.fps)
            dense, fast = (sample.frames for sample in samples.values())
            write_card(stage, dense, fast, summary.card_text(result), pattern, job.fps)
            (stage / names["page"]).write_text(page(result, names), encoding="utf-8")
        (stage / names["result"]).write_text(to_json(result), encoding="utf-8")


def _labels(result: dict[str, Any]) -> list[str]:
    labels = []
    for name, entry in result["runs"].items():
        seconds = entry["seconds"]["denoising"] or entry["seconds"]["total"]
        text = f"{name}  {seconds:.1f} s"
        labels.append(text if name == "dense" else f"{text}, {entry['kept']:.0%} of pairs")
    return labels
