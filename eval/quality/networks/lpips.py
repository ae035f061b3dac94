"""LPIPS: how different two frames look to AlexNet (Zhang et al. 2018), with the user's weights.

Version 0.1 on frames scaled to [-1, 1], averaged over space: the convention most papers mean. The
weights are not ours to ship; offline and without a file there is no LPIPS, never a stand-in.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffpatch.eval.quality.metrics import Score, check_pair
from diffpatch.eval.quality.networks.clip import WeightsError

MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of the inputs, in [-1, 1]
CHANNELS = (64, 192, 384, 256, 256)
SMALLEST = 31  # pixels a side that leave one at the deepest layer
NAMES = (
    "features.{0,3,6,8,10}.{weight,bias} of torchvision's AlexNet and lin{0..4}.model.1.weight "
    "of lpips 0.1"
)
_HEAD = "lin{}.model.1.weight"


class Lpips(nn.Module):
    """AlexNet's five activations, compared channel by channel with learned weights."""

    def __init__(self) -> None:
        """Build the network without weights worth anything; see `load_lpips`."""
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)]
        layers += [nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
        for inputs, outputs in ((192, 384), (384, 256), (256, 256)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.heads = nn.ParameterList(torch.zeros(1, width, 1, 1) for width in CHANNELS)

    def forward(self, frames: Tensor, reference: Tensor) -> Tensor:
        """Distances (F,) of frames (F, 3, H, W) in [0, 1]; 0 for equal ones."""
        total = torch.zeros(len(frames), device=frames.device)
        pairs = zip(self._layers(frames), self._layers(reference), self.heads, strict=True)
        for a, b, head in pairs:
            total = total + ((a - b).square() * head).sum(1).mean((1, 2))
        return total

    def _layers(self, frames: Tensor) -> list[Tensor]:
        mean, std = (torch.tensor(v, device=frames.device).view(1, 3, 1, 1) for v in (MEAN, STD))
        values = (2 * frames - 1 - mean) / std
        found = []
        for layer in self.features:
            values = layer(values)
            if isinstance(layer, nn.ReLU):
                found.append(values / (values.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found


def load_lpips(path: str | Path, device: torch.device | str = "cpu") -> Lpips:
    """LPIPS with the weights of a safetensors file, or of all safetensors files of a folder.

    Args:
        path: holds the backbone and the linear heads under their usual names: ``features.0.weight``
            and so on as in torchvision's AlexNet, ``lin0.model.1.weight`` and so on as in lpips
            0.1. Other tensors, such as AlexNet's classifier, are ignored.
        device: where to compute.

    Raises:
        WeightsError: the file is missing, no safetensors file, or lacks a tensor.
    """
    path = Path(path).expanduser()
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() and file.suffix == ".safetensors" for file in files):
        raise WeightsError(
            f"{path} is not a safetensors file (or folder of them) with {NAMES}; convert a .pth "
            "with safetensors.torch.save_file(torch.load(file, weights_only=True), out)"
        )
    found: dict[str, Tensor] = {}
    for file in files:
        found |= load_file(file)
    model = Lpips()
    wanted = model.state_dict()
    names = {key: _HEAD.format(key[6:]) if key.startswith("heads.") else key for key in wanted}
    for key, name in names.items():
        if name not in found or found[name].shape != wanted[key].shape:
            shape = tuple(found[name].shape) if name in found else "nothing"
            raise WeightsError(
                f"{path} must hold {name} of shape {tuple(wanted[key].shape)}, has {shape}; "
                f"wanted are {NAMES}"
            )
        wanted[key] = found[name].float()
    model.load_state_dict(wanted)
    return model.eval().requires_grad_(False).to(device)


@torch.no_grad()
def lpips(model: Lpips, frames: Tensor, reference: Tensor) -> Score:
    """LPIPS per frame and its mean; frames are (F, 3, H, W) in [0, 1], of at least 31 pixels."""
    check_pair(frames, reference)
    if min(frames.shape[-2:]) < SMALLEST:
        raise ValueError(f"LPIPS needs frames of at least {SMALLEST}×{SMALLEST} pixels, "
                         f"got {tuple(frames.shape)}")  # fmt: skip
    device = model.heads[0].device
    pairs = zip(frames.split(8), reference.split(8), strict=True)
    values = [model(a.float().to(device), b.float().to(device)).cpu() for a, b in pairs]
    return Score.of(torch.cat(values))
