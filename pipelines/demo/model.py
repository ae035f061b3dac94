"""The components of the built-in demo model, and how it is saved and loaded.

Every part is a stock diffusers or transformers class, so the shipped folder also loads with
``WanPipeline.from_pretrained``.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from torch import nn
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from diffpatch.pipelines.demo import clips
from diffpatch.pipelines.demo.vae import LATENT_CHANNELS

WEIGHTS = Path(__file__).parent / "weights"
TEXT_DIM = 96
FLOW_SHIFT = 3.0


@dataclass(frozen=True)
class DemoPreset:
    """How to sample from the demo model.

    Attributes:
        name: Name of the preset.
        num_frames: Frames of the clip (see `pipeline_num_frames`).
        height: Height in pixels.
        width: Width in pixels.
        num_inference_steps: Euler steps.
        guidance_scale: Strength of classifier-free guidance.
        max_sequence_length: Text tokens per prompt, padding included.
    """

    name: str
    num_frames: int
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    max_sequence_length: int


PRESETS = {
    "demo": DemoPreset("demo", 13, 128, 128, 10, 2.5, 32),
    "demo-long": DemoPreset("demo-long", 33, 128, 128, 10, 2.5, 32),
}
"""``demo`` has 13 x 16 x 16 = 3328 tokens, ``demo-long`` 33 x 16 x 16 = 8448, same weights.

Guidance is mild because clips get noisier with more of it: of 2.2, 3.5 and 5.5, tried on the same
few captions, the first gave the cleanest outlines and the smallest Fréchet distance.
"""


def load_demo(name: str = "demo", dtype: torch.dtype = torch.bfloat16) -> WanPipeline:
    """Load the demo model that is shipped with the package.

    Args:
        name: A key of `PRESETS`; all presets share the same weights.
        dtype: ``torch.bfloat16`` or ``torch.float32``.

    Returns:
        The pipeline, on the CPU.

    Raises:
        ValueError: If the preset does not exist.
        FileNotFoundError: If the package was installed without its weights.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown demo preset {name!r}; expected one of {', '.join(PRESETS)}")
    if not (WEIGHTS / "model_index.json").is_file():
        raise FileNotFoundError(
            f"the demo weights are missing at {WEIGHTS}; reinstall the package, or train them "
            "with examples/train_demo_model.py"
        )
    return WanPipeline.from_pretrained(WEIGHTS, torch_dtype=dtype)


def pipeline_num_frames(pipe: WanPipeline, num_frames: int) -> int:
    """The ``num_frames`` argument that makes ``pipe`` produce ``num_frames`` frames.

    WanPipeline rounds the number of frames to 4k + 1 and, when the autoencoder does not compress
    time at all, this rounding adds a frame. For such an autoencoder one frame less has to be
    requested (the pipeline then logs that it rounded, which is harmless).

    Args:
        pipe: The pipeline that will be called.
        num_frames: The number of frames wanted.
    """
    return num_frames - 1 if pipe.vae_scale_factor_temporal == 1 else num_frames


def build_tokenizer() -> T5Tokenizer:
    """Build a tokenizer with one piece per word of `clips.vocabulary`."""
    special = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")]
    words = [("\u2581" + word, -1.0) for word in clips.vocabulary()]
    return T5Tokenizer(vocab=special + words, extra_ids=0)


def build_text_encoder() -> UMT5EncoderModel:
    """Build an untrained two-layer text encoder (0.2 M parameters)."""
    options: dict[str, Any] = {
        "vocab_size": 64,
        "d_model": TEXT_DIM,
        "d_kv": 32,
        "d_ff": 192,
        "num_layers": 2,
        "num_heads": 3,
        "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    return UMT5EncoderModel(UMT5Config(**options))


def build_transformer(heads: int = 3, layers: int = 6, ffn_dim: int = 576) -> WanTransformer3DModel:
    """Build an untrained video transformer with 64 channels per head.

    The start is close to the identity: gates are open, branches are small, the output is zero.
    """
    model = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=heads,
        attention_head_dim=64,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=128,
        ffn_dim=ffn_dim,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=128,
    )
    with torch.no_grad():
        model.condition_embedder.time_proj.weight.mul_(0.1)
        model.condition_embedder.time_proj.bias.zero_()
        for block in model.blocks:
            block.scale_shift_table.zero_()
            block.scale_shift_table[:, [2, 5]] = 1.0  # the two gates
            for layer in (block.attn1.to_out[0], block.attn2.to_out[0], block.ffn.net[2]):
                layer.weight.mul_(0.4)
                layer.bias.zero_()
        model.scale_shift_table.zero_()
        model.proj_out.weight.zero_()
        model.proj_out.bias.zero_()
    return model


def save_pipeline(
    folder: Path, transformer: nn.Module, text_encoder: nn.Module, vae: nn.Module
) -> None:
    """Write a complete pipeline folder in bfloat16, replacing an older one in one step.

    The given modules are converted to bfloat16 in place.

    Args:
        folder: Where the pipeline goes.
        transformer: The trained video transformer.
        text_encoder: The text encoder trained with it.
        vae: The autoencoder from `diffpatch.pipelines.demo.vae.build_vae`.
    """
    parts: dict[str, Any] = {
        "tokenizer": build_tokenizer(),
        "text_encoder": text_encoder,
        "vae": vae,
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
    }
    for part in (text_encoder, vae, transformer):
        for weight in part.parameters():
            weight.data = weight.data.to(torch.bfloat16)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=folder.parent))
    WanPipeline(**parts).save_pretrained(fresh, safe_serialization=True)
    fresh.chmod(0o755)  # temporary folders are private, and so are new safetensors files
    for path in fresh.rglob("*.safetensors"):
        path.chmod(0o644)
    if folder.exists():
        old = Path(tempfile.mkdtemp(dir=folder.parent))
        folder.rename(old / "old")
        fresh.rename(folder)
        shutil.rmtree(old)
    else:
        fresh.rename(folder)
