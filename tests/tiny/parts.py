"""What the tiny models of all families are built from.

Prompts come as random embeddings and results stay latents, so that each is built and answers in a
fraction of a second, without text encoders and mostly without decoders.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import torch

from tests.tiny import Tiny

NO_TEXT: dict[str, Any] = {"text_encoder": None, "tokenizer": None}
NO_TEXTS: dict[str, Any] = NO_TEXT | {"text_encoder_2": None, "tokenizer_2": None}
SIZE: dict[str, Any] = {"height": 64, "width": 96}
GUIDED: dict[str, Any] = {"guidance_scale": 3.0}


class Bare(Tiny):
    """A transformer alone, with the arguments of one forward in place of a call."""

    def run(self, seed: int = 0, **changes: Any) -> torch.Tensor:
        with torch.no_grad():
            return one(self.pipe(**self.call | changes, return_dict=False)[0])


def one(out: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    """Results of several shapes as one tensor."""
    return torch.cat([x.flatten() for x in out]) if isinstance(out, list) else out


class Sizes:
    """In place of a decoder: what a pipeline wants to know about it."""

    config = SimpleNamespace(latent_channels=4)
    temporal_compression_ratio = 4
    spatial_compression_ratio = 16


class Harmless(torch.nn.Module):
    """A safety checker that finds everything safe."""

    device = torch.device("cpu")

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def noise(*shape: int) -> torch.Tensor:
    """The same random numbers for the same shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def make(cls: str, **config: Any) -> Any:
    """A random model in evaluation mode, without the zeros that hide what its layers compute."""
    torch.manual_seed(0)
    model = getattr(diffusers, cls)(**config).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def pipeline(cls: str, parts: dict[str, Any], **call: Any) -> Tiny:
    """A pipeline of the parts, with flow matching and no decoder where they do not say."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = getattr(diffusers, cls)(**{"scheduler": scheduler, "vae": None} | parts)
    pipe.set_progress_bar_config(disable=True)
    return Tiny(pipe, {"num_inference_steps": 2, "output_type": "latent"} | call)


def prompts(length: int = 8, features: int = 32, valid: int | None = None) -> dict[str, Any]:
    """Embeddings of a prompt and a shorter negative one; with `valid`, masks of padding too."""
    embeds = noise(1, length, features)
    out = {"prompt_embeds": embeds, "negative_prompt_embeds": embeds.flip(1)}
    if valid is not None:
        mask = (torch.arange(length) < valid)[None].long()
        out["prompt_attention_mask"] = mask
        out["negative_prompt_attention_mask"] = mask.cumsum(1).le(valid - 2).long() * mask
    return out
