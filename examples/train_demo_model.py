"""Train the built-in demo model from scratch, on clips drawn on the fly.

Two ideas make this possible on a couple of CPU cores:

* **Frame subsets.** A clip has 13 (or 33) frames, but a training step sees only a few of them,
  with the rotary position embedding of their true places in the clip. Cost falls much faster than
  the number of frames, and what is learned about positions holds for the full clip. The same is
  done in space: at half resolution every token sits at the centre of the four that it replaces.
* **A second task for the middle of the network.** A small head, thrown away afterwards, predicts
  from a middle layer where each token lies relative to the shape, and how the shape moves. The
  clips are drawn by us, so the answer is known exactly.

The run is resumable: it stops cleanly on SIGTERM or Ctrl-C, and continues from the folder --out
if that holds a checkpoint. Checkpoints are safetensors and JSON.

    python examples/train_demo_model.py --out runs/demo
    python examples/train_demo_model.py --out runs/demo --export runs/demo/pipeline
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffpatch.pipelines.demo import clips, model, subset, vae


@dataclass(frozen=True)
class Stage:
    """A part of the run: ``steps`` updates on batches of one shape.

    Attributes:
        steps: Number of updates.
        batch: Clips per update.
        keep: Frames kept of each clip.
        size: Height and width in pixels.
        long_share: Share of the clips that have 33 frames instead of 13.
        first_rate: Learning rate at the start of the stage, relative to ``--rate``.
        final_rate: The same at its end; linear in between.
    """

    steps: int
    batch: int
    keep: int
    size: int
    long_share: float = 0.0
    first_rate: float = 1.0
    final_rate: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Stage:
        """Read ``steps,batch,keep,size[,long_share[,first_rate,final_rate]]``."""
        steps, batch, keep, size, *rest = text.split(",")
        return cls(int(steps), int(batch), int(keep), int(size), *map(float, rest))


DEFAULT_STAGES = (  # the run behind the shipped weights
    "251,96,1,64;"
    "729,32,4,64,0.2;"
    "492,16,4,128,0.2;"
    "160,8,7,128,0.2,1,0.3;"
    "170,4,13,128,0.25,0.3,0.02;"
    "130,8,7,128,0.2,0.6,0.25;"
    "110,4,13,128,0.25,0.25,0.02"
)


def build_optimizers(named: dict[str, nn.Parameter], rate: float) -> list[torch.optim.Optimizer]:
    """Build Muon for the matrices of the transformer's blocks, and AdamW for everything else."""
    matrices = {n for n, value in named.items() if value.ndim == 2 and "blocks" in n}
    muon = torch.optim.Muon(
        [value for n, value in named.items() if n in matrices],
        lr=rate,
        weight_decay=0.01,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    others = [value for n, value in named.items() if n not in matrices]
    return [muon, torch.optim.AdamW(others, lr=rate / 2, betas=(0.9, 0.97), weight_decay=0.0)]


class Trainer:
    """The state of a run: weights, their moving average, optimisers and random numbers."""

    def __init__(
        self,
        stages: list[Stage],
        options: argparse.Namespace,
        build: Callable[[], WanTransformer3DModel] = model.build_transformer,
    ) -> None:
        """Build an untrained model.

        Args:
            stages: The parts of the run.
            options: See the command line.
            build: Builds the transformer.
        """
        torch.manual_seed(options.seed)
        self.stages, self.options = stages, options
        self.device = torch.device(options.device)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.step = 0
        self.seconds = 0.0
        self.tokenizer = model.build_tokenizer()
        self.matrix, self.offset = (t.to(self.device) for t in vae.encoder_matrix(vae.build_vae()))
        self.transformer = build()
        self.text_encoder = model.build_text_encoder()
        dim = self.transformer.patch_embedding.out_channels
        self.hint_head = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, subset.HINT_CHANNELS)
        )
        names = ("transformer", "text_encoder", "hint_head")
        self.parts = nn.ModuleDict({name: getattr(self, name) for name in names})
        self.parts.to(self.device).train()
        self.processors = []
        for block in self.transformer.blocks:
            attention: Any = block.attn2
            attention.set_processor(subset.PaddedTextProcessor())
            self.processors.append(attention.processor)
        named = dict(self.parts.named_parameters())
        self.average = {name: value.detach().clone() for name, value in named.items()}
        self.optimizers = build_optimizers(named, options.rate)
        if options.compile:
            self.transformer.compile_repeated_blocks(dynamic=False)

    @property
    def total_steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage(self) -> tuple[Stage, int]:
        """The stage of the next step, and how many of its steps are done."""
        done = self.step
        for stage in self.stages:
            if done < stage.steps:
                return stage, done
            done -= stage.steps
        raise ValueError(f"step {self.step} lies behind the last of {self.total_steps} steps")

    def loss(self) -> tuple[Tensor, Tensor]:
        """The velocity loss and the hint loss of a batch that is drawn."""
        stage, _ = self.stage()
        batch, generator, device = stage.batch, self.generator, self.device
        specs = clips.sample_specs(batch, generator)
        scenes = clips.draw_scenes(specs, generator).to(device)
        lengths = torch.where(torch.rand(batch, generator=generator) < stage.long_share, 33, 13)
        frames = subset.choose_frames(batch, stage.keep, lengths, generator)
        times = (frames / (lengths[:, None] - 1)).to(device)
        video = clips.render(scenes, times, stage.size)
        clean = vae.encode(video, self.matrix, self.offset)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        level = torch.sigmoid(torch.randn(batch, generator=generator)).to(device)
        level = model.FLOW_SHIFT * level / (1 + (model.FLOW_SHIFT - 1) * level)
        mixed = torch.lerp(clean, noise, level.view(-1, 1, 1, 1, 1))
        dropped = (torch.rand(batch, generator=generator) < 0.1).tolist()
        captions = ["" if d else s.caption() for s, d in zip(specs, dropped, strict=True)]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            text = self.encode_text(captions)
            velocity, middle = subset.subset_forward(
                self.transformer, mixed, level * 1000, text, frames.to(device)
            )
            guess = self.hint_head(middle)
        wanted = subset.hints(scenes, times, clean.shape[-1])
        loss = (velocity.float() - (noise - clean)).square().mean()
        return loss, (guess.float() - wanted).square().mean()

    def encode_text(self, captions: list[str]) -> Tensor:
        """Encode captions to ``[B, 16, text_dim]`` and tell cross-attention about the padding."""
        tokens = self.tokenizer(
            captions, padding="max_length", max_length=subset.TEXT_SLOTS, return_tensors="pt"
        ).to(self.device)
        mask = tokens.attention_mask
        bias = subset.padding_bias(mask, self.generator)
        for processor in self.processors:
            processor.bias = bias.to(torch.bfloat16)
        states = self.text_encoder(input_ids=tokens.input_ids, attention_mask=mask)
        text: Tensor = states.last_hidden_state * mask[..., None]
        return text.to(torch.bfloat16)

    def update(self) -> tuple[float, float]:
        """Make one step; the velocity loss and the hint loss."""
        stage, done = self.stage()
        change = (stage.final_rate - stage.first_rate) * done / stage.steps
        rate = min(1.0, (done + 1) / 20) * (stage.first_rate + change)
        for optimizer, base in zip(self.optimizers, (1.0, 0.5), strict=True):
            optimizer.param_groups[0]["lr"] = self.options.rate * base * rate
        loss, hint = self.loss()
        (loss + self.options.hint_weight * hint).backward()
        torch.nn.utils.clip_grad_norm_(self.parts.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        weight = 1 - min(self.options.average, self.step / (self.step + 10))
        current = [value.detach() for value in self.parts.parameters()]
        torch._foreach_lerp_(list(self.average.values()), current, weight)
        return loss.item(), hint.item()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the state under a unique name."""
        for name, value in self.parts.named_parameters():
            yield f"weights/{name}", value.detach()
            yield f"average/{name}", self.average[name]
        for number, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                for key, value in state.items():
                    yield f"optimizer{number}/{index}/{key}", value
        yield "random", self.generator.get_state()

    def save(self, folder: Path) -> None:
        """Write the whole state to ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.contiguous().cpu() for name, value in self._tensors()}
        info = {"step": str(self.step), "seconds": f"{self.seconds:.0f}"}
        save_file(tensors, folder / "state.tmp", metadata=info)
        (folder / "state.tmp").rename(folder / "state.safetensors")
        info_text = json.dumps({"step": self.step, "seconds": round(self.seconds)}, indent=2)
        (folder / "state.json").write_text(info_text + "\n")

    @torch.no_grad()
    def restore(self, folder: Path) -> None:
        """Continue from a state written by `save`."""
        tensors = load_file(folder / "state.safetensors")
        info = json.loads((folder / "state.json").read_text())
        self.step, self.seconds = int(info["step"]), float(info["seconds"])
        for name, weight in self.parts.named_parameters():
            weight.copy_(tensors[f"weights/{name}"])
            self.average[name].copy_(tensors[f"average/{name}"])
        for number, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Any]] = {}
            for name, value in tensors.items():
                head, _, rest = name.partition("/")
                if head == f"optimizer{number}":
                    index, _, key = rest.partition("/")
                    state.setdefault(int(index), {})[key] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        self.generator.set_state(tensors["random"])


def export(checkpoint: Path, folder: Path) -> None:
    """Build a pipeline folder from the averaged weights of a checkpoint."""
    tensors = load_file(checkpoint / "state.safetensors")
    built = {"transformer": model.build_transformer(), "text_encoder": model.build_text_encoder()}
    for part, module in built.items():
        prefix = f"average/{part}."
        values = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
        missing = module.load_state_dict(values, strict=False).missing_keys
        # UMT5 lists its embedding twice (shared); every other weight has to be there.
        if [name for name in missing if "embed_tokens" not in name and "shared" not in name]:
            raise ValueError(f"{checkpoint} lacks weights of {part}: {missing}")
    model.save_pipeline(folder, built["transformer"], built["text_encoder"], vae.build_vae())


def run(trainer: Trainer, out: Path, save_minutes: float) -> None:
    """Train until the stages are done or the process is asked to stop."""
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda signum, frame: stop.append(signum))
    started, saved, earlier = time.monotonic(), time.monotonic(), trainer.seconds
    recent: list[tuple[float, float]] = []
    while trainer.step < trainer.total_steps and not stop:
        stage, _ = trainer.stage()
        recent.append(trainer.update())
        if not math.isfinite(recent[-1][0]):
            raise FloatingPointError(f"the loss is {recent[-1][0]} at step {trainer.step}")
        trainer.seconds = earlier + time.monotonic() - started
        if trainer.step % 25 == 0:
            loss, hint = (sum(values) / len(recent) for values in zip(*recent, strict=True))
            line = f"step {trainer.step} {trainer.seconds:.0f} s loss {loss:.4f} hint {hint:.4f}"
            print(f"{line} ({stage.batch} x {stage.keep} frames of {stage.size} px)", flush=True)
            recent.clear()
        if time.monotonic() - saved > 60 * save_minutes:
            trainer.save(out)
            saved = time.monotonic()
    trainer.save(out)
    print(f"saved {out} at step {trainer.step} of {trainer.total_steps}", flush=True)


def main() -> None:
    """Parse the command line and train, or export."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the checkpoint")
    add("--export", type=Path, help="only build a pipeline folder from the checkpoint")
    add("--stages", default=DEFAULT_STAGES, help="see Stage; separated by semicolons")
    add("--seed", type=int, default=0, help="seed of weights and clips")
    add("--rate", type=float, default=3e-3, help="learning rate of Muon (AdamW uses half)")
    add("--average", type=float, default=0.99, help="decay of the moving average")
    add("--hint-weight", type=float, default=0.2, help="weight of the second task")
    add("--save-minutes", type=float, default=4.0, help="minutes between checkpoints")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="compile blocks")
    options = parser.parse_args()
    if options.export:
        export(options.out, options.export)
        return
    trainer = Trainer([Stage.parse(text) for text in options.stages.split(";")], options)
    if (options.out / "state.safetensors").is_file():
        trainer.restore(options.out)
    run(trainer, options.out, options.save_minutes)


if __name__ == "__main__":
    main()
