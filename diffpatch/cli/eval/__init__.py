"""`diffpatch eval`: how good results are, of folders or of methods on a model."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffpatch.cli import bench, generation, output, progress
from diffpatch.cli.errors import RunError, UsageError
from diffpatch.cli.eval import vbench as eval_vbench
from diffpatch.cli.eval.table import describe
from diffpatch.cli.options import arguments
from diffpatch.cli.options.eval import CAPTIONS
from diffpatch.eval.processes import Process
from diffpatch.files import to_json
from diffpatch.pipelines.running import loading, sampling
from diffpatch.pipelines.running.calls import (
    DEMO_FPS,
    fitted_call,
    frames_per_second,
    steps_of,
)

if TYPE_CHECKING:
    from diffpatch.eval.quality.scores import Tools

FEATURES = ("contrast", "frames")
_MEASURES = ("folders", "reference", "prompt", "prompt_file", "count", "method", "vbench_export")


def run(args: argparse.Namespace) -> int:
    """Measure; returns the exit code."""
    output.check_file(args.json)
    progress.hush_libraries()
    process = Process.current()
    results = eval_vbench.read_results(args.vbench_results)
    only_read = results and not any(getattr(args, name) for name in _MEASURES)
    if args.floor is not None and not args.folders:
        raise UsageError("--floor is for folders; give the folders and --reference")
    result: dict[str, Any] = {}
    faults: list[OSError] = []
    if not only_read:
        measure = _folders if args.folders or args.reference else _model
        result, faults = measure(args, process)
    if process.rank == 0:  # every process has the whole result; one tells it
        _tell(args, result, results)
    for error in faults:
        raise RunError(f"clips are missing in {args.vbench_export}: {error}") from error
    return 0


def _tell(args: argparse.Namespace, result: dict[str, Any], vbench: dict[str, Any]) -> None:
    """Print the result, and write it; where that fails, the whole of it goes to stdout."""
    text = to_json(result | ({"vbench": vbench} if vbench else {}))
    if args.json == "-":
        print(text, end="")
        return
    shown = [describe(result)] if result else []
    print("\n".join([*shown, *([eval_vbench.describe(vbench)] if vbench else [])]))
    if args.json is not None:
        try:
            output.write_text(Path(args.json), text)
        except OSError:
            print(text, end="")
            raise
        print(f"wrote {args.json}")


def _tools(args: argparse.Namespace, device: str | None) -> Tools:
    from diffpatch.eval.quality import scores as quality

    chosen = loading.choose_device(device)
    return quality.load_tools(args.clip, args.features or FEATURES, args.lpips, chosen)


def _say(args: argparse.Namespace, process: Process) -> Callable[[str], None]:
    return lambda text: progress.say(text, args.quiet or process.rank > 0)


def _folders(args: argparse.Namespace, process: Process) -> tuple[dict[str, Any], list[OSError]]:
    from diffpatch.eval.quality import evaluate, items

    for option in ("prompt", "prompt_file", "count", "method"):
        if getattr(args, option):
            raise UsageError(f"--{option.replace('_', '-')} renders; drop it, or drop the folders")
    if not args.folders:
        raise UsageError("folders are compared with another: diffpatch eval OUT --reference DENSE")
    args.folders, args.reference = _places(args.folders, args.reference)
    names = [path.name or str(path) for path in args.folders]
    if len(set(names)) < len(names) or {"floor", "reference"} & set(names):
        names = [str(path) for path in args.folders]
    folders = dict(zip(names, args.folders, strict=True))
    captions = None if args.captions is None else items.read_captions(args.captions)
    if args.vbench_export is not None:
        fps = float(args.fps or DEMO_FPS)
        eval_vbench.export_folders(
            args.vbench_export, folders, args.reference, captions, fps, process
        )
    result = evaluate.evaluate_folders(
        folders,
        args.reference,
        _tools(args, process.device(args.device)),
        floor=args.floor,
        captions=captions,
        process=process,
        say=_say(args, process),
    )
    return result, []


def _places(folders: Sequence[Path], reference: Path | None) -> tuple[list[Path], Path]:
    """What is compared with what: of one folder that has dense in it, every method with that.

    Raises:
        UsageError: there is no reference, and no dense where it could be.
    """
    from diffpatch.eval.quality.items import rendered

    for path in folders:
        # It may also be a clip, by the name of its method.
        if not (path.exists() or (path.parent.is_dir() and path.name in rendered(path.parent))):
            raise UsageError(f"there is no file or folder {path}")
    if reference is None or list(folders) == [reference]:
        found = list(rendered(folders[0])) if len(folders) == 1 and folders[0].is_dir() else []
        if "dense" in found and len(found) > 1:
            return [folders[0] / name for name in found if name != "dense"], folders[0] / "dense"
    if reference is None:
        raise UsageError(
            "folders are compared with another: diffpatch eval OUT --reference DENSE, or give one"
            " that `diffpatch render --compare dense` wrote"
        )
    return list(folders), reference


def _model(args: argparse.Namespace, process: Process) -> tuple[dict[str, Any], list[OSError]]:
    """The result, and why clips could not be kept."""
    from diffpatch.eval.quality import evaluate

    if args.captions is not None:
        raise UsageError("--captions is for folders; give the folders and --reference")
    shared = arguments.method_options(args)
    source = loading.find(args.model)
    methods = bench.chosen(args, generation.method_for("auto", source))
    call = generation.call_arguments(args, source)
    generation.check_dense_steps(shared, steps_of(call, source))
    prompts, device = _prompts(args, source), process.device(args.device)
    tools = _tools(args, device)
    options: dict[str, Any] = {"seed": args.seed, "process": process, "say": _say(args, process)}
    faults: list[OSError] = []
    if args.vbench_export is not None:
        if not source.is_video:
            raise UsageError(f"--vbench-export is for videos; {args.model} makes images")
        fps = args.fps or frames_per_second(source)
        rows = ["dense", evaluate.ARITHMETIC, evaluate.NOISE, *methods]
        export = eval_vbench.Export.of(args.vbench_export, prompts, fps, rows, process)
        options["keep"], faults = export.keep, export.faults
    pipe = generation.load(source, generation.load_options(args) | {"device": device})
    applied = {name: shared | values for name, values in methods.items()}
    try:
        result = evaluate.evaluate_model(
            pipe, fitted_call(call, pipe), prompts, applied, tools, **options
        )
    except sampling.NonFiniteOutput as error:
        raise RunError(f"{error}; check the weights, or try --dtype bf16 or fp32") from error
    except torch.OutOfMemoryError as error:
        raise RunError(
            "out of memory; try --offload model, --vae-tiling, or less to make"
        ) from error
    dtype = str(pipe.dtype).removeprefix("torch.")
    return {"model": args.model, "dtype": dtype, **result}, faults


def _prompts(args: argparse.Namespace, source: loading.Source) -> list[str]:
    """The prompts given, the first of them with --count; for the demo else captions of its own."""
    from diffpatch.pipelines.demo import clips  # imports diffusers

    if source.kind == "demo" and not args.prompt and args.prompt_file is None:
        generator = torch.Generator().manual_seed(args.seed)
        specs = clips.sample_specs(args.count or CAPTIONS, generator, held_out=True)
        return [spec.caption() for spec in specs]
    found = generation.prompts(args)
    if args.count is not None and args.count > len(found):
        raise UsageError(f"--count {args.count} is more than the {len(found)} prompts; lower it")
    return found[: args.count]
