"""A small contrastive text-video model: CLIP for the demo's world.

Two towers, trained by `examples/train_contrast.py` on drawn clips and their captions, never on
generated ones, put clips, single frames and captions on one sphere (Radford et al. 2021). The
cosine there is the CLIP score of the demo, and the features below it give the set distances. Both
mean something for the demo's captions only: words outside its vocabulary are refused.
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
    resized,
    separate,
    trained,
)
from diffpatch.pipelines.demo import clips

WEIGHTS = Path(__file__).parents[2] / "weights" / "contrast.safetensors"
FEATURES, EMBEDDING = 128, 64


class UnknownWords(ValueError):
    """The text has words that the model was never trained on."""


class Contrast(nn.Module):
    """Embeds clips, frames and captions; 0.6 M parameters at the default width."""

    def __init__(self, width: int = 32) -> None:
        """An untrained model."""
        super().__init__()
        self.look = look_tower(width)
        self.watch = nn.Sequential(
            convolution(3 * MOMENTS, width, 2),
            convolution(width, 2 * width, 2),
            convolution(2 * width, 4 * width, 2),
        )
        self.join = nn.Linear(16 * width, FEATURES)
        self.clip_head = nn.Linear(FEATURES, EMBEDDING)
        self.frame_head = nn.Linear(8 * width, EMBEDDING)
        self.words = nn.Embedding(len(clips.vocabulary()) + 1, FEATURES, padding_idx=0)
        self.text = nn.Sequential(
            nn.Linear(FEATURES, 2 * FEATURES), nn.GELU(), nn.Linear(2 * FEATURES, EMBEDDING)
        )
        self.log_scale = nn.Parameter(torch.tensor(2.5))  # of the logits, in training only

    def features(self, video: Tensor) -> Tensor:
        """What describes whole clips, motion included, by numbers.

        Args:
            video: ``[B, 3, F, H, W]`` float in [-1, 1]; any length, any size.

        Returns:
            ``[B, 128]`` float32.
        """
        looks, moments = chosen_frames(video)
        seen = self._seen(looks.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, LOOKS)).mean(1)
        small = separate(moments, MOMENT_SIZE)
        watch = self.watch(small.unflatten(0, (-1, MOMENTS)).flatten(1, 2))
        moved = torch.cat([watch.mean((2, 3)), watch.amax((2, 3))], dim=1)
        return functional.gelu(self.join(torch.cat([seen, moved], dim=1).float()))

    def embed_clips(self, video: Tensor) -> Tensor:
        """Unit vectors ``[B, 64]`` of clips ``[B, 3, F, H, W]`` in [-1, 1]."""
        return functional.normalize(self.clip_head(self.features(video)).float(), dim=-1)

    def embed_frames(self, frames: Tensor) -> Tensor:
        """Unit vectors ``[N, 64]`` of single frames ``[N, 3, H, W]`` in [-1, 1], motion unseen."""
        return functional.normalize(self.frame_features(frames), dim=-1)

    def frame_features(self, frames: Tensor) -> Tensor:
        """The same before normalisation: ``[N, 64]`` float32."""
        return self.frame_head(self._seen(frames.float())).float()

    def embed_text(self, captions: Sequence[str]) -> Tensor:
        """Unit vectors ``[N, 64]`` of captions.

        Raises:
            UnknownWords: a caption uses a word outside the demo's world.
        """
        tokens = tokenize(captions).to(self.words.weight.device)
        known = (tokens > 0).sum(1, keepdim=True).clamp(min=1)
        mean = self.words(tokens).sum(1) / known
        return functional.normalize(self.text(mean * 3).float(), dim=-1)

    def _seen(self, frames: Tensor) -> Tensor:
        """What single frames ``[N, 3, H, W]`` show, ``[N, 8 * width]``."""
        look = self.look(resized(frames, LOOK_SIZE))
        return torch.cat([look.mean((2, 3)), look.amax((2, 3))], dim=1).float()


def tokenize(captions: Sequence[str]) -> Tensor:
    """Captions as word numbers ``[N, words]``, 0 where a caption is shorter.

    Raises:
        UnknownWords: a caption is empty or uses a word outside the demo's world.
    """
    numbers = {word: index for index, word in enumerate(clips.vocabulary(), 1)}
    rows = []
    for caption in captions:
        words = caption.lower().split()
        unknown = sorted({word for word in words if word not in numbers})
        if unknown or not words:
            raise UnknownWords(
                f"{caption!r} is not about the demo's world ({', '.join(unknown) or 'empty'}); "
                "give a CLIP model for other texts"
            )
        rows.append(torch.tensor([numbers[word] for word in words]))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def load_contrast(path: Path = WEIGHTS) -> Contrast:
    """The trained model in float32, ready to use.

    Raises:
        FileNotFoundError: the weights are missing.
    """
    model = trained(Contrast(), path, "examples/train_contrast.py")
    return model.requires_grad_(False)
