"""The Inception v3 of FID, with the user's weights.

It is the network of 2015 that FID was defined on, not the one of today's model zoos: its average
pools leave out the padding and its last block takes a maximum. Names are those of the usual PyTorch
port, so its weights load as they are once they are safetensors. Frames are resized to 299×299
without antialiasing and scaled to [-1, 1], as that port does.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from diffpatch.eval.quality.networks.clip import WeightsError

SIDE, FEATURES = 299, 2048
_IGNORED = ("fc.", "AuxLogits.")
_COUNTER = "num_batches_tracked"

# A branch is a chain of convolutions; a chain's fork ends in two whose outputs are joined.
_Kernel = int | tuple[int, int]
_Chain = list[tuple[str, int, _Kernel]]
_WIDE, _TALL = (1, 7), (7, 1)


class Convolution(nn.Module):
    """Convolution, batch norm, ReLU; keeps the size unless it has a stride or is `valid`."""

    def __init__(
        self, inputs: int, outputs: int, kernel: _Kernel, stride: int = 1, valid: bool = False
    ) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        around = (0, 0) if valid or stride > 1 else (sides[0] // 2, sides[1] // 2)
        self.conv = nn.Conv2d(inputs, outputs, sides, stride, around, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.ModuleDict):
    """Chains side by side, and a pool with or without a convolution, joined along the channels."""

    def __init__(
        self, inputs: int, chains: list[_Chain], pool: str, pooled: int = 0, stride: int = 1
    ) -> None:
        super().__init__()
        self.plan = chains
        self.pool, self.stride = pool, stride
        for chain in chains:
            width = inputs
            for number, (name, outputs, kernel) in enumerate(chain):
                last = stride if number == len(chain) - 1 else 1
                self[name] = Convolution(width, outputs, kernel, last)
                if not name.endswith("a"):  # of a fork, both ends start from the same
                    width = outputs
        if pooled:
            self["branch_pool"] = Convolution(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for chain in self.plan:
            value = x
            for name, _, _ in chain:
                if name.endswith("a"):
                    found.append(self[name](value))
                else:
                    value = self[name](value)
            found.append(value)
        around = 1 if self.stride == 1 else 0
        if self.pool == "max":
            value = F.max_pool2d(x, 3, self.stride, around)
        else:
            value = F.avg_pool2d(x, 3, self.stride, around, count_include_pad=False)
        found.append(self["branch_pool"](value) if "branch_pool" in self else value)
        return torch.cat(found, dim=1)


def _first(inputs: int, pooled: int) -> Mixed:
    five: _Chain = [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)]
    three: _Chain = [("branch3x3dbl_1", 64, 1)]
    three += [("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]
    return Mixed(inputs, [[("branch1x1", 64, 1)], five, three], "average", pooled)


def _second(width: int) -> Mixed:
    short: _Chain = [("branch7x7_1", width, 1), ("branch7x7_2", width, _WIDE)]
    short += [("branch7x7_3", 192, _TALL)]
    long: _Chain = [("branch7x7dbl_1", width, 1), ("branch7x7dbl_2", width, _TALL)]
    long += [("branch7x7dbl_3", width, _WIDE), ("branch7x7dbl_4", width, _TALL)]
    long += [("branch7x7dbl_5", 192, _WIDE)]
    return Mixed(768, [[("branch1x1", 192, 1)], short, long], "average", 192)


def _third(inputs: int, pool: str) -> Mixed:
    short: _Chain = [("branch3x3_1", 384, 1), ("branch3x3_2a", 384, (1, 3))]
    short += [("branch3x3_2b", 384, (3, 1))]
    long: _Chain = [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3)]
    long += [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))]
    return Mixed(inputs, [[("branch1x1", 320, 1)], short, long], pool, 192)


def _shrink_first() -> Mixed:
    long: _Chain = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3)]
    long += [("branch3x3dbl_3", 96, 3)]
    return Mixed(288, [[("branch3x3", 384, 3)], long], "max", stride=2)


def _shrink_second() -> Mixed:
    short: _Chain = [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)]
    long: _Chain = [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, _WIDE)]
    long += [("branch7x7x3_3", 192, _TALL), ("branch7x7x3_4", 192, 3)]
    return Mixed(768, [short, long], "max", stride=2)


class Inception(nn.Module):
    """Frames (F, 3, H, W) in [0, 1] -> features (F, 2048), on the CPU."""

    name = "inception (FID, 2048)"
    row = "frame"

    def __init__(self) -> None:
        """Build the network without weights worth anything; see `load`."""
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, valid=True)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, valid=True)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = (
            _first(192, 32),
            _first(256, 64),
            _first(288, 64),
        )
        self.Mixed_6a = _shrink_first()
        self.Mixed_6b, self.Mixed_6c = _second(128), _second(160)
        self.Mixed_6d, self.Mixed_6e = _second(160), _second(192)
        self.Mixed_7a = _shrink_second()
        self.Mixed_7b, self.Mixed_7c = _third(1280, "average"), _third(2048, "max")

    @torch.no_grad()
    def forward(self, frames: Tensor) -> Tensor:
        """Features of every frame, computed eight frames at a time."""
        device = self.Conv2d_1a_3x3.conv.weight.device
        return torch.cat([self._features(part.to(device)).cpu() for part in frames.split(8)])

    def _features(self, frames: Tensor) -> Tensor:
        value = F.interpolate(frames.float(), (SIDE, SIDE), mode="bilinear", align_corners=False)
        value = 2 * value - 1
        for name, block in self.named_children():
            if name in ("Conv2d_3b_1x1", "Mixed_5b"):
                value = F.max_pool2d(value, 3, 2)
            value = block(value)
        return value.mean((2, 3))

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> Inception:
        """The network with the weights of a safetensors file; its classifier is ignored.

        Raises:
            WeightsError: the file is missing, or its tensors are not this network's.
        """
        if not path.is_file():
            raise WeightsError(f"there is no file {path}; give FID's Inception as safetensors")
        found = {k: v for k, v in load_file(path).items() if not k.startswith(_IGNORED)}
        with torch.device("meta"):  # drawing weights that are replaced at once takes seconds
            model = cls()
        wanted = model.state_dict()
        for key, value in wanted.items():
            if key.endswith(_COUNTER):
                found[key] = torch.zeros((), dtype=torch.long)
            elif key not in found or found[key].shape != value.shape:
                raise WeightsError(
                    f"{path} is not FID's Inception: it has no {key} of shape {tuple(value.shape)}"
                )
        fitting = {key: found[key].to(value.dtype) for key, value in wanted.items()}
        model.load_state_dict(fitting, assign=True)
        return model.eval().requires_grad_(False).to(device)
