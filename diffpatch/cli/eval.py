"""`diffpatch eval`: how good results are, of folders or of methods on a model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffpatch.cli import arguments, bench, generation, output, progress
from diffpatch.cli.errors import RunError, UsageError
from diffpatch.cli.summary import table
from diffpatch.eval import quality
from diffpatch.pipelines import loading, sampling
from diffpatch.pipelines.demo import clips

EXAMPLES = """\
examples:
  diffpatch eval out/radial --reference out/dense
  diffpatch eval a/ b/ --reference dense/ --captions prompts.json --json scores.json
  diffpatch eval --model demo --method radial --method window --count 8
  diffpatch eval -m Wan-AI/Wan2.1-T2V-1.3B-Diffusers --method radial --prompt-file prompts.txt \\
      --clip openai/clip-vit-large-patch14 --features facebook/dinov2-base --lpips lpips/
"""
CAPTIONS = 8  # drawn for the demo where no prompts are given
COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("psnr", "PSNR", ".2f"),
    ("ssim", "SSIM", ".4f"),
    ("ms_ssim", "MS-SSIM", ".4f"),
    ("lpips", "LPIPS", ".4f"),
    ("clip_i", "CLIP-I", ".4f"),
    ("clip_score", "CLIP", ".2f"),
    ("temporal_consistency", "CLIP-T", ".4f"),
    ("flicker", "flicker", ".4f"),
    ("caption_accuracy", "caption", ".1%"),
    ("fd", "FD", ".2f"),
    ("kd", "KD", ".4f"),
)


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "eval",
        help="measure quality, of files or of methods on a model",
        description="Compare folders with a reference folder, or render prompts dense and with\n"
        "methods and compare in memory. Every table has the floor: dense against dense.",
        epilog=EXAMPLES,
    )
    group = parser.add_argument_group("folders")
    group.add_argument("folders", nargs="*", type=Path, help="results; matched by their names")
    group.add_argument("--reference", type=Path, metavar="FOLDER", help="the dense results")
    group.add_argument("--floor", type=Path, metavar="FOLDER", help="dense results once more")
    group.add_argument(
        "--captions", type=arguments.existing_file,
        help="prompts of the files: JSON {name: prompt}, or lines of name, tab, prompt",
    )  # fmt: skip
    group = parser.add_argument_group("prompts, where there are no folders")
    group.add_argument("-p", "--prompt", action="append", default=[], help="text, repeatable")
    group.add_argument("--prompt-file", type=arguments.existing_file, help="a prompt on each line")
    group.add_argument(
        "--count", type=arguments.number(int, 1),
        help=f"how many prompts; the demo draws its own captions where none are given ({CAPTIONS})",
    )  # fmt: skip
    group.add_argument("--method", action="append", help="repeatable (radial)")
    arguments.add_model_options(parser)
    arguments.add_generation_options(parser)
    arguments.add_method_options(parser)
    group = parser.add_argument_group("what judges (all by default shipped and offline)")
    group.add_argument(
        "--clip", default="contrast", metavar="MODEL",
        help="contrast (the demo's captions only), or a folder or hub id of a CLIP",
    )  # fmt: skip
    group.add_argument(
        "--features", default="contrast", metavar="MODEL",
        help="for set distances: contrast, judge, a folder or hub id of CLIP, DINOv2, SigLIP, "
        "VideoMAE or V-JEPA 2, or FID's Inception as safetensors",
    )  # fmt: skip
    group.add_argument("--lpips", type=Path, help="AlexNet and linear heads as safetensors")
    group = parser.add_argument_group("output")
    group.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="JSON to a file, or - for stdout"
    )
    group.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure; returns the exit code."""
    if args.json not in (None, "-"):
        output.check_free([Path(args.json)], overwrite=True)
    progress.hush_libraries()
    result = _folders(args) if args.folders or args.reference else _model(args)
    if args.json == "-":
        print(output.to_json(result), end="")
        return 0
    print(describe(result))
    if args.json is not None:
        output.write_text(Path(args.json), output.to_json(result))
        print(f"wrote {args.json}")
    return 0


def describe(result: dict[str, Any]) -> str:
    """The result as a table, with what is missing or to be taken with care below it."""
    rows = result["rows"]
    values = [row["scores"] | row["sets"] for row in rows]
    used = [column for column in COLUMNS if any(column[0] in found for found in values)]
    kept = any("kept" in row for row in rows)
    lines: list[Sequence[str]] = [
        ["", "clips", *(["kept"] if kept else []), *(label for _, label, _ in used)]
    ]
    for row, found in zip(rows, values, strict=True):
        share = [f"{row['kept']:.1%}" if "kept" in row else ""] if kept else []
        flag = "*" if found.get("small_sample") else ""
        cells = [
            format(found[key], form) + flag * (key == "fd") if key in found else ""
            for key, _, form in used
        ]
        lines.append([row["name"], str(row["count"]), *share, *cells])
    names = ", ".join(f"{key}: {value}" for key, value in result["tools"].items()
                      if key in ("clip", "features"))  # fmt: skip
    missing = [f"no {key}: {why}" for key, why in result["missing"].items()]
    marked = [("* " if "Fréchet" in note else "") + note for note in result["notes"]]
    return "\n".join([table(lines), names, *missing, *marked])


def _tools(args: argparse.Namespace) -> quality.Tools:
    device = loading.choose_device(args.device)
    return quality.load_tools(args.clip, args.features, args.lpips, device)


def _folders(args: argparse.Namespace) -> dict[str, Any]:
    from diffpatch.eval import evaluate, items

    for option in ("prompt", "prompt_file", "count", "method"):
        if getattr(args, option):
            raise UsageError(f"--{option.replace('_', '-')} renders; drop it, or drop the folders")
    if not args.folders or args.reference is None:
        raise UsageError("folders are compared with another: diffpatch eval OUT --reference DENSE")
    names = [path.name or str(path) for path in args.folders]
    if len(set(names)) < len(names) or "floor" in names:
        names = [str(path) for path in args.folders]
    captions = None if args.captions is None else items.read_captions(args.captions)
    return evaluate.evaluate_folders(
        dict(zip(names, args.folders, strict=True)),
        args.reference,
        _tools(args),
        floor=args.floor,
        captions=captions,
        say=lambda text: progress.say(text, args.quiet),
    )


def _model(args: argparse.Namespace) -> dict[str, Any]:
    from diffpatch.eval import evaluate

    for option in ("floor", "captions"):
        if getattr(args, option):
            raise UsageError(f"--{option} is for folders; give the folders and --reference")
    methods = bench.chosen(args)
    shared = {name: getattr(args, name) for name in _SHARED}
    source = loading.find(args.model)
    call = generation.call_arguments(args, source)
    generation.check_dense_steps(args, generation.steps_of(call, source))
    prompts, tools = _prompts(args, source), _tools(args)
    pipe = loading.load_pipeline(
        source, dtype=loading.DTYPES.get(args.dtype), device=args.device, offload=args.offload,
        vae_tiling=args.vae_tiling, compile=args.compile,
    )  # fmt: skip
    if args.image is not None:
        pipe = loading.with_image_input(pipe)
    pipe.set_progress_bar_config(disable=True)
    try:
        result = evaluate.evaluate_model(
            pipe,
            generation.fit(call, pipe),
            prompts,
            {name: shared | values for name, values in methods.items()},
            tools,
            seed=args.seed,
            say=lambda text: progress.say(text, args.quiet),
        )
    except sampling.NonFiniteOutput as error:
        raise RunError(f"{error}; check the weights, or try --dtype bf16 or fp32") from error
    except torch.OutOfMemoryError as error:
        raise RunError(
            "out of memory; try --offload model, --vae-tiling, or less to make"
        ) from error
    return {"model": args.model, "dtype": str(pipe.dtype).removeprefix("torch."), **result}


_SHARED = ("quality", "dense_steps", "dense_layers", "dense_last_steps", "backend")


def _prompts(args: argparse.Namespace, source: loading.Source) -> list[str]:
    """The prompts given, the first of them with --count; for the demo else captions of its own."""
    if source.kind == "demo" and not args.prompt and args.prompt_file is None:
        generator = torch.Generator().manual_seed(args.seed)
        specs = clips.sample_specs(args.count or CAPTIONS, generator, held_out=True)
        return [spec.caption() for spec in specs]
    found = generation.prompts(args)
    if args.count is not None and args.count > len(found):
        raise UsageError(f"--count {args.count} is more than the {len(found)} prompts; lower it")
    return found[: args.count]
