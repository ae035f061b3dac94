"""Judge the demo model: how often does a clip show what its held-out caption says?

Samples clips for captions that training never saw, lets the attribute judge read them, and
compares with chance and with real clips of the same captions.

    python examples/judge_demo_model.py --count 200
    python examples/judge_demo_model.py --method radial
    python examples/judge_demo_model.py --preset demo-long --count 48
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import time
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from PIL import Image
from torch import Tensor

import diffpatch
from diffpatch.eval.quality.distances import frechet
from diffpatch.eval.quality.networks import judge as judging
from diffpatch.pipelines.demo import clips, model

RESULTS = Path(judging.__file__).parents[2] / "results"


def choose_captions(count: int, seed: int) -> list[clips.ClipSpec]:
    """Draw held-out captions, the same ones for every method."""
    return clips.sample_specs(count, torch.Generator().manual_seed(seed), held_out=True)


def sample(
    pipe: WanPipeline, specs: list[clips.ClipSpec], preset: model.DemoPreset, batch: int, seed: int
) -> Tensor:
    """Sample one clip per caption; the noise of a clip depends only on its place in the list.

    Returns:
        ``[N, 3, F, H, W]`` float32 in [-1, 1].
    """
    parts = []
    for first in range(0, len(specs), batch):
        chosen = specs[first : first + batch]
        frames = pipe(
            prompt=[spec.caption() for spec in chosen],
            height=preset.height,
            width=preset.width,
            num_frames=model.pipeline_num_frames(pipe, preset.num_frames),
            num_inference_steps=preset.num_inference_steps,
            guidance_scale=preset.guidance_scale,
            max_sequence_length=preset.max_sequence_length,
            generator=[torch.Generator().manual_seed(seed + first + i) for i in range(len(chosen))],
            output_type="pt",
        ).frames
        parts.append(2 * frames.float().cpu().transpose(1, 2) - 1)
        print(f"{first + len(chosen)} of {len(specs)} clips", flush=True)
    return torch.cat(parts)


def draw_real(specs: list[clips.ClipSpec], preset: model.DemoPreset, seed: int) -> Tensor:
    """Draw real clips of the given captions, like the ones that the model was trained on."""
    generator = torch.Generator().manual_seed(seed)
    times = clips.frame_times(preset.num_frames)
    parts = []
    for spec in specs:  # one by one: a batch of long clips would need gigabytes
        scenes = clips.draw_scenes([spec], generator)
        parts.append(clips.render(scenes, times[None], preset.height))
    return torch.cat(parts)


def measure(video: Tensor, specs: list[clips.ClipSpec], preset: model.DemoPreset) -> dict[str, Any]:
    """Judges clips against their captions, next to chance and to real clips."""
    judge = judging.load_judge()
    real, other = draw_real(specs, preset, 1), draw_real(specs, preset, 2)
    given, wanted = judging.answers(judge, video), judging.targets(specs)
    right = torch.stack([given[name] == wanted[name] for name in wanted])
    with torch.no_grad():
        features = [judge.features(clip) for clip in (video, real, other)]
    return {
        "accuracy": judging.accuracy(judge, video, specs),
        "all_attributes_right": right.all(0).float().mean().item(),
        "accuracy_of_real_clips": judging.accuracy(judge, real, specs),
        "chance": {name: 1 / len(values) for name, values in clips.ATTRIBUTES.items()},
        "frechet_distance": frechet(features[0], features[1]),
        "frechet_distance_of_real_clips": frechet(features[1], features[2]),
    }


def contact_sheet(video: Tensor, path: Path, *, rows: int = 16, columns: int = 5) -> None:
    """Save a picture with some frames of the first clips, one clip per row."""
    chosen = [round(i * (video.shape[2] - 1) / (columns - 1)) for i in range(columns)]
    strips = video[:rows, :, chosen].permute(0, 3, 2, 4, 1).flatten(0, 1).flatten(1, 2)
    pixels = ((strips + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)


def table(result: dict[str, Any]) -> str:
    """Formats a result for people."""
    lines = [f"{'attribute':<12}{'right':>8}{'real clips':>12}{'chance':>8}"]
    for name, value in result["accuracy"].items():
        real, chance = result["accuracy_of_real_clips"][name], result["chance"][name]
        lines.append(f"{name:<12}{value:>8.1%}{real:>12.1%}{chance:>8.1%}")
    lines.append(f"all right: {result['all_attributes_right']:.1%} of {result['count']} clips")
    lines.append(
        f"Fréchet distance {result['frechet_distance']:.1f} "
        f"(real clips {result['frechet_distance_of_real_clips']:.1f})"
    )
    return "\n".join(lines)


def describe_run() -> dict[str, Any]:
    """Records where and with what the result was obtained."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "gpu": gpu,
        },
        "versions": {
            "python": platform.python_version(),
            "diffpatch": diffpatch.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
    }


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--method", default="none", help="attention method of diffpatch, or none for dense")
    add("--preset", choices=sorted(model.PRESETS), default="demo", help="how to sample")
    add("--count", type=int, default=200, help="number of held-out captions")
    add("--batch", type=int, default=8, help="clips sampled together")
    add("--steps", type=int, help="Euler steps, instead of the preset's")
    add("--guidance", type=float, help="guidance scale, instead of the preset's")
    add("--seed", type=int, default=2024, help="seed of captions and noise")
    add("--weights", type=Path, default=model.WEIGHTS, help="pipeline folder to judge")
    add("--out", type=Path, help="where the JSON goes; by default in the package's results")
    add("--sheet", type=Path, help="also save a contact sheet (PNG) here")
    return parser.parse_args()


def main() -> None:
    """Sample, judge, print and save."""
    options = parse_arguments()
    preset = model.PRESETS[options.preset]
    preset = dataclasses.replace(
        preset,
        num_inference_steps=options.steps or preset.num_inference_steps,
        guidance_scale=options.guidance or preset.guidance_scale,
    )
    pipe = WanPipeline.from_pretrained(options.weights, torch_dtype=torch.bfloat16)
    if torch.cuda.is_available():
        pipe.to("cuda")
    pipe.set_progress_bar_config(disable=True)
    if options.method != "none":
        diffpatch.patch(pipe, options.method)
    specs = choose_captions(options.count, options.seed)
    started = time.monotonic()
    video = sample(pipe, specs, preset, options.batch, options.seed)
    seconds = time.monotonic() - started
    result = {
        "method": options.method,
        "preset": dataclasses.asdict(preset),
        "count": options.count,
        "seed": options.seed,
        "seconds": round(seconds, 1),
        **measure(video, specs, preset),
        **describe_run(),
    }
    print(table(result))
    name = options.method if options.preset == "demo" else f"{options.preset}_{options.method}"
    out = options.out or RESULTS / f"demo_model_{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    if options.sheet:
        contact_sheet(video, options.sheet)


if __name__ == "__main__":
    main()
