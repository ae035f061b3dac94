"""What set distances compare: a clip (F, 3, H, W) in [0, 1] as rows of features.

`load_features` takes the shipped networks by name and any other by path or hub id. Networks for
videos give a row a clip (Fréchet distance on them is FVD-style), networks for images a row a frame
(FID-style). A function of your own is an extractor as soon as it has a `name` and a `row`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from diffpatch.errors import choices
from diffpatch.eval.quality.networks.clip import (
    WeightsError,
    load_part,
    load_processor,
    load_transformer,
    revision_of,
)

SHIPPED = ("contrast", "frames", "judge")
IMAGE_MODELS = ("clip", "clip_vision_model", "dinov2", "dinov2_with_registers", "siglip")
VIDEO_MODELS = ("videomae",)


class Extractor(Protocol):
    """What turns a clip into rows of features.

    Attributes:
        name: part of every result, as distances on other features cannot be compared with it.
        row: what a row of features describes, "clip" or "frame".
    """

    name: str
    row: str

    def __call__(self, frames: Tensor) -> Tensor:
        """Frames (F, 3, H, W) in [0, 1] -> features (n, D), on the CPU."""


class DemoFeatures:
    """What ships with diffpatch: clips or frames by the contrastive model, clips by the judge."""

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        """Load the network by its name, one of `SHIPPED`."""
        from diffpatch.eval.quality.networks.contrast import load_contrast
        from diffpatch.eval.quality.networks.judge import load_judge

        self.name, self.row = name, "frame" if name == "frames" else "clip"
        self.device = torch.device(device)
        model: Any = load_judge() if name == "judge" else load_contrast()
        self.model = model.to(self.device)

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> Tensor:
        video = 2 * frames.float().to(self.device) - 1
        if self.row == "frame":
            return self.model.frame_features(video).cpu()
        return self.model.features(video.transpose(0, 1)[None]).float().cpu()


class ImageFeatures:
    """A transformers vision model, a row a frame: its pooled output (DINOv2: the class token)."""

    row = "frame"

    def __init__(self, source: str | Path, device: torch.device | str = "cpu") -> None:
        """Load the model and its preprocessing from a folder or the hub."""
        from transformers import AutoModel

        self.device = torch.device(device)
        model: Any = load_transformer(AutoModel, source)
        self.name = revision_of(source, model)
        self.model = getattr(model, "vision_model", model).to(self.device)
        self.prepare = load_processor(source)

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> Tensor:
        pixels = self.prepare(frames).to(self.device)
        return self.model(pixel_values=pixels).pooler_output.float().cpu()


class VideoFeatures:
    """A transformers video model, a row a clip: the mean of its last tokens."""

    row = "clip"

    def __init__(self, source: str | Path, device: torch.device | str = "cpu") -> None:
        """Load the model and its preprocessing from a folder or the hub."""
        from transformers import AutoModel

        self.device = torch.device(device)
        self.model: Any = load_transformer(AutoModel, source).to(self.device)
        self.name = revision_of(source, self.model)
        self.prepare = load_processor(source)
        config = self.model.config
        self.frames = int(config.num_frames)

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> Tensor:
        """As many frames as the model was made for, evenly from the first to the last."""
        picks = torch.linspace(0, len(frames) - 1, self.frames).round().long()
        pixels = self.prepare(frames[picks])
        pixels = pixels.reshape(1, self.frames, *pixels.shape[-3:]).to(self.device)
        return self.model(pixel_values=pixels).last_hidden_state.mean(1).float().cpu()


def load_features(source: str | Path, device: torch.device | str = "cpu") -> Extractor:
    """An extractor by name or by place.

    Args:
        source: "contrast", "frames" or "judge"; a folder or hub id of a transformers model (CLIP,
            DINOv2, SigLIP, VideoMAE); or a safetensors file with the weights of FID's Inception.
        device: where to compute.

    Raises:
        WeightsError: it cannot be found, or is none of these.
    """
    if str(source) in SHIPPED:
        return DemoFeatures(str(source), device)
    path = Path(source).expanduser()
    if path.suffix == ".safetensors":
        from diffpatch.eval.quality.networks.inception import Inception

        return Inception.load(path, device)
    kind = _model_type(source, path)
    if kind in VIDEO_MODELS:
        return VideoFeatures(source, device)
    if kind in IMAGE_MODELS:
        return ImageFeatures(source, device)
    raise WeightsError(
        f"{source} is a model of type {kind!r}; features come from "
        f"{', '.join((*IMAGE_MODELS, *VIDEO_MODELS))}, or {' or '.join(SHIPPED)}"
    )


def _model_type(source: str | Path, path: Path) -> str:
    if path.is_dir():
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            return str(config["model_type"])
        except (OSError, ValueError, KeyError, TypeError):
            raise WeightsError(
                f"{source} has no config.json that names its model_type; give the folder that "
                "save_pretrained wrote"
            ) from None
    if "/" not in str(source) or path.exists():
        raise WeightsError(
            f"no features {str(source)!r}: {choices(str(source), SHIPPED)}, a folder, a hub id "
            "such as owner/name, or Inception weights as safetensors"
        )
    from transformers import AutoConfig

    return str(load_part(AutoConfig, source).model_type)
