"""Tiny transformers that pack text, references, audio and videos into one sequence.

And those whose text has keys and no queries; some in their pipelines, others alone with made-up
arguments, packed as diffusers' own pipelines pack them.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import diffusers
import torch

from tests.tiny import Tiny
from tests.tiny.parts import GUIDED, NO_TEXT, SIZE, Bare, make, noise, pipeline, prompts

SMALL: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
TEXT = noise(1, 8, 32)
H3: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "audio_channels": 2,
    "audio_tag": 2,
    "video_tag": 0,
    "num_latent_frames": 3,
    "latent_height": 8,
    "latent_width": 12,
    "num_audio_latents": 5,
    "text_token_tags": torch.ones(7, dtype=torch.long),
}


def minimax_h3(anchors: tuple[str, ...] = ("first", "last")) -> Bare:
    """7 text tokens, two keyframes of 4×6, 10 of audio, a video of 3×4×6."""
    step = _steps().MiniMaxH3PrepareLayoutStep
    return _h3(step.build_packed_sequence(**H3, keyframe_anchors=anchors))


def minimax_h3_references() -> Bare:
    """Text, an image of 2×3, a sound, a video of 4×3×5 with its sound, audio, a video of 3×4×6."""
    step = _steps().MiniMaxH3Ref2VAPrepareLayoutStep
    references = [
        SimpleNamespace(kind="image", has_audio=False),
        SimpleNamespace(kind="audio", has_audio=True),
        SimpleNamespace(kind="video", has_audio=True),
    ]
    return _h3(
        step.build_ref2va_packed_sequence(
            **H3,
            references=references,
            condition_latents=[noise(1, 4, 1, 4, 6), noise(1, 4, 4, 6, 10)],
            audio_condition_latents=[noise(6, 4), noise(4, 4)],
        )
    )


def minimax_h3_seconds(frames: int, references: int = 0) -> Bare:
    """As the pipeline packs a clip of 128×192 pixels after so many of 96×160 with their sound."""
    made = importlib.import_module("diffusers.modular_pipelines.minimax_h3.modular_pipeline")
    latents = made.video_latent_num_frames(frames, 17, 5)
    sound = made.audio_latent_num_frames(frames)
    sizes = H3 | {"num_latent_frames": latents, "num_audio_latents": sound}
    kinds = [SimpleNamespace(kind="video", has_audio=True)] * references
    step = _steps().MiniMaxH3Ref2VAPrepareLayoutStep
    return _h3(
        step.build_ref2va_packed_sequence(
            **sizes,
            references=kinds,
            condition_latents=[noise(1, 4, latents, 6, 10)] * references,
            audio_condition_latents=[noise(2 * sound, 4)] * references,
        )
    )


def _steps() -> Any:
    """Those of the pipeline that lay the sequence out."""
    name = "diffusers.modular_pipelines.minimax_h3.before_denoise"
    return importlib.import_module(name)


def _h3(layout: tuple[Any, ...]) -> Bare:
    model = make(
        "MiniMaxH3Transformer3DModel",
        **SMALL,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=32,
        in_channels=4,
        audio_in_channels=4,
        text_dim=32,
        freq_dim=16,
        time_embed_hidden_dim=16,
        time_embed_dim=16,
        rope_freq_dim=2,
    )
    position_ids, token_tags, video, audio, text, _, _ = layout
    inputs = {
        "hidden_states": noise(1, len(video), 16),
        "audio_hidden_states": noise(1, len(audio), 4),
        "encoder_hidden_states": noise(1, len(text), 32),
        "timestep": torch.tensor([0.5]),
        "timestep_indices": torch.zeros_like(token_tags),
        "token_tags": token_tags,
        "position_ids": position_ids,
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }
    return Bare(model, inputs)


def cosmos3(shapes: tuple[tuple[int, int, int], ...] = ((3, 4, 6),), sound: int = 5) -> Bare:
    """7 causal tokens of a prompt without queries, videos of the shapes, sound."""
    model = make(
        "Cosmos3OmniTransformer",
        head_dim=16,
        hidden_size=32,
        intermediate_size=32,
        latent_channel=4,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=1,
        patch_latent_dim=16,
        sound_gen=True,
        sound_dim=4,
        vocab_size=50,
        rope_axes_dim=(2, 3, 3),
        timestep_scale=1.0,
    )
    videos = [noise(1, 4, f, 2 * h, 2 * w) for f, h, w in shapes]
    count = sum(f * h * w for f, h, w in shapes)
    visual = torch.arange(7, 7 + count)
    total = 7 + count + sound
    inputs: dict[str, Any] = {
        "input_ids": torch.arange(7) + 3,
        "text_indexes": torch.arange(7),
        "position_ids": torch.arange(total).expand(3, 1, total)[:, 0],
        "und_len": 7,
        "sequence_length": total,
        "vision_tokens": videos,
        "vision_token_shapes": list(shapes),
        "vision_sequence_indexes": visual,
        "vision_mse_loss_indexes": visual,
        "vision_timesteps": torch.full((count,), 0.5),
        "vision_noisy_frame_indexes": [torch.arange(f) for f, _, _ in shapes],
    }
    if sound:
        audible = torch.arange(7 + count, total)
        inputs |= {
            "sound_tokens": [noise(4, sound)],
            "sound_token_shapes": [(sound, 1, 1)],
            "sound_sequence_indexes": audible,
            "sound_mse_loss_indexes": audible,
            "sound_timesteps": torch.full((sound,), 0.5),
            "sound_noisy_frame_indexes": [torch.arange(sound)],
        }
    return Bare(model, inputs)


def cosmos3_videos() -> Bare:
    """The same with a video to edit, of 4×3×5, in front of the other."""
    return cosmos3(shapes=((4, 3, 5), (3, 4, 6)))


class Words:
    """In place of a tokenizer: every prompt is the same three words."""

    eos_token_id = 2

    def apply_chat_template(self, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(input_ids=[4, 5, 6])

    def convert_tokens_to_ids(self, _: str) -> int:
        return 7


def cosmos3_pipeline() -> Tiny:
    """The pipeline: 5 tokens of a prompt without queries, a video of 3×4×6."""
    vae: Any = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    parts = {"text_tokenizer": Words(), "vae": vae.eval(), "transformer": cosmos3().pipe}
    call = SIZE | GUIDED | {"prompt": "a cat", "negative_prompt": "bad", "num_frames": 9}
    return pipeline("Cosmos3OmniPipeline", parts | {"enable_safety_checker": False}, **call)


def framepack() -> Bare:
    """Past frames in 2 + 6 + 24 tokens, a video of 3×4×6, 2 image and 5 text tokens behind."""
    model = make(
        "HunyuanVideoFramepackTransformer3DModel",
        **SMALL,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=32,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
        has_image_proj=True,
        image_proj_dim=8,
        has_clean_x_embedder=True,
    )
    inputs = {
        "hidden_states": noise(1, 4, 3, 8, 12),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": TEXT,
        "encoder_attention_mask": (torch.arange(8) < 5)[None].long(),
        "pooled_projections": noise(1, 8),
        "image_embeds": noise(1, 2, 8),
        "guidance": torch.tensor([1000.0]),
        "indices_latents": torch.arange(7, 10),
        "latents_clean": noise(1, 4, 1, 8, 12),
        "indices_latents_clean": torch.arange(6, 7),
        "latents_history_2x": noise(1, 4, 2, 8, 12),
        "indices_latents_history_2x": torch.arange(4, 6),
        "latents_history_4x": noise(1, 4, 4, 8, 12),
        "indices_latents_history_4x": torch.arange(4),
    }
    return Bare(model, inputs)


def helios() -> Bare:
    """Past frames in 2 + 6 + 24 tokens, a video of 3×4×6; text is asked by another attention."""
    model = make(
        "HeliosTransformer3DModel",
        **SMALL,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_dim=(4, 6, 6),
    )
    inputs = {
        "hidden_states": noise(1, 16, 3, 8, 12),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": TEXT,
        "indices_hidden_states": torch.arange(7, 10)[None],
        "latents_history_short": noise(1, 16, 1, 8, 12),
        "indices_latents_history_short": torch.arange(6, 7)[None],
        "latents_history_mid": noise(1, 16, 2, 8, 12),
        "indices_latents_history_mid": torch.arange(4, 6)[None],
        "latents_history_long": noise(1, 16, 4, 8, 12),
        "indices_latents_history_long": torch.arange(4)[None],
    }
    return Bare(model, inputs)


def helios_pipeline() -> Tiny:
    """The pipeline: a piece of 9×4×6 after past frames that are still empty."""
    vae: Any = diffusers.AutoencoderKLWan(
        base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    parts = NO_TEXT | {"transformer": helios().pipe, "vae": vae.eval()}
    return pipeline("HeliosPipeline", parts, **prompts() | SIZE | GUIDED, num_frames=9)


def qwen21() -> Bare:
    """5 text tokens, an image of 2×4 to edit, 3 text tokens, one of them padding, 4×6."""
    model = make(
        "QwenImage21Transformer2DModel",
        **SMALL,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        context_in_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    image = torch.tensor([0] * 5 + [1] * 2 + [0] * 3 + [1] * 6).bool()[None]
    inputs = {
        "hidden_states": noise(1, 8 + 24, 4),
        "encoder_hidden_states": noise(1, 10, 32),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 2, 4), (1, 4, 6)]],
        "img_mask": image,
        "encoder_hidden_states_mask": (torch.arange(10) < 9)[None],
    }
    return Bare(model, inputs)


class Template:
    """In place of Qwen's processor."""

    class tokenizer:
        @staticmethod
        def encode(_: str) -> list[int]:
            return [3]

    def apply_chat_template(self, *_: Any, **__: Any) -> list[list[int]]:
        return [[1, 2]]


def qwen21_pipeline() -> Tiny:
    """The pipeline: 8 text tokens, whose keys are cached, an image of 4×6."""
    parts = {"text_encoder": None, "processor": Template(), "transformer": qwen21().pipe}
    masks = {f"{n}prompt_embeds_mask": torch.ones(1, 8).long() for n in ("", "negative_")}
    call = SIZE | prompts() | masks | {"true_cfg_scale": 3.0}
    return pipeline("QwenImage21Pipeline", parts, **call)


def prx() -> Tiny:
    """8 text tokens in front that have no queries, 3 of them masked."""
    model = make(
        "PRXTransformer2DModel",
        in_channels=4,
        patch_size=2,
        context_in_dim=32,
        hidden_size=32,
        num_heads=2,
        depth=2,
        axes_dim=[8, 8],
    )
    call = SIZE | GUIDED | prompts(valid=5) | {"use_resolution_binning": False}
    call |= {name: mask.bool() for name, mask in call.items() if name.endswith("_mask")}
    return pipeline("PRXPipeline", NO_TEXT | {"transformer": model}, **call)


def nucleus() -> Tiny:
    """8 text tokens behind that have no queries, 3 of them masked."""
    model = make(
        "NucleusMoEImageTransformer2DModel",
        **SMALL,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        num_key_value_heads=1,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        moe_enabled=False,
    )
    parts = {"text_encoder": None, "processor": None, "transformer": model}
    mask = (torch.arange(8) < 5)[None]
    masks = {"prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask.flip(1)}
    call = SIZE | GUIDED | prompts() | masks
    return pipeline("NucleusMoEImagePipeline", parts, **call)
