"""Tiny random pipelines, built in memory in a fraction of a second: no hub, no files, no downloads.

    model = wan()
    video = model.run(seed=0)          # the same call twice gives the same tensor

Each function returns a `Tiny`: a stock diffusers pipeline with random weights, and call arguments
that fit it. The token grid of every model is stated beside it.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image
from tokenizers import pre_tokenizers

CHARACTERS = string.ascii_letters + string.digits + string.punctuation


@dataclass(frozen=True)
class Tiny:
    """A small pipeline and the arguments of a call that it answers in a fraction of a second."""

    pipe: Any
    call: dict[str, Any]

    def run(self, seed: int = 0, **changes: Any) -> torch.Tensor:
        """The output of one call, (1, frames, 3, height, width) or (1, 3, height, width)."""
        generator = torch.Generator("cpu").manual_seed(seed)
        arguments = {"output_type": "pt", "generator": generator} | self.call | changes
        return torch.as_tensor(self.pipe(**arguments)[0])


def wan(layers: int = 2, heads: int = 2, head_dim: int = 12) -> Tiny:
    """Wan 2.1 text-to-video: 9 frames of 32×64 are a grid of 3×2×4 tokens."""
    pipe = diffusers.WanPipeline(
        **_wan_parts(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=wan_transformer(layers, heads, head_dim),
    )
    return _quiet(pipe, **_WAN_CALL)


def wan22(layers: int = 2, heads: int = 2, head_dim: int = 12) -> Tiny:
    """Wan 2.2: two experts, the first for the noisy steps; the same grid as `wan`."""
    pipe = diffusers.WanPipeline(
        **_wan_parts(),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=wan_transformer(layers, heads, head_dim),
        transformer_2=wan_transformer(layers, heads, head_dim, seed=1),
        boundary_ratio=0.875,
    )
    return _quiet(pipe, **_WAN_CALL | {"num_inference_steps": 4, "guidance_scale_2": 3.0})


def wan_i2v(layers: int = 2) -> Tiny:
    """Wan 2.1 image-to-video: image latents as channels, CLIP image tokens in cross-attention."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=4,
        projection_dim=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        intermediate_size=16,
        patch_size=16,
    )
    torch.manual_seed(0)
    pipe = diffusers.WanImageToVideoPipeline(
        **_wan_parts(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=wan_transformer(layers, in_channels=36, image_dim=4, added_kv_proj_dim=24),
        image_encoder=_ready(transformers.CLIPVisionModelWithProjection(vision)),
        image_processor=transformers.CLIPImageProcessor(crop_size=32, size=32),
    )
    call = _WAN_CALL | {"image": Image.new("RGB", (64, 32), "teal"), "max_sequence_length": 512}
    return _quiet(pipe, **call)


def flux(layers: int = 1, heads: int = 2, head_dim: int = 16) -> Tiny:
    """Flux: an image of 16×32 is a grid of 1×8×16 tokens after 48 text tokens."""
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=layers,
        num_single_layers=layers,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(head_dim // 4, head_dim // 4, head_dim // 2),
    )
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=_image_vae(),
        text_encoder=_clip_text_encoder(),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_t5_encoder(),
        tokenizer_2=_t5_tokenizer(),
        transformer=_ready(transformer),
    )
    return _quiet(
        pipe,
        prompt="a cat",
        height=16,
        width=32,
        num_inference_steps=2,
        guidance_scale=3.5,
        max_sequence_length=48,
    )


def wan_transformer(
    layers: int = 2, heads: int = 2, head_dim: int = 12, seed: int = 0, **changes: Any
) -> Any:
    """A random WanTransformer3DModel in evaluation mode."""
    torch.manual_seed(seed)
    arguments = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 32,
        "freq_dim": 256,
        "ffn_dim": 32,
        "num_layers": layers,
        "cross_attn_norm": True,
        "rope_max_seq_len": 64,
    }
    return _ready(diffusers.WanTransformer3DModel(**arguments | changes))


_WAN_CALL: dict[str, Any] = {
    "prompt": "a cat",
    "negative_prompt": "bad",
    "height": 32,
    "width": 64,
    "num_frames": 9,
    "num_inference_steps": 2,
    "guidance_scale": 5.0,
    "max_sequence_length": 16,
}


def _quiet(pipe: Any, **call: Any) -> Tiny:
    pipe.set_progress_bar_config(disable=True)
    return Tiny(pipe, call)


def _ready(module: Any) -> Any:
    """In evaluation mode; untyped, because diffusers' models hide `eval` from type checkers."""
    return module.eval()


def _wan_parts() -> dict[str, Any]:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    return {"tokenizer": _t5_tokenizer(), "text_encoder": _t5_encoder(), "vae": _ready(vae)}


def _image_vae() -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    )
    return _ready(vae)


def _t5_tokenizer() -> Any:
    """One piece a character: different prompts are different tokens."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(character, -3.0) for character in CHARACTERS]
    pieces += [(f"<extra_id_{i}>", 0.0) for i in range(99, -1, -1)]
    return transformers.T5Tokenizer(vocab=pieces, model_max_length=512)


def _t5_encoder() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=1103,
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
    )
    return _ready(transformers.T5EncoderModel(config))


def _clip_tokenizer() -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = letters + [letter + "</w>" for letter in letters]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def _clip_text_encoder() -> Any:
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        bos_token_id=512,
        eos_token_id=2,
        pad_token_id=1,
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=1000,
        hidden_act="gelu",
        projection_dim=32,
    )
    return _ready(transformers.CLIPTextModel(config))
