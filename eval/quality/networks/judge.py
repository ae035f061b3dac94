"""The attribute judge: does a clip show what its caption says?

A small convolutional network, trained on clips drawn by the same renderer as the demo model's but
never on generated ones, reads six attributes back from pixels. Its features also give a Fréchet
distance between two sets of clips, comparable only among clips judged by this network.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffpatch.eval.quality.networks.towers import (
    LOOK_SIZE,
    LOOKS,
    MOMENT_SIZE,
    MOMENTS,
    chosen_frames,
    convolution,
    look_tower,
    separate,
    trained,
)
from diffpatch.pipelines.demo import clips

WEIGHTS = Path(__file__).parents[2] / "weights" / "judge.safetensors"
FEATURES = 96


class Judge(nn.Module):
    """What reads the attributes of `diffpatch.pipelines.demo.clips.ATTRIBUTES` from clips."""

    def __init__(self, width: int = 32) -> None:
        """An untrained judge; 0.4 M parameters at the default width."""
        super().__init__()
        self.look = look_tower(width)
        self.watch = nn.Sequential(
            convolution(3 * MOMENTS, width, 2),
            convolution(width, 2 * width, 2),
            convolution(2 * width, 2 * width, 2),
        )
        self.join = nn.Linear(12 * width, FEATURES)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(FEATURES, len(values)) for name, values in clips.ATTRIBUTES.items()}
        )

    def features(self, video: Tensor) -> Tensor:
        """What describes clips by numbers.

        Args:
            video: ``[B, 3, F, H, W]`` float in [-1, 1]; any length, any square size of at
                least 64 px.

        Returns:
            ``[B, 96]`` float32.
        """
        looks, moments = chosen_frames(video)
        look = self.look(separate(looks, LOOK_SIZE)).unflatten(0, (-1, LOOKS))
        watch = self.watch(separate(moments, MOMENT_SIZE).unflatten(0, (-1, MOMENTS)).flatten(1, 2))
        seen = torch.cat([look.mean((3, 4)), look.amax((3, 4))], dim=2).mean(1)
        moved = torch.cat([watch.mean((2, 3)), watch.amax((2, 3))], dim=1)
        return functional.gelu(self.join(torch.cat([seen, moved], dim=1).float()))

    def forward(self, video: Tensor) -> dict[str, Tensor]:
        """The logits of every attribute, each ``[B, number of values]``."""
        features = self.features(video)
        return {name: head(features) for name, head in self.heads.items()}


def load_judge(path: Path = WEIGHTS) -> Judge:
    """The trained judge in float32, ready to use.

    Raises:
        FileNotFoundError: the weights are missing.
    """
    return trained(Judge(), path, "examples/train_judge.py")


def targets(specs: Sequence[clips.ClipSpec]) -> dict[str, Tensor]:
    """The right answers for B captions: ``[B]`` indices per attribute."""
    labels = [spec.labels() for spec in specs]
    return {name: torch.tensor([row[name] for row in labels]) for name in clips.ATTRIBUTES}


@torch.no_grad()
def answers(judge: Judge, video: Tensor) -> dict[str, Tensor]:
    """The judge's answers for B clips: ``[B]`` indices per attribute."""
    return {name: logits.argmax(dim=1).cpu() for name, logits in judge(video).items()}


def accuracy(judge: Judge, video: Tensor, specs: Sequence[clips.ClipSpec]) -> dict[str, float]:
    """Share of the clips in which each attribute is as the caption says.

    Args:
        judge: A trained judge.
        video: ``[B, 3, F, H, W]`` in [-1, 1].
        specs: The B captions that the clips were made from.
    """
    given, wanted = answers(judge, video), targets(specs)
    return {name: (given[name] == wanted[name]).float().mean().item() for name in wanted}
