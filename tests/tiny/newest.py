"""LTX-2, 2.3 and 2.5 and MiniMax-H3, whole: encoders, loop and decoders of pictures and sound.

Of LTX-2 only the text encoder is left out, whose layers come as random embeddings. Of MiniMax-H3
nothing is, but two parts cannot be built without files: a tokenizer (`Letters`), and the processor,
whose class wants torchvision (`Looks`).
"""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image

from tests.tiny import Tiny, derived, packed
from tests.tiny.parts import GUIDED, NO_TEXT, make, noise, pipeline, prompts

# Guidance of four forwards: with the prompt, without, with a layer left out, with sound apart.
ALL_GUIDANCE: dict[str, Any] = {
    "stg_scale": 1.0,
    "audio_stg_scale": 1.0,
    "modality_scale": 3.0,
    "audio_modality_scale": 3.0,
    "spatio_temporal_guidance_blocks": [1],
}
ONLY_PROMPTS = dict.fromkeys(("stg_scale", "audio_stg_scale"), 0.0) | dict.fromkeys(
    ("modality_scale", "audio_modality_scale"), 1.0
)


def ltx2() -> Tiny:
    """LTX-2: both prompts in one batch."""
    return _ltx(derived.LTX2, {"video_connector_attention_head_dim": 8}, ONLY_PROMPTS)


def ltx23() -> Tiny:
    """LTX-2.3: prompts apart for video and sound, and all kinds of guidance."""
    return _ltx(derived.LTX23, NEW_CONNECTORS, ALL_GUIDANCE)


def ltx25() -> Tiny:
    """LTX-2.5."""
    return _ltx(derived.LTX25, NEW_CONNECTORS, ALL_GUIDANCE)


NEW_CONNECTORS: dict[str, Any] = {
    "video_connector_attention_head_dim": 16,
    "rope_type": "split",
    "per_modality_projections": True,
    "video_hidden_dim": 32,
    "audio_hidden_dim": 16,
    "proj_bias": True,
    "video_gated_attn": True,
    "audio_gated_attn": True,
}


def _ltx(config: dict[str, Any], connectors: dict[str, Any], guidance: dict[str, Any]) -> Tiny:
    """A clip of 17×128×192, which are 3×4×6 tokens, with its sound."""
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    sound = {"audio_in_channels": 16, "audio_out_channels": 16}
    model = make("LTX2VideoTransformer3DModel", **config | sound)
    sizes: dict[str, Any] = {
        "caption_channels": 16,
        "text_proj_in_factor": 2,
        "audio_connector_attention_head_dim": 8,
        "connector_rope_base_seq_len": 32,
    }
    for name in ("video", "audio"):
        sizes |= {f"{name}_connector_num_attention_heads": 2, f"{name}_connector_num_layers": 1}
        sizes |= {f"{name}_connector_num_learnable_registers": 8}
    vae = make(
        "AutoencoderKLLTX2Video",
        latent_channels=4,
        block_out_channels=(4, 8, 16, 32),
        decoder_block_out_channels=(4, 8, 16),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 4,
        upsample_residual=(False,) * 3,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    audio = {"base_channels": 16, "num_res_blocks": 1, "latent_channels": 4, "mel_bins": 16}
    resnets = {"resnet_kernel_sizes": [3], "resnet_dilations": [[1, 3, 5]]}
    vocoder: Any = LTX2Vocoder(
        in_channels=32, hidden_channels=16, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
        **resnets,
    )  # fmt: skip
    words: Any = LTX2TextConnectors(**sizes | connectors)
    parts = NO_TEXT | {
        "transformer": model,
        "connectors": words.eval(),
        "vae": vae,
        "audio_vae": make("AutoencoderKLLTX2Audio", **audio),
        "vocoder": vocoder.eval(),
    }
    call = prompts(valid=8) | GUIDED | guidance | {"audio_guidance_scale": 3.0}
    size = {"height": 128, "width": 192, "num_frames": 17, "frame_rate": 24.0}
    return pipeline("LTX2Pipeline", parts, **call | size, output_type="pt")


class Letters:
    """A tokenizer: a letter a token."""

    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 60 for letter in text]}

    def convert_tokens_to_ids(self, name: str) -> int:
        return 60 + self.names.index(name)


class Looks:
    """A processor of images, and of videos as pairs of frames."""

    temporal_patch_size = 2

    def __init__(self) -> None:
        sizes = {"min_pixels": 32**2, "max_pixels": 64 * 96}
        kind: Any = transformers.models.qwen2_vl.image_processing_pil_qwen2_vl
        self.image_processor = kind.Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, **sizes)
        self.video_processor = self

    def create_mm_token_type_ids(self, rows: list[list[int]]) -> list[list[int]]:
        return [[{60: 1, 61: 2}.get(token, 0) for token in row] for row in rows]

    def __call__(self, videos: list[Any], **_: Any) -> dict[str, torch.Tensor]:
        pixels, grids = [], []
        for frames in videos:
            pairs = [Image.fromarray(frame) for frame in frames[::2]]
            seen = self.image_processor(images=pairs, return_tensors="pt")
            pixels.append(seen["pixel_values"])
            grids.append(torch.tensor([len(pairs), *seen["image_grid_thw"][0][1:]]))
        return {"pixel_values_videos": torch.cat(pixels), "video_grid_thw": torch.stack(grids)}


class Clip(Tiny):
    """A pipeline of blocks that gives a video, or latents where its decoder is left out."""

    def run(self, seed: int = 0, **changes: Any) -> torch.Tensor:
        generator = torch.Generator("cpu").manual_seed(seed)
        out: torch.Tensor = self.pipe(**self.call | changes, generator=generator)
        return out


def minimax_h3() -> Tiny:
    """From text alone: 5 tokens, 414 of sound, a video of 37×3×4; with pictures and sound."""
    return _h3(decoded=True)


def minimax_h3_keyframes() -> Tiny:
    """The same between two images, each of them 12 tokens and a label in the prompt."""
    image = Image.new("RGB", (128, 96), "teal")
    return _h3(image=image, last_image=image.rotate(180))


def minimax_h3_references() -> Tiny:
    """After an image and a video of 12×3×4 with its sound; by its other transformer."""
    from diffusers.modular_pipelines.minimax_h3 import references

    frames = np.random.default_rng(0).integers(0, 255, (44, 96, 128, 3), np.uint8)
    image = references.MiniMaxH3ImageReference(image=Image.new("RGB", (96, 64), "red"))
    video = references.MiniMaxH3VideoReference(frames=frames, audio=noise(2, 32000))
    return _h3(references=[image, video])


def _h3(*, decoded: bool = False, **call: Any) -> Tiny:
    """All its blocks; a clip of five seconds, the shortest that it makes."""
    blocks: Any = diffusers.MiniMaxH3Blocks()
    if not decoded:
        blocks.sub_blocks.pop("decode")
    pipe: Any = blocks.init_pipeline()
    transformer, other = packed.minimax_h3().pipe, packed.minimax_h3().pipe
    names = ("scheduler", "audio_scheduler")
    sound = {"encoder_dim": 2, "latent_dim": 32, "num_attention_heads": 2, "decoder_dim": 128}
    latents = {"latent_channels": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    heads = {"decoder_num_attention_heads": 2, "decoder_attention_head_dim": 16}
    channels = {"block_out_channels": (8,) * 6, "layers_per_block": 1, "norm_num_groups": 2}
    resnets = {"resblock_kernel_sizes": (3,), "resblock_dilation_sizes": ((1,),)}
    pipe.update_components(
        text_encoder=_qwen(),
        tokenizer=Letters(),
        processor=Looks(),
        vae=make("AutoencoderKLMiniMaxH3", **latents, **heads, **channels, decoder_num_layers=1),
        audio_vae=make("AutoencoderKLMiniMaxH3Audio", **latents, **sound, **resnets),
        transformer=transformer,
        transformer_ref=other,
        canvas_short_edge=96,
        canvas_max_pixels=96 * 128,
        reference_image_short_edge=32,
        **{name: diffusers.MiniMaxH3Scheduler() for name in names},
    )
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 96, "width": 128, "num_frames": 124, "num_inference_steps": 3}
    more = {"output": "videos", "output_type": "pt"} if decoded else {"output": "latents"}
    return Clip(pipe, {"prompt": "a cat"} | size | more | call)


def _qwen() -> Any:
    """Its text encoder, of which the 50th layer is asked."""
    rope = {"rope_type": "default", "mrope_section": [3, 3, 2], "mrope_interleaved": True}
    text = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 51,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "rope_scaling": rope,
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 16,
        "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    tokens: dict[str, Any] = {name: 60 + i for i, name in enumerate(names)}
    torch.manual_seed(0)
    config: Any = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **tokens)
    model: Any = transformers.Qwen3VLForConditionalGeneration(config)
    return model.eval()
