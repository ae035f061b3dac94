"""Tiny random CLIP, DINOv2 and VideoMAE folders, and LPIPS weights, as the hub would hold them."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    VideoMAEConfig,
    VideoMAEImageProcessor,
    VideoMAEModel,
)

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
PICTURE: dict[str, Any] = {"image_size": 32, "patch_size": 16}


def save_clip(folder: Path) -> None:
    """A CLIP with 16 embedding channels and a tokenizer of single letters."""
    torch.manual_seed(0)
    letters = list(string.ascii_lowercase)
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    text = SMALL | {"vocab_size": len(words), "max_position_embeddings": 24}
    text |= {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    config = CLIPConfig(text_config=text, vision_config=SMALL | PICTURE, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate(words)}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    CLIPImageProcessor(**_sizes()).save_pretrained(folder)


def save_dinov2(folder: Path) -> None:
    """A DINOv2 with 32 features."""
    torch.manual_seed(1)
    sizes = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
    Dinov2Model(Dinov2Config(**sizes, **PICTURE)).save_pretrained(folder)
    CLIPImageProcessor(**_sizes()).save_pretrained(folder)


def save_videomae(folder: Path) -> None:
    """A VideoMAE with 32 features that looks at four frames."""
    torch.manual_seed(2)
    config = VideoMAEConfig(**SMALL, **PICTURE, num_frames=4, tubelet_size=2)
    VideoMAEModel(config).save_pretrained(folder)
    VideoMAEImageProcessor(**_sizes()).save_pretrained(folder)


def save_lpips(path: Path) -> None:
    """AlexNet and linear heads under the names of torchvision and lpips, with random values."""
    generator = torch.Generator().manual_seed(3)
    layers = {
        0: (64, 3, 11),
        3: (192, 64, 5),
        6: (384, 192, 3),
        8: (256, 384, 3),
        10: (256, 256, 3),
    }
    weights = {"classifier.1.weight": torch.zeros(2, 2)}
    for number, (layer, (outputs, inputs, side)) in enumerate(layers.items()):
        scale = (2 / (inputs * side**2)) ** 0.5
        shape = (outputs, inputs, side, side)
        weights[f"features.{layer}.weight"] = scale * torch.randn(shape, generator=generator)
        weights[f"features.{layer}.bias"] = torch.zeros(outputs)
        head = torch.rand((1, outputs, 1, 1), generator=generator)
        weights[f"lin{number}.model.1.weight"] = head
    save_file(weights, path)


def _sizes() -> dict[str, Any]:
    return {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
