"""Tiny random image transformers in their stock pipelines; see `tests.tiny.parts`.

Unless a docstring says otherwise the token grid is 1×4×6.
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
    make,
    noise,
    pipeline,
    prompts,
)

NO_BINNING: dict[str, Any] = {"use_resolution_binning": False, "negative_prompt": None}


def flux() -> Tiny:
    """Flux.1: 8 text tokens in front; one forward a step."""
    call = SIZE | {"prompt_embeds": noise(1, 8, 32), "pooled_prompt_embeds": noise(1, 32)}
    return pipeline("FluxPipeline", {"transformer": _flux_transformer()} | NO_TEXTS, **call)


def flux_kontext() -> Tiny:
    """Flux.1 Kontext: 8×12 pixels are 1×4×6, and as many tokens of a reference behind."""
    parts: dict[str, Any] = {"transformer": _flux_transformer(latents=1)} | NO_TEXTS
    vae = tiny.flux().pipe.vae
    call: dict[str, Any] = {"prompt_embeds": noise(1, 8, 32)}
    call |= {
        "pooled_prompt_embeds": noise(1, 32),
        "height": 8,
        "width": 12,
        "max_area": 96,
        "_auto_resize": False,
    }
    image = Image.new("RGB", (12, 8), "teal")
    return pipeline("FluxKontextPipeline", parts | {"vae": vae}, image=image, **call)


def flux2() -> Tiny:
    """Flux.2: 8 text tokens in front, one forward a step."""
    call = SIZE | {"prompt_embeds": noise(1, 8, 32)}
    return pipeline("Flux2Pipeline", {"transformer": _flux2_transformer()} | NO_TEXT, **call)


def flux2_references() -> Tiny:
    """Flux.2 alone, with two reference images of 6 tokens behind the image."""
    sizes, times = [(4, 6), (2, 3), (2, 3)], [0, 10, 20]
    ids = [
        torch.cartesian_prod(*map(torch.arange, (1, h, w, 1))) + torch.tensor([t, 0, 0, 0])
        for (h, w), t in zip(sizes, times, strict=True)
    ]
    inputs = {
        "hidden_states": noise(1, 36, 16),
        "encoder_hidden_states": noise(1, 8, 32),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([4.0]),
        "img_ids": torch.cat(ids)[None],
        "txt_ids": torch.zeros(1, 8, 4, dtype=torch.long),
    }
    return Bare(_flux2_transformer(), inputs)


def chroma() -> Tiny:
    """Chroma: 8 text tokens in front, of which 2 are biased as padding."""
    model = make(
        "ChromaTransformer2DModel",
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    call = SIZE | GUIDED | prompts(valid=6)
    call |= {name: mask.float() for name, mask in call.items() if name.endswith("mask")}
    return pipeline("ChromaPipeline", {"transformer": model} | NO_TEXT, **call)


def sd3() -> Tiny:
    """Stable Diffusion 3.5: 8 text tokens behind, and a dual layer that sees the image alone."""
    model = make(
        "SD3Transformer2DModel",
        sample_size=12,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
        pos_embed_max_size=12,
    )
    pooled = {
        "pooled_prompt_embeds": noise(1, 32),
        "negative_pooled_prompt_embeds": noise(1, 32),
    }
    parts = {"transformer": model, "text_encoder_3": None, "tokenizer_3": None} | NO_TEXTS
    return pipeline("StableDiffusion3Pipeline", parts, **prompts() | pooled | SIZE | GUIDED)


def pixart() -> Tiny:
    """PixArt-Σ, both branches in one batch."""
    model = make(
        "PixArtTransformer2DModel",
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=32,
        cross_attention_dim=32,
        in_channels=4,
        out_channels=8,
        use_additional_conditions=False,
    )
    parts = {"transformer": model, "scheduler": diffusers.DDIMScheduler()} | NO_TEXT
    call = prompts(valid=5) | SIZE | GUIDED | NO_BINNING
    return pipeline("PixArtSigmaPipeline", parts, **call)


def qwen() -> Tiny:
    """QwenImage: 8 text tokens in front, of which 3 are padding under a key mask."""
    call = SIZE | {"true_cfg_scale": 3.0}
    for sign in ("", "negative_"):
        call[f"{sign}prompt_embeds"] = noise(1, 8, 32)
        call[f"{sign}prompt_embeds_mask"] = (torch.arange(8) < 5)[None].long()
    return pipeline("QwenImagePipeline", {"transformer": _qwen_transformer()} | NO_TEXT, **call)


def qwen_edit() -> Tiny:
    """QwenImage Edit alone, with a reference image of 3×5 tokens behind the image."""
    inputs = {
        "hidden_states": noise(1, 39, 16),
        "encoder_hidden_states": noise(1, 8, 32),
        "encoder_hidden_states_mask": torch.ones(1, 8, dtype=torch.long),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 4, 6), (1, 3, 5)]],
    }
    return Bare(_qwen_transformer(), inputs)


def z_image() -> Tiny:
    """Z-Image: padded to 32 tokens, then text of 8 and 40 tokens padded to 32 and 64."""
    model = make(
        "ZImageTransformer2DModel",
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=0,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 32, 32],
    )
    call = SIZE | GUIDED
    call |= {"prompt_embeds": [noise(8, 32)], "negative_prompt_embeds": [noise(40, 32)]}
    return pipeline("ZImagePipeline", {"transformer": model} | NO_TEXT, **call)


def hidream() -> Tiny:
    """HiDream, not square: padded to 64 tokens, then 8 + 8 + 8 of text behind."""
    model = make(
        "HiDreamImageTransformer2DModel",
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[32, 16],
        text_emb_dim=64,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 6, 6),
        max_resolution=(16, 16),
        llama_layers=[0, 1],
        force_inference_output=True,
    )
    call: dict[str, Any] = SIZE | GUIDED
    for sign in ("", "negative_"):
        call[f"{sign}prompt_embeds_t5"] = noise(1, 8, 32)
        call[f"{sign}prompt_embeds_llama3"] = noise(2, 1, 8, 16)
        call[f"{sign}pooled_prompt_embeds"] = noise(1, 64)
    texts = {f"{part}_{i}": None for part in ("text_encoder", "tokenizer") for i in (3, 4)}
    parts = {"transformer": model} | NO_TEXTS | texts
    out = pipeline("HiDreamImagePipeline", parts, **call)
    out.pipe.default_sample_size = 9.8  # it resizes everything to the area of this square
    return out


def lumina2() -> Tiny:
    """Lumina 2: only the valid text, 5 and 3 tokens, in front; two forwards a step."""
    model = make(
        "Lumina2Transformer2DModel",
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=0,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(32, 32, 32),
        cap_feat_dim=32,
    )
    call = prompts(valid=5) | SIZE | GUIDED
    return pipeline("Lumina2Pipeline", {"transformer": model} | NO_TEXT, **call)


def auraflow() -> Tiny:
    """AuraFlow: 8 registers and 8 text tokens in front, both branches in one batch."""
    model = make(
        "AuraFlowTransformer2DModel",
        sample_size=12,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=256,
    )
    call = prompts(valid=5) | SIZE | GUIDED
    return pipeline("AuraFlowPipeline", {"transformer": model} | NO_TEXT, **call)


def hunyuan_dit() -> Tiny:
    """HunyuanDiT, both branches in one batch."""
    model = make(
        "HunyuanDiT2DModel",
        sample_size=12,
        num_layers=2,
        patch_size=2,
        attention_head_dim=16,
        num_attention_heads=2,
        in_channels=4,
        hidden_size=32,
        mlp_ratio=2.0,
        cross_attention_dim=32,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        text_len=8,
        text_len_t5=8,
        use_style_cond_and_image_meta_size=False,
    )
    call: dict[str, Any] = SIZE | GUIDED | NO_BINNING
    for sign in ("", "negative_"):
        for last in ("", "_2"):
            call[f"{sign}prompt_embeds{last}"] = noise(1, 8, 32)
            call[f"{sign}prompt_attention_mask{last}"] = torch.ones(1, 8, dtype=torch.long)
    parts = {"transformer": model, "scheduler": diffusers.DDPMScheduler()} | NO_TEXTS
    parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return pipeline("HunyuanDiTPipeline", parts, **call)


def dit() -> Tiny:
    """DiT, class-conditional and square: grid 1×4×4."""
    model = make(
        "DiTTransformer2DModel",
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=16,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
    )
    vae = make("AutoencoderKL", latent_channels=4, block_out_channels=(4,), norm_num_groups=1)
    parts = {"transformer": model, "vae": vae, "scheduler": diffusers.DDIMScheduler()}
    return pipeline("DiTPipeline", parts, class_labels=[1], output_type="np", **GUIDED)


def _flux_transformer(latents: int = 4) -> Any:
    return make(
        "FluxTransformer2DModel",
        in_channels=latents * 4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
    )


def _flux2_transformer() -> Any:
    return make(
        "Flux2Transformer2DModel",
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 4, 4),
    )


def _qwen_transformer() -> Any:
    return make(
        "QwenImageTransformer2DModel",
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
