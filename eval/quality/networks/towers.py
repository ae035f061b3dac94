"""What the networks that judge the demo's clips share: their towers, and how clips enter them."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

LOOKS, MOMENTS = 3, 9  # frames seen one by one at 64 px, and frames seen together at 32 px
LOOK_SIZE, MOMENT_SIZE = 64, 32

Network = TypeVar("Network", bound=nn.Module)


def convolution(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """A layer of both towers."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.GELU()
    )


def look_tower(width: int) -> nn.Sequential:
    """What sees frames one by one, for shapes and patterns: ``4 * width`` channels."""
    return nn.Sequential(
        convolution(3, width, 2),
        convolution(width, 2 * width, 2),
        convolution(2 * width, 2 * width, 1),
        convolution(2 * width, 4 * width, 2),
        convolution(4 * width, 4 * width, 1),
    )


def chosen_frames(video: Tensor) -> tuple[Tensor, Tensor]:
    """The frames seen one by one and those seen together, evenly spaced over a clip.

    Args:
        video: ``[B, 3, F, H, W]``.

    Raises:
        ValueError: it has another shape.
    """
    if video.ndim != 5 or video.shape[1] != 3:
        raise ValueError(f"video has shape {tuple(video.shape)}; expected [B, 3, F, H, W]")
    last = video.shape[2] - 1
    moments = video[:, :, [round(i * last / (MOMENTS - 1)) for i in range(MOMENTS)]].float()
    return moments[:, :, :: (MOMENTS - 1) // (LOOKS - 1)], moments


def separate(video: Tensor, size: int) -> Tensor:
    """``[B, 3, K, H, W]`` as frames ``[B * K, 3, size, size]``."""
    return resized(video.transpose(1, 2).flatten(0, 1), size)


def resized(frames: Tensor, size: int) -> Tensor:
    """Frames ``[N, 3, H, W]`` as squares."""
    if frames.shape[-2:] == (size, size):
        return frames
    return functional.interpolate(frames, (size, size), mode="area")


def trained(network: Network, path: Path, script: str) -> Network:
    """A network with trained weights in float32, ready to use.

    Raises:
        FileNotFoundError: the weights are missing; names the script that makes them.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there are no weights at {path}; train them with {script}")
    network.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return network.eval()
