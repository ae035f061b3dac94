"""FID, KID and CLIP score on COCO: a text-to-image model dense and with a method.

    python examples/coco_fid.py --model black-forest-labs/FLUX.1-dev --method neighborhood \\
        --images val2014/ --captions captions_val2014.json --count 5000 -o coco/ \\
        --features fid_inception.safetensors --clip openai/clip-vit-large-patch14

Pictures go to coco/dense and coco/neighborhood and are not rendered again by a second call; the
work is shared among the processes of `accelerate launch` or `torchrun`, each of which measures
nothing: run the same command once more, alone, for the numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import diffpatch
from diffpatch import files
from diffpatch.cli import scripts
from diffpatch.eval import media
from diffpatch.eval.environment import environment
from diffpatch.eval.processes import Process
from diffpatch.eval.quality import items
from diffpatch.eval.quality import scores as quality
from diffpatch.eval.quality.distances import FeatureSet, compare, halves
from diffpatch.eval.quality.tally import Tally, measure
from diffpatch.pipelines.running import loading, sampling


def read_captions(path: Path, count: int) -> dict[str, str]:
    """The first captions by picture: COCO's annotations, or what `diffpatch eval` reads."""
    found = None
    if path.suffix == ".json":
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise scripts.UsageError(f"{path} is not readable JSON ({error})") from None
    if isinstance(found, dict) and "annotations" in found:
        names = {image["id"]: Path(image["file_name"]).stem for image in found["images"]}
        texts: dict[str, str] = {}
        for entry in found["annotations"]:
            texts.setdefault(names[entry["image_id"]], entry["caption"].strip())
    else:
        texts = items.read_captions(path)
    return dict(sorted(texts.items())[:count])


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the pictures, beside the arguments of the call."""
    return {key: getattr(args, key) for key in ("model", "dtype", "method", "set", "seed")}


def render(args: argparse.Namespace, captions: dict[str, str]) -> None:
    """Render the pictures that are not there yet, dense and with the method, from equal noise."""
    parameters = scripts.method_parameters(args.method, args.set)
    source = loading.find(args.model)
    call = scripts.call_arguments(args, source)
    made = settings(args) | {"call": call}
    scripts.keep_settings(args.output / f"{args.method}.json", made)
    scripts.keep_settings(args.output / "dense.json", made | {"method": "dense", "set": []})
    process = Process.current()
    mine = [list(captions)[number] for number in process.mine(range(len(captions)))]
    rows = ["dense", args.method]
    missing = {row: [n for n in mine if not (args.output / row / f"{n}.png").exists()]
               for row in rows}  # fmt: skip
    scripts.say(f"{sum(map(len, missing.values()))} pictures are left for this process")
    if not any(missing.values()):
        return
    options = scripts.load_options(args)
    pipe = scripts.load(source, options | {"device": process.device(args.device)})
    numbers = {name: number for number, name in enumerate(captions)}
    for row in rows:
        applied: Any = contextlib.nullcontext()
        if row != "dense":
            applied = diffpatch.patched(pipe, args.method, **parameters)
        with applied:
            for name in missing[row]:
                prompt = {"prompt": captions[name]}
                frames = sampling.sample(pipe, call | prompt, args.seed + numbers[name]).frames
                with files.staged(args.output / row) as stage:
                    media.save(media.to_images(frames[:1]), stage / f"{name}.png", 1)


def evaluate(args: argparse.Namespace, captions: dict[str, str]) -> dict[str, Any]:
    """Set distances to the real pictures, CLIP scores, and the method next to dense."""
    device = loading.choose_device(args.device)
    tools = quality.load_tools(args.clip, args.features, args.lpips, device)
    real = {Path(name).name: path for name, path in items.find_items(args.images).items()}
    if absent := next((name for name in captions if name not in real), None):
        raise scripts.UsageError(
            f"{args.images} has no picture {absent}; captions and pictures must fit"
        )
    features = {
        extract.name: FeatureSet(
            {name: extract(items.read_frames(real[name])) for name in captions}, extract.name
        )
        for extract in tools.extractors
    }
    rows: list[dict[str, Any]] = []
    if len(captions) > 1:
        sets = {maker: compare(*halves(found)) for maker, found in features.items()}
        rows.append({"name": "real, halves", "count": len(captions), "scores": {}, "sets": sets})
    tally = Tally()
    for row in ("dense", args.method):
        parts = []
        for name, prompt in captions.items():
            frames = items.read_frames(args.output / row / f"{name}.png")
            dense = items.read_frames(args.output / "dense" / f"{name}.png")
            reference = None if row == "dense" else dense
            parts.append(measure(name, frames, tools, prompt=prompt, reference=reference))
        tally = Tally().merge(*parts)
        rows.append(tally.row(row, Tally(tally.scores, features)))
    notes = ["fd and kd are distances to the real pictures"]
    if any(found["small_sample"] for found in rows[-1]["sets"].values()):
        notes.append("fewer than two pictures per feature: a Fréchet distance says little")
    return {
        "rows": rows, "notes": notes, "tools": tools.names(), "missing": tally.reasons(),
        **settings(args), "environment": environment(device),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, render and measure."""
    parser = scripts.Parser(description=__doc__)
    add = parser.add_argument
    add("--images", type=Path, required=True, help="folder of the real pictures")
    add("--captions", type=Path, required=True, help="COCO's JSON, or names and captions")
    add("--count", type=int, default=5000, help="how many of them (5000)")
    add("-o", "--output", type=Path, required=True, help="folder of what is rendered")
    add("--method", default="neighborhood", help="of diffpatch")
    add("--set", action="append", default=[], help="its parameters, key=value")
    add("--clip", required=True, help="folder or hub id of a CLIP")
    add("--features", action="append", required=True, help="FID's Inception as safetensors, or as "
        "diffpatch eval; repeatable")  # fmt: skip
    add("--lpips", type=Path, help="AlexNet and linear heads as safetensors")
    scripts.add_model_options(parser)
    scripts.add_generation_options(parser)
    try:
        args = parser.parse_args(argv)
        scripts.hush_libraries()
        captions = read_captions(args.captions, args.count)
        render(args, captions)
        if Process.current().count == 1:
            result = evaluate(args, captions)
            scripts.write_text(args.output / "scores.json", files.to_json(result))
            print(scripts.scores_table(result))
    except (scripts.UsageError, diffpatch.DiffpatchError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
