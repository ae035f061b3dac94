"""Trains the contrastive text-video model on clips drawn on the fly (10 minutes on one CPU core).

Every clip is told from the other captions of its batch and from its own caption with one attribute
changed, 20-odd of them, which is where the words for shapes and motions are learned.

    OMP_NUM_THREADS=1 python examples/train_contrast.py
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from diffpatch.eval import contrast
from diffpatch.pipelines.demo import clips


def draw(
    specs: list[clips.ClipSpec], generator: torch.Generator, *, num_frames: int, size: int = 64
) -> Tensor:
    """Draws clips ``[len(specs), 3, num_frames, size, size]`` in [-1, 1]."""
    scenes = clips.draw_scenes(specs, generator)
    return clips.render(scenes, clips.frame_times(num_frames).expand(len(specs), -1), size)


def roughen(video: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Blurs, then adds noise to, a random half of the clips, as no model draws pixel-sharp.

    Returns:
        The clips, and how much blur and noise each got, ``[B, 2]`` from 0 to 1.
    """
    amount = (2 * torch.rand(len(video), 2, generator=generator) - 1).clamp(min=0)
    blur, noise = amount.view(-1, 2, 1, 1, 1, 1).unbind(1)
    blurred = functional.avg_pool2d(
        video.flatten(1, 2), 5, stride=1, padding=2, count_include_pad=False
    ).unflatten(1, video.shape[1:3])
    video = torch.lerp(video, blurred, blur)
    return video + 0.3 * noise * torch.randn(video.shape, generator=generator), amount


def neighbors(spec: clips.ClipSpec) -> list[str]:
    """All captions that differ from this one in exactly one attribute."""
    return [
        dataclasses.replace(spec, **{name: value}).caption()
        for name, values in clips.ATTRIBUTES.items()
        for value in values
        if value != getattr(spec, name)
    ]


def still(spec: clips.ClipSpec) -> str:
    """The caption of a single frame: the same without the motion."""
    return spec.caption().replace(f" {spec.motion}", "")


def loss_of(
    model: contrast.Contrast, rough: nn.Linear, specs: list[clips.ClipSpec], video: Tensor,
    amount: Tensor,
) -> Tensor:  # fmt: skip
    """Clips to captions and back, a frame to its still caption, features to roughness.

    A caption says nothing of noise and blur, so a head of its own, dropped afterwards, has to read
    their amounts; else features would learn to ignore what a set distance must notice.
    """
    scale = model.log_scale.exp().clamp(max=60)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model.features(video)
        seen = functional.normalize(model.clip_head(features).float(), dim=-1)
        frame = model.embed_frames(video[:, :, video.shape[2] // 2])
    captions = [spec.caption() for spec in specs]
    texts = model.embed_text(captions)
    others = model.embed_text([text for spec in specs for text in neighbors(spec)])
    hard = torch.einsum("bd,bnd->bn", seen, others.unflatten(0, (len(specs), -1)))
    # The same caption twice in a batch would be a right answer marked wrong.
    twins = torch.tensor([[a == b for b in captions] for a in captions]) & ~torch.eye(
        len(captions), dtype=torch.bool
    )
    logits = (scale * (seen @ texts.T)).masked_fill(twins, -1e4)
    own = torch.arange(len(specs))
    loss = functional.cross_entropy(torch.cat([logits, scale * hard], dim=1), own)
    loss = loss + functional.cross_entropy(logits.T, own)
    stills = [still(spec) for spec in specs]
    same = torch.tensor([[a == b for b in stills] for a in stills])
    pictures = scale * (frame @ model.embed_text(stills).T)
    target = same / same.sum(1, keepdim=True)
    loss = loss + functional.cross_entropy(pictures, target)
    return loss + 20 * functional.mse_loss(rough(features.float()), amount)


def train(options: argparse.Namespace) -> contrast.Contrast:
    """Trains with AdamW and a cosine learning rate."""
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    model = contrast.Contrast().train()
    rough = nn.Linear(contrast.FEATURES, 2)
    weights = [*model.parameters(), *rough.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=options.rate, weight_decay=0.02)
    started, recent = time.monotonic(), []
    for step in range(options.steps):
        decay = 0.5 * (1 + math.cos(math.pi * step / options.steps))
        optimizer.param_groups[0]["lr"] = options.rate * min(1, (step + 1) / 30) * (0.02 + decay)
        specs = clips.sample_specs(options.batch, generator)
        video = draw(specs, generator, num_frames=contrast.MOMENTS)
        loss = loss_of(model, rough, specs, *roughen(video, generator))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if (step + 1) % 50 == 0:
            seconds = time.monotonic() - started
            print(f"step {step + 1} {seconds:.0f} s loss {sum(recent) / 50:.3f}", flush=True)
            recent.clear()
    return model.eval()


@torch.no_grad()
def report(model: contrast.Contrast, count: int) -> None:
    """Prints retrieval on held-out captions: among all of them, and against one changed word."""
    everything = [
        spec for pattern in ("plain", "striped") for spec in clips.all_specs(True, pattern)
    ]
    texts = model.embed_text([spec.caption() for spec in everything])
    generator = torch.Generator().manual_seed(99)
    for num_frames in (13, 33):
        specs = clips.sample_specs(count, generator, held_out=True)
        parts = [draw([spec], generator, num_frames=num_frames) for spec in specs]
        seen = torch.cat([model.embed_clips(part) for part in parts])
        found = [everything[int(index)] for index in (seen @ texts.T).argmax(1)]
        right = sum(a == b for a, b in zip(found, specs, strict=True)) / count
        print(f"{num_frames} frames: first of {len(everything)} held-out captions {right:.3f}")
        for name in clips.ATTRIBUTES:
            share = sum(
                getattr(a, name) == getattr(b, name) for a, b in zip(found, specs, strict=True)
            )
            print(f"  {name} right in the caption found: {share / count:.3f}")
        own = (seen * model.embed_text([spec.caption() for spec in specs])).sum(1)
        print(f"  cosine with the right caption {own.mean():.3f}, any other "
              f"{(seen @ texts.T).mean():.3f}")  # fmt: skip


def main() -> None:
    """Parses the command line, trains, saves and reports."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=contrast.WEIGHTS, help="where the weights go")
    add("--steps", type=int, default=1100, help="number of updates")
    add("--batch", type=int, default=64, help="clips per update")
    add("--rate", type=float, default=3e-3, help="peak learning rate")
    add("--seed", type=int, default=5, help="seed of weights and clips")
    add("--check", type=int, default=400, help="clips of the final check")
    options = parser.parse_args()
    model = train(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, options.out)
    report(contrast.load_contrast(options.out), options.check)


if __name__ == "__main__":
    main()
