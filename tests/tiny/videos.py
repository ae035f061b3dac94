"""Tiny random video transformers in their stock pipelines; see `tests.tiny.parts`.

Unless a docstring says otherwise the token grid is 3×4×6.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from PIL import Image

from tests import tiny
from tests.tiny import Tiny
from tests.tiny.parts import (
    GUIDED,
    NO_TEXT,
    NO_TEXTS,
    SIZE,
    Bare,
    Harmless,
    Sizes,
    make,
    noise,
    pipeline,
    prompts,
)


def wan() -> Tiny:
    """Wan 2.1, two sequential forwards a step."""
    return Tiny(*_parts(tiny.wan(), height=64, width=96))


def wan_vace() -> Tiny:
    """Wan VACE with one reference image: a frame in front, so the grid is 4×4×6."""
    parts = tiny.wan().pipe.components
    parts["transformer"] = make(
        "WanVACETransformer3DModel",
        **_WAN,
        vace_layers=[0],
        vace_in_channels=96,
    )
    call = prompts(16) | SIZE | GUIDED | {"num_frames": 9}
    reference = [Image.new("RGB", (96, 64), "teal")]
    return pipeline("WanVACEPipeline", parts, reference_images=reference, **call)


def wan_animate() -> Tiny:
    """Wan Animate alone: the character's frame in front of two."""
    model = make(
        "WanAnimateTransformer3DModel",
        **_WAN | {"in_channels": 36, "latent_channels": 16, "image_dim": 8},
        added_kv_proj_dim=24,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    inputs = {
        "hidden_states": noise(1, 36, 3, 8, 12),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": noise(1, 8, 32),
        "encoder_hidden_states_image": noise(1, 4, 8),
        "pose_hidden_states": noise(1, 16, 2, 8, 12),
        "face_pixel_values": noise(1, 3, 5, 16, 16),
    }
    return Bare(model, inputs)


def skyreels() -> Tiny:
    """SkyReels-V2 text-to-video."""
    model = make("SkyReelsV2Transformer3DModel", **_WAN)
    call = prompts() | GUIDED | SIZE | {"num_frames": 9}
    return pipeline("SkyReelsV2Pipeline", {"transformer": model} | NO_TEXT, **call)


def skyreels_forcing() -> Tiny:
    """SkyReels-V2 by diffusion forcing, in two parts that overlap."""
    model = make("SkyReelsV2Transformer3DModel", **_WAN)
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
    )
    parts = {"transformer": model, "scheduler": scheduler} | NO_TEXT
    call = prompts() | GUIDED | SIZE | {"num_frames": 17, "prompt": None}
    window = {"base_num_frames": 9, "overlap_history": 1, "addnoise_condition": 20}
    return pipeline("SkyReelsV2DiffusionForcingPipeline", parts, **call, **window)


def hunyuan() -> Tiny:
    """HunyuanVideo: 8 text tokens behind, of which 3 are padding under a key mask."""
    model = make(
        "HunyuanVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    call = prompts(8, 16, valid=5) | SIZE | {"num_frames": 9, "pooled_prompt_embeds": noise(1, 8)}
    return pipeline("HunyuanVideoPipeline", {"transformer": model} | NO_TEXTS, **call)


def hunyuan15() -> Tiny:
    """HunyuanVideo 1.5: image, byT5 and prompt tokens behind, under square masks."""
    model = make(
        "HunyuanVideo15Transformer3DModel",
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=8,
        image_embed_dim=12,
        rope_axes_dim=(4, 6, 6),
        target_size=16,
        task_type="t2v",
    )
    call: dict[str, Any] = SIZE | {"num_frames": 9}
    for sign in ("", "negative_"):
        for last, features in (("", 16), ("_2", 8)):
            call[f"{sign}prompt_embeds{last}"] = noise(1, 8, features)
            call[f"{sign}prompt_embeds_mask{last}"] = (torch.arange(8) < 5)[None].long()
    parts = {"transformer": model, "vae": Sizes(), "guider": diffusers.ClassifierFreeGuidance()}
    out = pipeline("HunyuanVideo15Pipeline", parts | NO_TEXTS, **call)
    out.pipe.vision_num_semantic_tokens = 4
    return out


def cogvideox(patch_size_t: int | None = None) -> Tiny:
    """CogVideoX: 8 text tokens in front, both branches in one batch."""
    model = make(
        "CogVideoXTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=2,
        sample_width=12,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=8,
        use_rotary_positional_embeddings=True,
        patch_size_t=patch_size_t,
        patch_bias=patch_size_t is None,
    )
    parts = {"transformer": model, "scheduler": diffusers.CogVideoXDDIMScheduler()} | NO_TEXT
    return pipeline("CogVideoXPipeline", parts, num_frames=9, **prompts() | SIZE | GUIDED)


def cogvideox15() -> Tiny:
    """CogVideoX 1.5: patches of two frames make the grid 2×4×6."""
    return cogvideox(patch_size_t=2)


def mochi() -> Tiny:
    """Mochi: prompts of 5 and 3 valid tokens, a call a sample."""
    model = make(
        "MochiTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        pooled_projection_dim=8,
        in_channels=4,
        text_embed_dim=32,
        time_embed_dim=8,
        max_sequence_length=8,
    )
    call = prompts(valid=5) | SIZE | GUIDED | {"num_frames": 13}
    return pipeline("MochiPipeline", {"transformer": model} | NO_TEXT, **call)


def ltx() -> Tiny:
    """LTX: video only, both branches in one batch."""
    call = prompts(valid=5) | GUIDED | {"height": 128, "width": 192, "num_frames": 17}
    return pipeline("LTXPipeline", {"transformer": _ltx_transformer()} | NO_TEXT, **call)


def ltx_condition() -> Tiny:
    """LTX with an image at the last frame: grid 3×4×8, and 32 tokens in front."""
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

    vae = make(
        "AutoencoderKLLTXVideo",
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, True, False),
        decoder_spatio_temporal_scaling=(True, True, True, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
    )
    image = Image.new("RGB", (64, 32), "teal")
    call = prompts(valid=5) | GUIDED | {"height": 32, "width": 64, "num_frames": 17}
    return pipeline(
        "LTXConditionPipeline",
        {"transformer": _ltx_transformer(), "vae": vae} | NO_TEXT,
        conditions=[LTXVideoCondition(image=image, frame_index=16)],
        **call,
    )


def ltx2() -> Tiny:
    """LTX-2 alone, with audio and with 24 keyframe tokens behind the video."""
    model = make(
        "LTX2VideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
    )
    coords = model.rope.prepare_video_coords(1, 4, 4, 6, torch.device("cpu"), fps=24.0)
    inputs = {
        "hidden_states": noise(1, 96, 4),
        "audio_hidden_states": noise(1, 5, 4),
        "encoder_hidden_states": noise(1, 8, 16),
        "audio_encoder_hidden_states": noise(1, 8, 16),
        "timestep": torch.tensor([500.0]),
        "num_frames": 3,
        "height": 4,
        "width": 6,
        "fps": 24.0,
        "audio_num_frames": 5,
        "video_coords": coords,
    }
    return Bare(model, inputs)


def cosmos() -> Tiny:
    """Cosmos 1 text-to-world."""
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5)
    parts = {"transformer": _cosmos_transformer(4), "scheduler": scheduler} | NO_TEXT
    call = prompts() | SIZE | GUIDED | {"num_frames": 17}
    parts["safety_checker"] = Harmless()
    return pipeline("CosmosTextToWorldPipeline", parts, **call)


def cosmos25() -> Tiny:
    """Cosmos 2.5: latents, condition mask and padding mask as channels."""
    parts = {"transformer": _cosmos_transformer(17), "vae": tiny.wan().pipe.vae} | NO_TEXT
    parts["scheduler"] = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True
    )
    parts["safety_checker"] = Harmless()
    call = prompts() | SIZE | GUIDED | {"num_frames": 9}
    return pipeline("Cosmos2_5_PredictBasePipeline", parts, **call)


def kandinsky(**attention: Any) -> Tiny:
    """Kandinsky 5, latents with their channels last."""
    model = make(
        "Kandinsky5Transformer3DModel",
        in_visual_dim=4,
        in_text_dim=32,
        in_text_dim2=8,
        time_dim=16,
        out_visual_dim=4,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        **attention,
    )
    call: dict[str, Any] = SIZE | GUIDED | {"num_frames": 9}
    for sign in ("", "negative_"):
        call[f"{sign}prompt_embeds_qwen"] = noise(1, 8, 32)
        call[f"{sign}prompt_embeds_clip"] = noise(1, 8)
        call[f"{sign}prompt_cu_seqlens"] = torch.tensor([0, 8], dtype=torch.int32)
    return pipeline("Kandinsky5T2VPipeline", {"transformer": model} | NO_TEXTS, **call)


def allegro() -> Tiny:
    """Allegro, both branches in one batch."""
    model = make(
        "AllegroTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=2,
        cross_attention_dim=48,
        sample_width=12,
        sample_height=8,
        sample_frames=3,
        caption_channels=32,
    )
    call = prompts(valid=5) | SIZE | GUIDED | {"num_frames": 12, "negative_prompt": None}
    parts = {"transformer": model, "scheduler": diffusers.EulerAncestralDiscreteScheduler()}
    return pipeline("AllegroPipeline", parts | NO_TEXT, **call)


def latte() -> Tiny:
    """Latte: spatial layers of grid 1×4×6, a sample a frame."""
    model = make(
        "LatteTransformer3DModel",
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=3,
    )
    call = prompts() | SIZE | GUIDED | {"video_length": 3, "negative_prompt": None}
    parts = {"transformer": model, "scheduler": diffusers.DDIMScheduler()} | NO_TEXT
    return pipeline("LattePipeline", parts, **call)


_WAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 256,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}


def _parts(model: Tiny, **changes: Any) -> tuple[Any, dict[str, Any]]:
    return model.pipe, model.call | {"output_type": "latent"} | changes


def _ltx_transformer() -> Any:
    return make(
        "LTXVideoTransformer3DModel",
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    )


def _cosmos_transformer(in_channels: int) -> Any:
    return make(
        "CosmosTransformer3DModel",
        in_channels=in_channels,
        out_channels=16 if in_channels > 4 else 4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=32,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        concat_padding_mask=False,  # diffusers resizes it with torchvision
    )
