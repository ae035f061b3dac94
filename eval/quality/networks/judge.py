"""The attribute judge: does a clip show what its caption says?

A small convolutional network, trained on clips drawn by the same renderer as the demo model's but
never on generated ones, reads six attributes back from pixels. Its features also give a Fréchet
distance between two sets of clips, comparable only among clips judged by this network.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from diffpatch.pipelines.demo import clips

WEIGHTS = Path(__file__).parents[2] / "weights" / "judge.safetensors"
FEATURES = 96
LOOKS = 3  # frames seen one by one at 64 px, for shapes and patterns
MOMENTS = 9  # frames seen together at 32 px, for motion


def _convolution(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.GELU()
    )


class Judge(nn.Module):
    """Reads the attributes of :data:`diffpatch.pipelines.demo.clips.ATTRIBUTES` from clips."""

    def __init__(self, width: int = 32) -> None:
        """Builds an untrained judge (0.4 M parameters at the default width)."""
        super().__init__()
        self.look = nn.Sequential(
            _convolution(3, width, 2),
            _convolution(width, 2 * width, 2),
            _convolution(2 * width, 2 * width, 1),
            _convolution(2 * width, 4 * width, 2),
            _convolution(4 * width, 4 * width, 1),
        )
        self.watch = nn.Sequential(
            _convolution(3 * MOMENTS, width, 2),
            _convolution(width, 2 * width, 2),
            _convolution(2 * width, 2 * width, 2),
        )
        self.join = nn.Linear(12 * width, FEATURES)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(FEATURES, len(values)) for name, values in clips.ATTRIBUTES.items()}
        )

    def features(self, video: Tensor) -> Tensor:
        """Describes clips by numbers.

        Args:
            video: ``[B, 3, F, H, W]`` float in [-1, 1]; any length, any square size of at
                least 64 px.

        Returns:
            ``[B, 96]`` float32.
        """
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"video has shape {tuple(video.shape)}; expected [B, 3, F, H, W]")
        last = video.shape[2] - 1
        moments = video[:, :, [round(i * last / (MOMENTS - 1)) for i in range(MOMENTS)]].float()
        looks = moments[:, :, :: (MOMENTS - 1) // (LOOKS - 1)]
        look = self.look(_frames(looks, 64)).unflatten(0, (-1, LOOKS))
        watch = self.watch(_frames(moments, 32).unflatten(0, (-1, MOMENTS)).flatten(1, 2))
        seen = torch.cat([look.mean((3, 4)), look.amax((3, 4))], dim=2).mean(1)
        moved = torch.cat([watch.mean((2, 3)), watch.amax((2, 3))], dim=1)
        return functional.gelu(self.join(torch.cat([seen, moved], dim=1).float()))

    def forward(self, video: Tensor) -> dict[str, Tensor]:
        """Returns the logits of every attribute, each ``[B, number of values]``."""
        features = self.features(video)
        return {name: head(features) for name, head in self.heads.items()}


def _frames(video: Tensor, size: int) -> Tensor:
    """Turns ``[B, 3, K, H, W]`` into separate frames ``[B * K, 3, size, size]``."""
    frames = video.transpose(1, 2).flatten(0, 1)
    if frames.shape[-1] == size:
        return frames
    return functional.interpolate(frames, (size, size), mode="area")


def load_judge(path: Path = WEIGHTS) -> Judge:
    """Loads the trained judge in float32, ready to use.

    Raises:
        FileNotFoundError: If the weights are missing.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no judge weights at {path}; train them with examples/train_judge.py"
        )
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return judge.eval()


def targets(specs: Sequence[clips.ClipSpec]) -> dict[str, Tensor]:
    """Returns the right answers for B captions: ``[B]`` indices per attribute."""
    labels = [spec.labels() for spec in specs]
    return {name: torch.tensor([row[name] for row in labels]) for name in clips.ATTRIBUTES}


@torch.no_grad()
def answers(judge: Judge, video: Tensor) -> dict[str, Tensor]:
    """Returns the judge's answers for B clips: ``[B]`` indices per attribute."""
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
