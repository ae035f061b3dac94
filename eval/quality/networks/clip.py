"""Image-text models that score frames against a prompt: the demo's own, or any CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from diffpatch.errors import BadParameter
from diffpatch.eval.quality.networks.contrast import Contrast, UnknownWords, load_contrast, tokenize


class WeightsError(BadParameter):
    """Weights for an evaluation cannot be found or loaded; the message says what to do."""


class TextImage(Protocol):
    """Puts frames and texts on one sphere.

    Attributes:
        name: what made the numbers; part of every result.
    """

    name: str

    def refuses(self, text: str) -> str | None:
        """Why this model cannot judge a text; None if it can."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (N, D) of texts."""

    def frames(self, frames: Tensor) -> Tensor:
        """Unit vectors (F, D) of frames (F, 3, H, W) in [0, 1]."""

    def clip(self, frames: Tensor) -> Tensor:
        """Unit vectors (n, D) of a clip (F, 3, H, W) in [0, 1] as it is scored against a text."""


class DemoClip:
    """The contrastive model that ships with diffpatch: sees motion, knows the demo's words only."""

    name = "contrast"

    def __init__(self, model: Contrast | None = None, device: torch.device | str = "cpu") -> None:
        """Load the shipped weights unless a model is given."""
        self.model = (load_contrast() if model is None else model).to(device)
        self.device = torch.device(device)

    def refuses(self, text: str) -> str | None:
        try:
            tokenize([text])
        except UnknownWords as error:
            return str(error)
        return None

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        return self.model.embed_text(texts).cpu()

    @torch.no_grad()
    def frames(self, frames: Tensor) -> Tensor:
        return self.model.embed_frames(2 * frames.float().to(self.device) - 1).cpu()

    @torch.no_grad()
    def clip(self, frames: Tensor) -> Tensor:
        """The clip as a whole, (1, 64)."""
        video = 2 * frames.float().to(self.device) - 1
        return self.model.embed_clips(video.transpose(0, 1)[None]).cpu()


class HubClip:
    """A transformers CLIP from a folder or the hub, with the preprocessing it was trained with."""

    def __init__(self, source: str | Path, device: torch.device | str = "cpu") -> None:
        """Load model, tokenizer and image processor.

        Raises:
            WeightsError: they are not there or not a CLIP with safetensors.
        """
        from transformers import AutoTokenizer, CLIPModel

        self.device = torch.device(device)
        self.model: Any = load_transformer(CLIPModel, source).to(self.device)
        self.tokenizer = load_part(AutoTokenizer, source)
        self.prepare = load_processor(source)
        self.name = revision_of(source, self.model)

    def refuses(self, text: str) -> str | None:
        return None if text.strip() else "an empty prompt says nothing to compare with"

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt"
        ).to(self.device)
        return _unit(self.model.get_text_features(**tokens))

    @torch.no_grad()
    def frames(self, frames: Tensor) -> Tensor:
        pixels = self.prepare(frames).to(self.device)
        return _unit(self.model.get_image_features(pixel_values=pixels))

    def clip(self, frames: Tensor) -> Tensor:
        """Every frame by itself, (F, D): the score of a clip is the mean over its frames."""
        return self.frames(frames)


def load_clip(source: str | Path, device: torch.device | str = "cpu") -> TextImage:
    """The shipped model for "contrast", else a CLIP folder or hub id."""
    return DemoClip(device=device) if str(source) == "contrast" else HubClip(source, device)


def load_transformer(cls: Any, source: str | Path) -> Any:
    """A transformers model in fp32 and ready to use, from safetensors only.

    Raises:
        WeightsError: it cannot be loaded.
    """
    return load_part(cls, source, use_safetensors=True).float().eval().requires_grad_(False)


def load_part(cls: Any, source: str | Path, **options: Any) -> Any:
    """`from_pretrained` of a folder or hub id, its many errors in one line."""
    name = str(Path(source).expanduser()) if Path(source).expanduser().exists() else str(source)
    try:
        return cls.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"{source} cannot be loaded as {cls.__name__}: {first}; give a folder that "
            "save_pretrained wrote, or a hub id"
        ) from error


def load_processor(source: str | Path) -> Any:
    """The image preprocessing of a model: frames (F, 3, H, W) in [0, 1] -> pixel values."""
    from transformers import AutoImageProcessor

    processor = load_part(AutoImageProcessor, source)

    def prepare(frames: Tensor) -> Tensor:
        pixels = (frames.float().clamp(0, 1) * 255).round().to(torch.uint8)
        images = list(pixels.permute(0, 2, 3, 1).cpu().numpy())  # what processors were made for
        return processor(images=images, return_tensors="pt")["pixel_values"]

    return prepare


def revision_of(source: str | Path, model: Any) -> str:
    """The name of a model in results: its source, and its commit on the hub where it has one."""
    commit = getattr(model.config, "_commit_hash", None)
    return f"{source}@{commit[:12]}" if commit else str(source)


def _unit(output: Any) -> Tensor:
    """Unit vectors from what get_*_features returns: a tensor, or an output in transformers 5."""
    values = output if isinstance(output, Tensor) else output.pooler_output
    return functional.normalize(values.float(), dim=-1).cpu()
