"""Tiny pipelines and models of others that are built on a supported transformer.

Stock pipelines (Lucy, VisualCloze), pipelines of blocks (Anima, Echo), and configurations of LTX-2
that came after it.
"""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch
from PIL import Image

from tests import tiny
from tests.tiny import Tiny
from tests.tiny.parts import SIZE, Bare, make, noise, pipeline

LTX2: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "num_layers": 2,
    "caption_channels": 16,
}
LTX23 = LTX2 | {
    "gated_attn": True,
    "cross_attn_mod": True,
    "audio_gated_attn": True,
    "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False,
    "perturbed_attn": True,
    "rope_type": "split",
}
LTX25 = LTX23 | {
    "ff_bias": False,
    "audio_ff_bias": False,
    "use_prompt_adaln_single": False,
    "use_keyframes_abs_pos_embedding": True,
}


def lucy() -> Tiny:
    """Lucy Edit: a Wan whose other channels hold the video to edit; 3×4×6 tokens."""
    base = tiny.wan()
    parts = _wanted(diffusers.LucyEditPipeline, base.pipe)
    parts["transformer"] = tiny.wan_transformer(2, in_channels=32)
    video = [Image.new("RGB", (96, 64), color) for color in ("teal", "red", "blue")] * 3
    call = base.call | SIZE | {"video": video, "output_type": "latent"}
    return pipeline("LucyEditPipeline", parts, **call)


def _wanted(cls: Any, pipe: Any) -> dict[str, Any]:
    """Those parts of a pipeline that another one takes."""
    names = inspect.signature(cls.__init__).parameters
    return {name: part for name, part in pipe.components.items() if name in names}


def visual_cloze() -> Tiny:
    """VisualCloze: Flux Fill on two rows of pictures; text, then 6×18 tokens, then as many."""
    base = tiny.flux().pipe
    parts = _wanted(diffusers.VisualClozeGenerationPipeline, base) | {"resolution": 16}
    size = 2 ** (len(base.vae.config.block_out_channels) - 1)
    parts["transformer"] = make(
        "FluxTransformer2DModel",
        in_channels=8 + 4 * size**2,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    picture = Image.new("RGB", (24, 16), "teal")
    images = [[picture, picture], [picture, None]]
    return pipeline(
        "VisualClozeGenerationPipeline", parts, image=images, task_prompt="a", content_prompt="b",
        max_sequence_length=48,
    )  # fmt: skip


def ltx2(config: dict[str, Any]) -> Bare:
    """A transformer of LTX-2 and what came after it; 3×4×6 video tokens."""
    model = make("LTX2VideoTransformer3DModel", **config)
    text = config["caption_channels"] if config.get("use_prompt_embeddings", True) else 32
    sound = config["caption_channels"]
    inputs = {
        "hidden_states": noise(1, 72, 4),
        "audio_hidden_states": noise(1, 5, 4),
        "encoder_hidden_states": noise(1, 8, text),
        "audio_encoder_hidden_states": noise(1, 8, sound),
        "timestep": torch.tensor([500.0]),
        "sigma": torch.tensor([0.5]),
        "num_frames": 3,
        "height": 4,
        "width": 6,
        "fps": 24.0,
        "audio_num_frames": 5,
    }
    return Bare(model, inputs)


def anima() -> Tiny:
    """The denoising block of Anima's pipeline, over Cosmos; 1×4×6 tokens."""
    from diffusers.modular_pipelines.anima.denoise import AnimaDenoiseStep

    pipe: Any = AnimaDenoiseStep().init_pipeline()
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    transformer = make(
        "CosmosTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=32,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        concat_padding_mask=False,  # diffusers resizes it with torchvision
    )
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=4.0)
    pipe.update_components(scheduler=scheduler, transformer=transformer, guider=guider)
    pipe.set_progress_bar_config(disable=True)
    scheduler.set_timesteps(2)
    text = noise(1, 8, 32)
    call = {
        "latents": noise(1, 4, 1, 8, 12),
        "timesteps": scheduler.timesteps,
        "num_inference_steps": 2,
        "padding_mask": torch.zeros(1, 1, 8, 12),
        "dtype": torch.float32,
        "prompt_embeds": text,
        "negative_prompt_embeds": text.flip(1),
        "output": "latents",
    }
    return Blocks(pipe, call)


def echo(memory: int = 2) -> Tiny:
    """The denoising block of Echo's pipeline, over LTX-2: memory, then 3×4×6 tokens."""
    from diffusers.modular_pipelines.echo import before_denoise
    from diffusers.modular_pipelines.echo.denoise import EchoDenoiseLoopStep

    pipe: Any = EchoDenoiseLoopStep().init_pipeline()
    model = make("LTX2VideoTransformer3DModel", **LTX23)
    pipe.update_components(transformer=model)
    pipe.set_progress_bar_config(disable=True)
    device = torch.device("cpu")
    call = {
        "sigmas": [1.0, 0.5, 0.0],
        "latents": noise(1, 72, 4),
        "audio_latents": noise(1, 5, 4),
        "first_frame_token_count": 0,
        "video_coords": model.rope.prepare_video_coords(1, 3, 4, 6, device, fps=24.0),
        "audio_coords": model.audio_rope.prepare_audio_coords(1, 5, device),
        "connector_prompt_embeds": noise(1, 8, 32),
        "connector_audio_prompt_embeds": noise(1, 8, 16),
        "connector_attention_mask": torch.ones(1, 8),
        "latent_num_frames": 3,
        "latent_height": 4,
        "latent_width": 6,
        "audio_num_frames": 5,
        "memory_video_token_count": 24 * memory,
        "memory_audio_token_count": 0,
        "frame_rate": 24.0,
        "output": "latents",
    }
    if memory:
        coords = before_denoise._video_memory_coords(model, memory, 4, 6, 24.0, -3.0, 1.0, device)
        call |= {"memory_video_tokens": noise(1, 24 * memory, 4), "memory_video_coords": coords}
    return Blocks(pipe, call)


def minimax_h3() -> Tiny:
    """The denoising block of MiniMax-H3's pipeline, over a sequence with a video to refer to.

    Sound and video have a scheduler each, and both step in one loop.
    """
    from diffusers.modular_pipelines.minimax_h3.denoise import MiniMaxH3Ref2VADenoiseStep

    from tests.tiny import packed

    alone = packed.minimax_h3_references()
    pipe: Any = MiniMaxH3Ref2VADenoiseStep().init_pipeline()
    schedulers = {name: diffusers.MiniMaxH3Scheduler() for name in ("scheduler", "audio_scheduler")}
    pipe.update_components(transformer_ref=alone.pipe, **schedulers)
    pipe.set_progress_bar_config(disable=True)
    names = ("token_tags", "position_ids", "video_indices", "audio_indices", "text_indices")
    given = alone.call
    plan = (given["timestep"], given["timestep_indices"])
    call = {
        "latents": given["hidden_states"][0],
        "audio_latents": given["audio_hidden_states"][0],
        "prompt_embeds": given["encoder_hidden_states"],
        "row_timestep_plan": [plan, plan],
        "denoiser_input_fields": {name: given[name] for name in names},
        "num_condition_video_rows": 66,
        "num_condition_audio_rows": 10,
        "output": "latents",
    }
    return TwoClocks(pipe, call)


class TwoClocks(Tiny):
    """MiniMax-H3's pipeline, with both schedulers set anew for every run."""

    def run(self, seed: int = 0, **changes: Any) -> torch.Tensor:
        call = {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in self.call.items()}
        for scheduler in (self.pipe.scheduler, self.pipe.audio_scheduler):
            scheduler.set_timesteps(3)  # of which the last is the end
        call["timesteps"] = self.pipe.scheduler.timesteps
        call["audio_timesteps"] = self.pipe.audio_scheduler.timesteps
        out: torch.Tensor = self.pipe(**call | changes)
        return out


class Blocks(Tiny):
    """A pipeline of blocks, whose call names what it gives."""

    def run(self, seed: int = 0, **changes: Any) -> torch.Tensor:
        call = {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in self.call.items()}
        if hasattr(self.pipe, "scheduler"):
            self.pipe.scheduler.set_timesteps(2)
        generator = torch.Generator("cpu").manual_seed(seed)
        out: torch.Tensor = self.pipe(**call | changes, generator=generator)
        return out
