"""Tiny transformers of the families that follow another one's pattern, with made-up arguments.

No pipelines here: the families they follow have them. Grids are 3×4×6 for video, 1×4×6 for images.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.tiny_parts import Bare, make, noise

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
