"""Train the contrastive text-video model on clips drawn on the fly (10 minutes on one CPU core).

Every clip is told from the other captions of its batch and from its own caption with one attribute
changed, 20-odd of them, which is where the words for shapes and motions are learned. The record
says what training did and what the weights are worth: how often a clip finds its own caption among
all held-out ones, and how that, the CLIP score and the Fréchet distance answer to damage.

    OMP_NUM_THREADS=1 python examples/train_contrast.py
    python examples/train_contrast.py --check-only --record contrast.json
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from diffpatch.eval.environment import environment
from diffpatch.eval.quality.distances import frechet
from diffpatch.eval.quality.networks import contrast, towers
from diffpatch.pipelines.demo import clips

RECORD = Path(contrast.__file__).parents[2] / "results" / "contrast.json"
LENGTHS = (13, 33)  # frames of the checks; training sees 9
DAMAGES = (
    ("none", 0.0),
    ("noise", 0.1), ("noise", 0.3), ("noise", 0.6),
    ("blur", 5), ("blur", 9), ("blur", 17),
    ("pixels", 4), ("pixels", 8), ("pixels", 16),
    ("shuffled", 1.0), ("frozen", 1.0),
)  # fmt: skip
EVERY = 50  # updates between two lines of the training's loss


def draw(
    specs: list[clips.ClipSpec], generator: torch.Generator, *, num_frames: int, size: int = 64
) -> Tensor:
    """Draw clips ``[len(specs), 3, num_frames, size, size]`` in [-1, 1]."""
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


def damage(video: Tensor, kind: str, strength: float, generator: torch.Generator) -> Tensor:
    """Damages clips ``[B, 3, F, H, W]``.

    Args:
        video: the clips.
        kind: none, noise (strength is its deviation), blur or pixels (strength is the side of the
            average, in pixels), shuffled (strength is the share of clips whose frames lose their
            order) or frozen (every frame is the first).
        strength: how much.
        generator: of the noise and the orders.
    """
    if kind == "none":
        return video
    if kind == "noise":
        return video + strength * torch.randn(video.shape, generator=generator)
    if kind == "frozen":
        return video[:, :, :1].expand_as(video)
    if kind == "shuffled":
        orders = [torch.randperm(video.shape[2], generator=generator) for _ in video]
        rest = [torch.arange(video.shape[2])] * len(video)
        count = round(strength * len(video))
        chosen = [*orders[:count], *rest[count:]]
        return torch.stack([clip[:, order] for clip, order in zip(video, chosen, strict=True)])
    frames, side = video.flatten(1, 2), int(strength)
    if kind == "blur":
        frames = functional.avg_pool2d(frames, side, 1, side // 2, count_include_pad=False)
    else:
        frames = functional.interpolate(functional.avg_pool2d(frames, side), video.shape[-2:])
    return frames.unflatten(1, video.shape[1:3])


def train(options: argparse.Namespace) -> tuple[contrast.Contrast, dict[str, Any]]:
    """Train with AdamW and a cosine learning rate; the model, and how it went."""
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    model = contrast.Contrast().train()
    rough = nn.Linear(contrast.FEATURES, 2)
    weights = [*model.parameters(), *rough.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=options.rate, weight_decay=0.02)
    started, recent, losses = time.monotonic(), [], []
    for step in range(options.steps):
        decay = 0.5 * (1 + math.cos(math.pi * step / options.steps))
        optimizer.param_groups[0]["lr"] = options.rate * min(1, (step + 1) / 30) * (0.02 + decay)
        specs = clips.sample_specs(options.batch, generator)
        video = draw(specs, generator, num_frames=towers.MOMENTS)
        loss = loss_of(model, rough, specs, *roughen(video, generator))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if (step + 1) % EVERY == 0:
            seconds = time.monotonic() - started
            losses.append(round(sum(recent) / len(recent), 4))
            print(f"step {step + 1} {seconds:.0f} s loss {losses[-1]:.3f}", flush=True)
            recent.clear()
    settings = {name: getattr(options, name) for name in ("steps", "batch", "rate", "seed")}
    seconds = round(time.monotonic() - started, 1)
    return model.eval(), {**settings, "seconds": seconds, "loss_every_50": losses}


@torch.no_grad()
def check(model: contrast.Contrast, count: int, seed: int = 99) -> dict[str, Any]:
    """What the weights are worth on held-out captions.

    Returns:
        retrieval: by number of frames, how often the best of all held-out captions is the clip's
            own, how often it has each attribute right, and the mean cosines.
        damage: for every kind and strength, the same share, the CLIP score (100 times the cosine
            with the clip's own caption) and the Fréchet distance to other, undamaged clips.
    """
    every = [spec for pattern in ("plain", "striped") for spec in clips.all_specs(True, pattern)]
    texts = model.embed_text([spec.caption() for spec in every])
    generator = torch.Generator().manual_seed(seed)

    def drawn(num_frames: int) -> tuple[list[clips.ClipSpec], list[Tensor]]:
        specs = clips.sample_specs(count, generator, held_out=True)
        return specs, [draw([spec], generator, num_frames=num_frames) for spec in specs]

    retrieval = {}
    for num_frames in LENGTHS:
        specs, parts = drawn(num_frames)
        seen = torch.cat([model.embed_clips(part) for part in parts])
        retrieval[str(num_frames)] = _retrieved(seen @ texts.T, every, specs)
    specs, parts = drawn(LENGTHS[0])
    others = torch.cat([model.features(part) for part in drawn(LENGTHS[0])[1]])
    numbers = [every.index(spec) for spec in specs]
    damaged = []
    for kind, strength in DAMAGES:
        hurt = [damage(part, kind, strength, generator) for part in parts]
        cosines = torch.cat([model.embed_clips(part) for part in hurt]) @ texts.T
        own = cosines[range(count), numbers]
        distance = frechet(torch.cat([model.features(part) for part in hurt]), others)
        damaged.append({
            "kind": kind, "strength": strength,
            "first": float((cosines.argmax(1) == torch.tensor(numbers)).float().mean()),
            "clip_score": 100 * float(own.mean()), "fd": distance,
        })  # fmt: skip
    return {"clips": count, "captions": len(every), "retrieval": retrieval, "damage": damaged}


def _retrieved(
    cosines: Tensor, every: list[clips.ClipSpec], specs: list[clips.ClipSpec]
) -> dict[str, Any]:
    found = [every[int(index)] for index in cosines.argmax(1)]
    pairs = list(zip(found, specs, strict=True))
    return {
        "first": sum(a == b for a, b in pairs) / len(pairs),
        "attributes": {
            name: sum(getattr(a, name) == getattr(b, name) for a, b in pairs) / len(pairs)
            for name in clips.ATTRIBUTES
        },
        "own_cosine": float(cosines[range(len(specs)), [every.index(s) for s in specs]].mean()),
        "mean_cosine": float(cosines.mean()),
    }


def describe(found: dict[str, Any]) -> str:
    """The check for people."""
    lines = [
        f"{length} frames: a clip finds its caption among {found['captions']} in "
        f"{entry['first']:.1%}; cosine {entry['own_cosine']:.3f}, any other "
        f"{entry['mean_cosine']:.3f}"
        for length, entry in found["retrieval"].items()
    ]
    lines.append(f"{'damage':<16}{'first':>8}{'CLIP':>8}{'FD':>10}")
    for entry in found["damage"]:
        name = f"{entry['kind']} {entry['strength']:g}"
        lines.append(f"{name:<16}{entry['first']:>8.1%}{entry['clip_score']:>8.2f}"
                     f"{entry['fd']:>10.3f}")  # fmt: skip
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, train, save, check and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=contrast.WEIGHTS, help="where the weights go")
    add("--record", type=Path, default=RECORD, help="where the record goes")
    add("--steps", type=int, default=1100, help="number of updates")
    add("--batch", type=int, default=64, help="clips per update")
    add("--rate", type=float, default=3e-3, help="peak learning rate")
    add("--seed", type=int, default=5, help="seed of weights and clips")
    add("--check", type=int, default=200, help="clips of the final check")
    add("--check-only", action="store_true", help="train nothing; check the weights at --out")
    options = parser.parse_args(argv)
    training: dict[str, Any] | None = None
    if not options.check_only:
        model, training = train(options)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
        save_file(weights, options.out)
    found = check(contrast.load_contrast(options.out), options.check)
    print(describe(found))
    record = {
        "weights_sha256": hashlib.sha256(options.out.read_bytes()).hexdigest(),
        "weights_bytes": options.out.stat().st_size,
        "training": training,
        "check": found,
        "environment": environment(),
    }
    options.record.parent.mkdir(parents=True, exist_ok=True)
    options.record.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
