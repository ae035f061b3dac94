"""Distil linear attention into the demo model, on the model's own samples.

Records what the dense model computes while it samples captions, teaches the linear form every layer
(see `diffpatch.tuning.distill`), writes one safetensors file, and compares with dense on captions
that were not learned from. The model's own weights never change.

    python examples/distill_linear.py --out linear.safetensors
    diffpatch render --model demo --method linear --set weights=linear.safetensors

In Python the file is ``diffpatch.patch(pipe, "linear", weights="linear.safetensors")``. With
``--folder my-model`` the whole pipeline is saved with what was learned, as diffusers saves one::

    python examples/distill_linear.py --folder my-model
    hf upload somebody/my-model my-model

    pipe = WanPipeline.from_pretrained("my-model")       # or "somebody/my-model"
    diffpatch.patch(pipe, "linear")                      # weights="somebody/my-model" from the hub

The same steps distil any other model: load its pipeline and sample its own prompts. Two CPU cores
need up to twenty minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

import diffpatch
from diffpatch import Linear
from diffpatch.cli import scripts
from diffpatch.eval.environment import environment
from diffpatch.eval.quality.metrics import psnr
from diffpatch.pipelines.demo import PRESETS, clips, load_demo, pipeline_num_frames
from diffpatch.planning.fit import fit_kept
from diffpatch.tuning import distill

SAMPLED, HELD_SEED = 0, 1000  # seeds of the noise to learn from, and of that to be tested on


@dataclasses.dataclass(frozen=True)
class Size:
    """What a sample looks like: height and width in pixels, frames, and Euler steps."""

    side: int
    frames: int
    steps: int


def sample(pipe: Any, prompt: str, seed: int, size: Size, output_type: str = "pt") -> torch.Tensor:
    """One clip: (F, 3, H, W) in [0, 1], or its latents, which need no decoder."""
    out = pipe(
        prompt=prompt,
        height=size.side,
        width=size.side,
        num_frames=pipeline_num_frames(pipe, size.frames),
        num_inference_steps=size.steps,
        guidance_scale=PRESETS["demo"].guidance_scale,
        max_sequence_length=PRESETS["demo"].max_sequence_length,
        generator=torch.Generator().manual_seed(seed),
        output_type=output_type,
    )
    frames: torch.Tensor = out.frames[0]
    return frames


def record(pipe: Any, prompts: list[str], seed: int, size: Size) -> list[distill.RecordedForward]:
    """Every forward of the transformer while it samples the prompts, both branches of guidance."""
    with distill.recording(pipe.transformer) as forwards:
        for i, prompt in enumerate(prompts):
            sample(pipe, prompt, seed + i, size, output_type="latent")
    return forwards


def captions(count: int, *, held_out: bool) -> list[str]:
    """Captions of the demo; the held-out ones were never in the model's own training either."""
    generator = torch.Generator().manual_seed(7)
    return [s.caption() for s in clips.sample_specs(count, generator, held_out=held_out)]


def errors(
    teacher: distill.Distiller, samples: list[distill.RecordedForward]
) -> tuple[float, float]:
    """Mean relative L2 errors of the layers' attention, and of the model's prediction."""
    layers = teacher.layer_errors(samples)
    return sum(layers) / len(layers), teacher.prediction_error(samples)


def compare(
    pipe: Any, prompts: list[str], size: Size, methods: dict[str, diffpatch.Method]
) -> dict[str, float]:
    """The mean PSNR of every method's clips to the dense ones, in dB; the first step is dense."""
    dense = [sample(pipe, p, HELD_SEED + i, size) for i, p in enumerate(prompts)]
    found: dict[str, float] = {}
    for name, method in methods.items():
        with diffpatch.patched(pipe, method, dense_steps=1, dense_layers=0):
            changed = [sample(pipe, p, HELD_SEED + i, size) for i, p in enumerate(prompts)]
        scores = [psnr(a, b).mean for a, b in zip(changed, dense, strict=True)]
        found[name] = sum(scores) / len(scores)
    return found


def progress(stage: str, step: int, loss: float) -> None:
    if step % 20 == 0:
        print(f"  {stage}, step {step}: relative error {loss**0.5:.4f}", flush=True)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("linear.safetensors"), help="the file to write")
    add("--folder", type=Path, help="a folder for the whole pipeline with what was learned")
    count = scripts.number(int, 1)
    add("--far", default="hedgehog", help="the far part: a feature map, 'pool' or 'state'")
    add("--near", type=count, default=416, help="tokens that a query sees exactly")
    add("--rank", type=count, default=8, help="of the corrections of q, k, v and the output")
    add("--prompts", type=count, default=6, help="captions to learn from")
    add("--steps", type=int, nargs=2, default=(60, 60), help="of the two stages")
    add("--held-out", type=count, default=2, help="captions to compare on, never learned from")
    add("--json", type=Path, help="a file for what was measured")
    add("--smoke", action="store_true", help="tiny clips and few steps, to see that it works")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Records, teaches, saves, compares."""
    options = parse_arguments(argv)
    preset = PRESETS["demo"]
    size = Size(preset.height, preset.num_frames, preset.num_inference_steps)
    prompts, held, stages, near = options.prompts, options.held_out, options.steps, options.near
    if options.smoke:
        size, prompts, held, stages, near = Size(64, 5, 2), 1, 1, (4, 4), 40
    pipe = load_demo(dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    logging.set_verbosity_error()  # which says for every sample that frames are not packed
    unseen = captions(held, held_out=True)
    started = time.monotonic()
    samples = record(pipe, captions(prompts, held_out=False), SAMPLED, size)
    tests = record(pipe, unseen, HELD_SEED, size)[:: 1 if options.smoke else 4]
    print(f"{len(samples)} forwards recorded in {time.monotonic() - started:.0f} s", flush=True)

    method = Linear(far=options.far, near=near, allow_untrained=True)
    teacher = distill.Distiller(pipe.transformer, method, samples[0], rank=options.rank)
    before = errors(teacher, tests)
    teacher.match_layers(samples, stages[0], rate=2e-2, progress=progress)
    teacher.match_predictions(samples, stages[1], rate=1e-3, progress=progress)
    after = errors(teacher, tests)
    teacher.save(options.out)
    if options.folder:
        pipe.save_pretrained(options.folder)
        teacher.save(options.folder)
    kilobytes = options.out.stat().st_size / 1000
    print(f"{options.out}: {kilobytes:.0f} kB after {time.monotonic() - started:.0f} s\n")
    print("relative error     before    after   (captions never seen)")
    for what, a, b in zip(("attention", "prediction"), before, after, strict=True):
        print(f"  {what:<15}{a:>8.4f} {b:>8.4f}")
    rows = table(pipe, unseen, size, near, options.out)
    if options.json:
        learned = {"prompts": prompts, "stages": stages, "far": options.far, "rank": options.rank}
        result = {
            "settings": learned
            | {"near": near, "held_out": held, "size": dataclasses.asdict(size)},
            "errors": {"what": ["attention", "prediction"], "before": before, "after": after},
            "rows": rows,
            "environment": environment(),
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def table(
    pipe: Any, prompts: list[str], size: Size, near: int, weights: Path
) -> list[dict[str, Any]]:
    """Print what each method keeps and how close it comes, and return it."""
    grid = diffpatch.TokenGrid(size.frames, size.side // 8, size.side // 8)
    taught = diffpatch.make_method("linear", weights=str(weights))
    methods = {
        "dropping tiles": fit_kept("neighborhood", grid, taught.pattern(grid).kept),
        "piecewise, untrained": Linear(near=near),
        "distilled": taught,
    }
    print("\nmethod                   kept  PSNR to dense")
    rows = []
    for name, score in compare(pipe, prompts, size, methods).items():
        rows.append({"method": name, "kept": methods[name].pattern(grid).kept, "psnr": score})
        print(f"  {name:<22}{rows[-1]['kept']:>6.3f} {score:>8.2f} dB")
    return rows


if __name__ == "__main__":
    main()
