"""Train the attribute judge on clips drawn on the fly (a few minutes on one CPU core).

Some of the training clips are roughened (noise, blur, a pass through the demo autoencoder's
resolution), so that the judge does not hang on pixel-sharp edges that no model reproduces.

    python examples/train_judge.py --out eval/weights/judge.safetensors
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from diffpatch.eval.quality.distances import frechet
from diffpatch.eval.quality.networks import judge as judging
from diffpatch.eval.quality.networks import towers
from diffpatch.pipelines.demo import clips


def draw(
    count: int, size: int, generator: torch.Generator, *, num_frames: int, held_out: bool
) -> tuple[Tensor, list[clips.ClipSpec]]:
    """Draw clips ``[count, 3, num_frames, size, size]`` and what they show."""
    specs = clips.sample_specs(count, generator, held_out=held_out)
    scenes = clips.draw_scenes(specs, generator)
    times = clips.frame_times(num_frames).expand(count, -1)
    return clips.render(scenes, times, size), specs


def roughen(video: Tensor, generator: torch.Generator) -> Tensor:
    """Blurs, then adds noise to, a random part of the clips."""
    choice = torch.rand(len(video), 2, generator=generator)
    flat = video.flatten(1, 2)
    blurred = functional.avg_pool2d(flat, 3, stride=1, padding=1, count_include_pad=False)
    blur = (choice[:, 0] < 0.4).view(-1, 1, 1, 1, 1)
    video = torch.where(blur, blurred.unflatten(1, video.shape[1:3]), video)
    strength = 0.2 * (choice[:, 1] - 0.5).clamp(min=0).view(-1, 1, 1, 1, 1)
    return video + strength * torch.randn(video.shape, generator=generator)


def train(options: argparse.Namespace) -> judging.Judge:
    """Train a judge with AdamW and a cosine learning rate."""
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    judge = judging.Judge().train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=options.rate, weight_decay=0.02)
    started, recent = time.monotonic(), []
    for step in range(options.steps):
        decay = 0.5 * (1 + math.cos(math.pi * step / options.steps))
        optimizer.param_groups[0]["lr"] = options.rate * min(1, (step + 1) / 30) * (0.02 + decay)
        video, specs = draw(options.batch, 64, generator, num_frames=towers.MOMENTS, held_out=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = judge(roughen(video, generator))
        wanted = judging.targets(specs)
        loss = sum(functional.cross_entropy(logits[name].float(), wanted[name]) for name in wanted)
        assert isinstance(loss, Tensor)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if (step + 1) % 50 == 0:
            seconds = time.monotonic() - started
            print(f"step {step + 1} {seconds:.0f} s loss {sum(recent) / 50:.3f}", flush=True)
            recent.clear()
    return judge.eval()


def report(judge: judging.Judge, count: int) -> None:
    """Print how well the judge reads unseen clips, and how its distance orders damage."""
    generator = torch.Generator().manual_seed(99)
    for num_frames in (13, 33):
        video, specs = draw(count, 64, generator, num_frames=num_frames, held_out=True)
        print(f"{num_frames} frames, held-out captions:", judging.accuracy(judge, video, specs))
    with torch.no_grad():
        real = judge.features(draw(count, 64, generator, num_frames=13, held_out=True)[0])
        video = draw(count, 64, generator, num_frames=13, held_out=True)[0]
        damaged = {
            "other real clips": video,
            "noise": video + 0.3 * torch.randn(video.shape, generator=generator),
            "reversed in time": video.flip(2),
            "shuffled frames": video[:, :, torch.randperm(13, generator=generator)],
            "frozen": video[:, :, :1].expand_as(video),
        }
        for name, clip in damaged.items():
            distance = frechet(real, judge.features(clip))
            print(f"distance to {name}: {distance:.2f}")


def main() -> None:
    """Parse the command line, train, report and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=judging.WEIGHTS, help="where the weights go")
    add("--steps", type=int, default=700, help="number of updates")
    add("--batch", type=int, default=64, help="clips per update")
    add("--rate", type=float, default=3e-3, help="peak learning rate")
    add("--seed", type=int, default=11, help="seed of weights and clips")
    add("--check", type=int, default=400, help="clips of the final check")
    options = parser.parse_args()
    judge = train(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half().contiguous() for name, value in judge.state_dict().items()}
    save_file(weights, options.out)
    report(judging.load_judge(options.out), options.check)


if __name__ == "__main__":
    main()
