"""Tiny transformers of the families that follow another one's pattern, with made-up arguments.

No pipelines here: the families they follow have them. Grids are 3×4×6 for video, 1×4×6 for images.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.tiny.parts import Bare, make, noise

SMALL: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
WAN: dict[str, Any] = SMALL | {"text_dim": 32, "ffn_dim": 32, "num_layers": 2}
COG: dict[str, Any] = SMALL | {"text_embed_dim": 32, "num_layers": 2, "time_embed_dim": 8}
FLUX: dict[str, Any] = SMALL | {
    "num_layers": 1,
    "num_single_layers": 1,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 6, 6),
    "in_channels": 16,
}
TEXT = noise(1, 8, 32)


def chronoedit() -> Bare:
    """Wan with frames far apart in time."""
    model = make("ChronoEditTransformer3DModel", **WAN, rope_max_seq_len=64)
    return _bare(model, noise(1, 16, 3, 8, 12))


def anyflow() -> Bare:
    """Wan with a second timestep, and frames before channels."""
    model = make("AnyFlowTransformer3DModel", **WAN, rope_max_seq_len=64)
    video = noise(1, 3, 16, 8, 12)
    return _bare(model, video, torch.full((1, 3), 500.0), r_timestep=torch.full((1, 3), 250.0))


def consisid() -> Bare:
    """CogVideoX with a face to keep."""
    model = make("ConsisIDTransformer3DModel", **COG, **_cog_sizes(), max_text_seq_length=8)
    return _bare(model, noise(1, 3, 16, 8, 12))


def easyanimate() -> Bare:
    """Prompts of two encoders, 8 + 5 tokens, in front."""
    model = make(
        "EasyAnimateTransformer3DModel",
        **COG,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        sample_width=12,
        sample_height=8,
        mmdit_layers=1,
        text_embed_dim_t5=16,
    )
    return _bare(model, noise(1, 4, 3, 8, 12), encoder_hidden_states_t5=noise(1, 5, 16))


def cogview4() -> Bare:
    """8 text tokens in front, of which 3 are biased as padding."""
    model = make("CogView4Transformer2DModel", **COG, **_view_sizes(), rope_axes_dim=(8, 8))
    mask = (torch.arange(8) < 5)[None].long()
    return _bare(model, noise(1, 4, 8, 12), **_view_inputs(), attention_mask=mask)


def cogview3() -> Bare:
    """8 text tokens in front."""
    model = make("CogView3PlusTransformer2DModel", **COG, **_view_sizes(), pos_embed_max_size=8)
    return _bare(model, noise(1, 4, 8, 12), **_view_inputs())


def bria() -> Bare:
    """Flux with another time embedding."""
    return _bare(make("BriaTransformer2DModel", **FLUX), noise(1, 24, 16), **_ids())


def longcat() -> Bare:
    """Flux whose rows and columns begin at 8."""
    model = make("LongCatImageTransformer2DModel", **FLUX, pooled_projection_dim=32)
    return _bare(model, noise(1, 24, 16), torch.tensor([0.5]), **_ids(begin=8))


def ovis() -> Bare:
    """Flux without a pooled prompt."""
    model = make("OvisImageTransformer2DModel", **FLUX, out_channels=16)
    return _bare(model, noise(1, 24, 16), torch.tensor([0.5]), **_ids())


def hunyuan_image() -> Bare:
    """HunyuanVideo of one frame: 8 + 4 text tokens behind, some of them padding under a mask."""
    model = make(
        "HunyuanImageTransformer2DModel",
        **SMALL,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(2, 2),
        text_embed_dim=32,
        text_embed_2_dim=16,
        rope_axes_dim=(8, 8),
    )
    masks = {
        "encoder_attention_mask": (torch.arange(8) < 5)[None].long(),
        "encoder_attention_mask_2": (torch.arange(4) < 3)[None].long(),
    }
    return _bare(model, noise(1, 4, 8, 12), encoder_hidden_states_2=noise(1, 4, 16), **masks)


def bria_fibo() -> Bare:
    """Flux with a layer of the text encoder for every block."""
    sizes = FLUX | {"text_encoder_dim": 16}
    layers = [noise(1, 8, 16), noise(1, 8, 16).flip(1)]
    ids = _ids()
    return _bare(
        make("BriaFiboTransformer2DModel", **sizes),
        noise(1, 24, 16),
        text_encoder_layers=layers,
        img_ids=ids["img_ids"],
        txt_ids=ids["txt_ids"],
    )


def bria_fibo2() -> Bare:
    """A prompt summed up in 8 tokens in front, and a reference image of 2×3 tokens behind."""
    model = make(
        "BriaFibo2Transformer2DModel",
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=0,  # would spread a patch before the first patched layer
        n_heads=2,
        cap_feat_dim=32,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=8,
        max_num_gist_tokens=16,
        gist_step=8,
        gist_min_text_len=16,
        gist_max_text_len=32,
        axes_dims=(4, 6, 6),
        axes_lens=(64, 32, 32),
    )
    text = noise(1, 2, 10, 32)
    references = [noise(1, 4, 4, 6)]
    return _bare(
        model,
        noise(1, 4, 8, 12),
        torch.tensor([0.5]),
        encoder_hidden_states=text,
        context_latents=references,
    )


def glm_image() -> Bare:
    """8 text tokens in front, of which 3 are biased as padding."""
    model = make(
        "GlmImageTransformer2DModel",
        **SMALL,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
        prior_vq_quantizer_codebook_size=16,
    )
    size = torch.tensor([[64.0, 96.0]])
    more = {
        "prior_token_id": torch.arange(24)[None] % 16,
        "prior_token_drop": torch.tensor([False]),
        "target_size": size,
        "crop_coords": torch.zeros(1, 2),
        "attention_mask": (torch.arange(8) < 5)[None].float(),
    }
    return _bare(model, noise(1, 4, 8, 12), **more)


def ernie_image() -> Bare:
    """Tokens before samples between its layers; 8 text tokens behind, 3 of them masked."""
    model = make(
        "ErnieImageTransformer2DModel",
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=32,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        text_in_dim=32,
        rope_axes_dim=(4, 6, 6),
    )
    inputs = {"hidden_states": noise(1, 4, 8, 12), "timestep": torch.tensor([500.0])}
    return Bare(model, inputs | {"text_bth": TEXT, "text_lens": torch.tensor([5])})


def motif_video(in_channels: int = 4) -> Bare:
    """HunyuanVideo whose last layer decodes: 8 text tokens behind, there the encoder's 72."""
    model = make(
        "MotifVideoTransformer3DModel",
        **SMALL,
        in_channels=in_channels,
        out_channels=4,
        num_layers=1,
        num_single_layers=2,
        num_decoder_layers=1,
        text_embed_dim=32,
        rope_axes_dim=(4, 6, 6),
        enable_text_cross_attention_dual=True,
    )
    mask = (torch.arange(8) < 5)[None].long()
    return _bare(model, noise(1, 4, 3, 8, 12), encoder_attention_mask=mask)


JOY: dict[str, Any] = {
    "in_channels": 4,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": 32,
    "num_layers": 2,
    "rope_dim_list": [4, 6, 6],
}


def joy_image() -> Bare:
    """The image, last of two items but first among the tokens; then a reference, 8 text tokens."""
    model = make("JoyImageEditTransformer3DModel", **JOY)
    return _bare(model, noise(1, 2, 4, 1, 8, 12))


def joy_image_plus() -> Bare:
    """The image of 24 patches, a reference of 6, 2 of padding, 8 text tokens, 3 of them masked."""
    model = make("JoyImageEditPlusTransformer3DModel", **JOY)
    return _bare(
        model,
        noise(1, 32, 4, 1, 2, 2),
        shape_list=[[(1, 4, 6), (1, 2, 3)]],
        encoder_hidden_states_mask=(torch.arange(8) < 5)[None].long(),
    )


def krea2() -> Bare:
    """8 text tokens in front, of two layers of the text encoder, 3 of them masked."""
    model = make(
        "Krea2Transformer2DModel",
        **SMALL,
        in_channels=16,
        num_layers=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=32,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    ids = _ids()
    return _bare(
        model,
        noise(1, 24, 16),
        torch.tensor([0.5]),
        encoder_hidden_states=noise(1, 8, 2, 32),
        position_ids=torch.cat([ids["txt_ids"], ids["img_ids"]]),
        encoder_attention_mask=(torch.arange(8) < 5)[None],
    )


def kandinsky6() -> Bare:
    """Video beside 5 tokens of sound."""
    model = make(
        "Kandinsky6Transformer3DModel",
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=32,
        in_text_dim2=16,
        time_dim=16,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        visual_cond=False,
        in_audio_dim=4,
        out_audio_dim=4,
    )
    more = {"pooled_projections": noise(1, 16), "audio_hidden_states": noise(1, 5, 4)}
    return _bare(model, noise(1, 3, 8, 12, 4), **more)


def flux3(**more: Any) -> Bare:
    """A layer of the image alone, then one of 8 text tokens and the image."""
    model = make(
        "Flux3Transformer2DModel",
        **SMALL,
        in_channels=16,
        cond_in_channels=16,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=32,
        timestep_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    ids = {name: torch.nn.functional.pad(x, (0, 1)) for name, x in _ids().items()}
    return _bare(model, noise(1, 24, 16), torch.tensor([0.5]), **ids, **more)


def lumina_next() -> Bare:
    """One mask of ones, expanded to all heads and queries."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    model = make(
        "LuminaNextDiT2DModel",
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=32,
    )
    torch.nn.init.normal_(model.pad_token)
    inputs = {
        "hidden_states": noise(1, 4, 8, 12),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": TEXT,
        "encoder_mask": (torch.arange(8) < 5)[None].long(),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 16, 16),
        "cross_attention_kwargs": {},
    }
    return Bare(model, inputs)


def _bare(model: Any, hidden: torch.Tensor, time: torch.Tensor | None = None, **more: Any) -> Bare:
    inputs = {"hidden_states": hidden, "encoder_hidden_states": TEXT}
    inputs["timestep"] = torch.tensor([500.0]) if time is None else time
    return Bare(model, inputs | more)


def _ids(begin: int = 0) -> dict[str, torch.Tensor]:
    image = torch.cartesian_prod(*map(torch.arange, (1, 4, 6)))
    image = image + torch.tensor([bool(begin), begin, begin])
    return {"img_ids": image.float(), "txt_ids": torch.zeros(8, 3)}


def _cog_sizes() -> dict[str, Any]:
    return {
        "sample_width": 12,
        "sample_height": 8,
        "sample_frames": 9,
        "cross_attn_dim_head": 8,
        "cross_attn_num_heads": 2,
    }


def _view_sizes() -> dict[str, Any]:
    return {"in_channels": 4, "out_channels": 4, "condition_dim": 4, "sample_size": 16}


def _view_inputs() -> dict[str, torch.Tensor]:
    size = torch.tensor([[64.0, 96.0]])
    return {"original_size": size, "target_size": size, "crop_coords": torch.zeros(1, 2)}
