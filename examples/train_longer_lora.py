"""Train a LoRA for clips longer than the model knows, with the sparse attention that it will run.

Radial Attention's recipe (arXiv 2506.19852): the patch is on while low-rank corrections of the
self-attention learn from longer clips, so that gradients go through the sparse attention and the
model gets used to it; what is learned is a file of a few megabytes. PEFT makes the corrections and
accelerate places the model; every block is computed again in the backward pass instead of kept.

    python examples/train_longer_lora.py --frames 66 --out runs/longer
    python examples/train_longer_lora.py --frames 66 --out runs/longer --steps 400   # goes on

Writes pytorch_lora_weights.safetensors, which diffusers loads with ``pipe.load_lora_weights``, and
loss.json: the loss of every step, and what the judge reads from clips of two and four times the
length before and after, with the loss on such clips that were not learned from. Stopped at any
moment, the same command goes on.

For a model of your own, `--model` names its folder or hub id and `--data` a folder of safetensors,
each with ``latents`` (C, F, H, W), normalised as its pipeline does, and ``text`` (L, channels), as
its text encoder gives it. Without them the demo model learns from clips that are drawn on the fly.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

import diffpatch
from diffpatch.cli import scripts
from diffpatch.eval.environment import environment
from diffpatch.eval.quality.scores import Tools, alone, load_tools
from diffpatch.pipelines.demo import PRESETS, clips, load_demo
from diffpatch.pipelines.running.calls import fitted_call
from diffpatch.pipelines.running.loading import load_pipeline
from diffpatch.pipelines.running.sampling import sample
from diffpatch.tuning.lora import LoraTraining

HELD_OUT = 1_000_000  # numbers of clips that no training reaches
TARGETS = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"]


class Batch(NamedTuple):
    """Clips to learn from: latents (B, C, F, H, W), and text (B, L, channels)."""

    latents: torch.Tensor
    text: torch.Tensor


def demo_batches(pipe: Any, frames: int, side: int, batch: int) -> Callable[[int], Batch]:
    """Clips of the demo's world by number of the step, the same whenever a run goes on."""

    @torch.no_grad()
    def draw(step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        specs = clips.sample_specs(batch, generator)
        scenes = clips.draw_scenes(specs, generator)
        video = clips.render(scenes, clips.frame_times(frames).expand(batch, -1), side)
        video = video.to(pipe.vae.device, pipe.vae.dtype)
        latents = pipe.vae.encode(video).latent_dist.mode()
        mean, std = (
            torch.tensor(x, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1, 1)
            for x in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
        )
        text, _ = pipe.encode_prompt(
            [spec.caption() for spec in specs], do_classifier_free_guidance=False,
            max_sequence_length=PRESETS["demo"].max_sequence_length,
        )  # fmt: skip
        return Batch((latents - mean) / std, text)

    return draw


def file_batches(folder: Path, batch: int) -> Callable[[int], Batch]:
    """Clips from files, in an order that a seed shuffles, by number of the step."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SystemExit(f"{folder} holds no safetensors with latents and text")

    def draw(step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(files), (batch,), generator=generator).tolist()
        loaded = [load_file(files[i]) for i in chosen]
        return Batch(*(torch.stack([one[name] for one in loaded]) for name in Batch._fields))

    return draw


def loss_of(model: Any, batch: Batch, step: int, shift: float) -> torch.Tensor:
    """The velocity loss of flow matching, at a noise level of its own for every clip."""
    generator = torch.Generator().manual_seed(step)
    clean = batch.latents.float()
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    level = torch.sigmoid(torch.randn(len(clean), generator=generator)).to(clean.device)
    level = shift * level / (1 + (shift - 1) * level)
    mixed = torch.lerp(clean, noise, level.view(-1, 1, 1, 1, 1))
    velocity = model(
        hidden_states=mixed, timestep=level * 1000, encoder_hidden_states=batch.text.float(),
        return_dict=False,
    )[0]  # fmt: skip
    return (velocity.float() - (noise - clean)).square().mean()


def judged(pipe: Any, frames: int, options: argparse.Namespace, tools: Tools) -> dict[str, float]:
    """What the judge reads from clips of a length, with the patch on; means over the prompts."""
    preset = PRESETS["demo"]
    generator = torch.Generator().manual_seed(1)
    texts = [s.caption() for s in clips.sample_specs(options.judge, generator, held_out=True)]
    call = fitted_call(
        {
            "height": options.side, "width": options.side, "num_frames": frames,
            "num_inference_steps": options.sampling_steps, "guidance_scale": preset.guidance_scale,
            "max_sequence_length": preset.max_sequence_length,
        },
        pipe,
    )  # fmt: skip
    found: dict[str, list[float]] = {}
    for seed, text in enumerate(texts):
        made = sample(pipe, call | {"prompt": text}, seed).frames
        for name, value in alone(made, text, tools).items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


@torch.no_grad()
def held_out_loss(pipe: Any, frames: int, options: argparse.Namespace) -> float:
    """The training loss on clips of a length that are never learned from, two for each caption."""
    draw = demo_batches(pipe, frames, options.side, 1)
    numbers = range(HELD_OUT, HELD_OUT + 2 * options.judge)
    losses = [loss_of(pipe.transformer, draw(n), n, shift=3.0) for n in numbers]
    return float(torch.stack(losses).mean())


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, count = parser.add_argument, scripts.number(int, 1)
    add("--out", type=Path, default=Path("runs/longer"), help="folder of what is written")
    add("--model", default="demo", help="a folder or hub id (demo)")
    add("--data", type=Path, help="folder of latents and text, for models other than the demo")
    add("--frames", type=count, default=66, help="frames of the clips, for the demo (66)")
    add("--side", type=count, default=128, help="height and width in pixels, for the demo (128)")
    add("--steps", type=count, default=200, help="updates in all, earlier ones included (200)")
    add("--batch", type=count, default=1, help="clips per update (1)")
    add("--rank", type=count, default=8, help="of the corrections (8)")
    add("--rate", type=float, default=1e-4, help="learning rate (1e-4)")
    add("--decay", type=float, default=1.0, help="of radial attention (1.0)")
    add(
        "--judge",
        type=scripts.number(int, 0),
        default=2,
        help="captions judged (2)",
    )
    add("--trained", type=count, default=33, help="frames of the model's training (33)")
    add("--sampling-steps", type=count, default=10, help="denoising steps of judged clips (10)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Trains, and judges before and after."""
    options = parse_arguments(argv)
    demo = options.model == "demo"
    if not demo and options.data is None:
        raise SystemExit("--model needs --data, a folder of latents and text")
    pipe = load_demo(dtype=torch.float32) if demo else load_pipeline(options.model)
    pipe.set_progress_bar_config(disable=True)
    training = LoraTraining(
        pipe.transformer, options.out, TARGETS, rank=options.rank, rate=options.rate
    )
    pipe.to(training.device)
    judge = training.record.setdefault("judge", {})
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    training.record |= {"settings": settings, "environment": environment(training.device)}
    batches = (
        demo_batches(pipe, options.frames, options.side, options.batch)
        if demo
        else file_batches(options.data, options.batch)
    )

    def loss(model: Any, step: int) -> torch.Tensor:
        batch = Batch(*(x.to(training.device) for x in batches(step)))
        return loss_of(model, batch, step, shift=3.0)

    # The pipeline's own judgement needs steps; training takes the transformer as it is.
    tools = load_tools() if demo and options.judge else None
    lengths = [times * options.trained for times in (2, 4)]
    if tools is not None and "before" not in judge:
        judge["before"] = _judge_all(pipe, lengths, options, tools)
        training.save()
    with diffpatch.patched(pipe.transformer, "radial", decay=options.decay, dense_layers=0):
        training.run(options.steps, loss)
    if tools is not None:
        judge["after"] = _judge_all(pipe, lengths, options, tools)
        training.save()


def _judge_all(
    pipe: Any, lengths: list[int], options: argparse.Namespace, tools: Tools
) -> dict[str, dict[str, float]]:
    longest = pipe.transformer.config.rope_max_seq_len
    found = {}
    with diffpatch.patched(pipe, "radial", decay=options.decay, dense_layers=0, dense_steps=0):
        for frames in dict.fromkeys(min(n, longest) for n in lengths):
            found[str(frames)] = judged(pipe, frames, options, tools)
            found[str(frames)]["loss"] = held_out_loss(pipe, frames, options)
    return found


if __name__ == "__main__":
    main()
