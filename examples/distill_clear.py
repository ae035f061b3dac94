"""Distil a window around each token into an image transformer, as CLEAR does (arXiv 2412.16112).

The student is the model itself with `disc` attention on, whose cost grows linearly with the pixels,
and low-rank corrections of its attention layers that learn to make up for what no token sees any
more. The teacher is a dense copy. They see the same noisy images, which the teacher made from your
prompts, and the student learns the teacher's predictions and the output of each of its attention
layers. PEFT, accelerate and gradient checkpointing as in `diffpatch.tuning.lora`.

    python examples/distill_clear.py --out runs/clear
    python examples/distill_clear.py --out runs/clear --steps 400       # goes on
    python examples/distill_clear.py --model black-forest-labs/FLUX.1-dev --size 1024 1024 \\
        --prompts prompts.txt --radius 16 --targets to_q to_k to_v to_out.0 --steps 10000

Writes pytorch_lora_weights.safetensors and loss.json: the loss of every step, and the PSNR to dense
of images of prompts that were not learned from, before and after. Then::

    pipe.load_lora_weights("runs/clear")
    diffpatch.patch(pipe, "disc", radius=16, dense_steps=0, dense_layers=0)

CLEAR's flow-matching loss on photographs is left out: the images are the teacher's own. Without
`--model` the built-in demo makes images, videos of one frame.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import diffpatch
from diffpatch.cli import scripts
from diffpatch.eval.environment import environment
from diffpatch.eval.quality.metrics import psnr
from diffpatch.pipelines.demo import PRESETS, clips, load_demo
from diffpatch.pipelines.families.table import attention_modules, family_of
from diffpatch.pipelines.running.calls import fitted_call
from diffpatch.pipelines.running.loading import load_pipeline
from diffpatch.pipelines.running.sampling import sample
from diffpatch.tuning.distill import RecordedForward, recording
from diffpatch.tuning.lora import LoraTraining

EVERYWHERE: dict[str, Any] = {"dense_steps": 0, "dense_layers": 0}
HELD_OUT = 1000  # seed of the noise of images that are compared


class Teacher:
    """Noisy images of a dense pipeline, by number of the update, with what it makes of them.

    Args:
        pipe: the dense pipeline.
        call: its arguments but the prompt.
        prompts: to learn from, in turn.
        each: updates from one image before the next is made.
    """

    def __init__(self, pipe: Any, call: dict[str, Any], prompts: list[str], each: int) -> None:
        self.pipe, self.call, self.prompts, self.each = pipe, call, prompts, each
        self._made: tuple[int, list[RecordedForward]] = (-1, [])

    def forward(self, step: int) -> RecordedForward:
        """A denoising step of an image; the same one for the same number, whenever it is asked."""
        number = step // self.each
        if self._made[0] != number:
            prompt = self.prompts[number % len(self.prompts)]
            with torch.no_grad(), recording(self.pipe.transformer) as forwards:
                sample(self.pipe, self.call | {"prompt": prompt}, number)
            self._made = number, forwards
        generator = torch.Generator().manual_seed(step)
        return self._made[1][int(torch.randint(len(self._made[1]), (), generator=generator))]


class Layers:
    """The outputs of the attention layers of a model, of the latest forward."""

    def __init__(self, model: Any) -> None:
        family = family_of(model)
        if family is None:
            raise SystemExit(f"{type(model).__name__} is not a transformer of a known family")
        self._modules = [module for _, module in attention_modules(model, family)]
        self.outputs: list[torch.Tensor] = []

    def watch(self, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What a forward gives; later calls, when blocks are computed again, are not noted."""
        self.outputs = []

        def note(module: Any, args: Any, output: Any) -> None:
            parts = output if isinstance(output, tuple) else (output,)
            self.outputs.extend(x for x in parts if isinstance(x, torch.Tensor))

        hooks = [module.register_forward_hook(note) for module in self._modules]
        try:
            return forward()
        finally:
            for hook in hooks:
                hook.remove()


def relative(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared relative L2 error."""
    wide = target.float()
    return (out.float() - wide).square().sum() / wide.square().sum()


def distil_loss(teacher: Teacher, weight: float) -> Callable[[Any, int], torch.Tensor]:
    """CLEAR's two losses against the teacher, on a forward of its own samples.

    Args:
        teacher: what is learned from.
        weight: of the attention layers, beside that of the prediction, which is 1.
    """
    dense = Layers(teacher.pipe.transformer)
    watched: dict[int, Layers] = {}

    def loss(model: Any, step: int) -> torch.Tensor:
        one = teacher.forward(step)
        sparse = watched.setdefault(id(model), Layers(getattr(model, "module", model)))
        with torch.no_grad():
            dense.watch(lambda: teacher.pipe.transformer(*one.args, **one.kwargs)[0])
        predicted = sparse.watch(lambda: model(*one.args, **one.kwargs)[0])
        pairs = zip(sparse.outputs, dense.outputs, strict=True)
        layers = [relative(own, target) for own, target in pairs]
        return relative(predicted, one.prediction) + weight * torch.stack(layers).mean()

    return loss


def compare(teacher: Teacher, student: Any, prompts: list[str], radius: int) -> float:
    """The mean PSNR of the student's images to those of the teacher, in dB."""
    pipe, own = teacher.pipe, teacher.pipe.transformer
    calls = [teacher.call | {"prompt": prompt} for prompt in prompts]
    dense = [sample(pipe, call, HELD_OUT + i).frames for i, call in enumerate(calls)]
    pipe.register_modules(transformer=student)
    try:
        with diffpatch.patched(pipe, "disc", radius=radius, **EVERYWHERE):
            changed = [sample(pipe, call, HELD_OUT + i).frames for i, call in enumerate(calls)]
    finally:
        pipe.register_modules(transformer=own)
    scores = [psnr(a, b).mean for a, b in zip(changed, dense, strict=True)]
    return sum(scores) / len(scores)


def demo_prompts(count: int, *, held_out: bool) -> list[str]:
    """Captions of the demo."""
    generator = torch.Generator().manual_seed(7)
    return [spec.caption() for spec in clips.sample_specs(count, generator, held_out=held_out)]


def read_prompts(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Prompts to learn from, and others to compare on."""
    if options.prompts is None:
        held = demo_prompts(options.held_out, held_out=True)
        return demo_prompts(32, held_out=False), held
    lines = options.prompts.read_text(encoding="utf-8").splitlines()
    found = [line.strip() for line in lines if line.strip()]
    if len(found) <= options.held_out:
        raise SystemExit(
            f"{options.prompts} holds {len(found)} prompts, and {options.held_out} are held out:"
            " give more, or lower --held-out"
        )
    return found[options.held_out :], found[: options.held_out]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, count = parser.add_argument, scripts.number(int, 1)
    add("--out", type=Path, default=Path("runs/clear"), help="folder of what is written")
    add("--model", default="demo", help="a folder or hub id of an image pipeline (demo)")
    add("--prompts", type=Path, help="a file with a prompt a line; the demo has its own")
    add("--size", type=count, nargs=2, default=(128, 128), help="height and width (128 128)")
    add("--radius", type=count, default=4, help="of the disc, in tokens (4)")
    add("--steps", type=count, default=200, help="updates in all, earlier ones included (200)")
    add("--each", type=count, default=8, help="updates from one image of the teacher (8)")
    add("--sampling-steps", type=count, default=10, help="denoising steps of an image (10)")
    add("--rank", type=count, default=16, help="of the corrections (16)")
    add("--rate", type=float, default=1e-3, help="learning rate (1e-3)")
    add("--attention", type=float, default=1.0, help="weight of the attention layers' loss (1)")
    add("--targets", nargs="+", default=["attn1.to_q", "attn1.to_k", "attn1.to_v",
        "attn1.to_out.0"], help="endings of the layers that are corrected")  # fmt: skip
    add("--held-out", type=count, default=4, help="prompts to compare on (4)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Distils, and compares before and after."""
    options = parse_arguments(argv)
    demo = options.model == "demo"
    if not demo and options.prompts is None:
        raise SystemExit("--model needs --prompts, a file with a prompt a line")
    prompts, held = read_prompts(options)
    pipe = load_demo(dtype=torch.float32) if demo else load_pipeline(options.model)
    pipe.set_progress_bar_config(disable=True)
    height, width = options.size
    call: dict[str, Any] = {"height": height, "width": width}
    call["num_inference_steps"] = options.sampling_steps
    if demo:
        preset = PRESETS["demo"]
        call |= {"num_frames": 1, "guidance_scale": preset.guidance_scale}
        call |= {"max_sequence_length": preset.max_sequence_length}
    student = copy.deepcopy(pipe.transformer)
    training = LoraTraining(
        student, options.out, options.targets, rank=options.rank, rate=options.rate
    )
    pipe.to(training.device)
    pipe.transformer.requires_grad_(False)
    teacher = Teacher(pipe, fitted_call(call, pipe), prompts, options.each)
    scores = training.record.setdefault("psnr", {})
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    training.record |= {"settings": settings, "environment": environment(training.device)}
    if "before" not in scores:
        scores["before"] = compare(teacher, student, held, options.radius)
        training.save()
    with diffpatch.patched(student, "disc", radius=options.radius, **EVERYWHERE):
        training.run(options.steps, distil_loss(teacher, options.attention))
    scores["after"] = compare(teacher, student, held, options.radius)
    training.save()
    print(f"PSNR to dense: {scores['before']:.2f} dB before, {scores['after']:.2f} dB after")


if __name__ == "__main__":
    main()
