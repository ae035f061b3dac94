"""Pipelines of the families whose transformers `tests.tiny.more` builds alone.

Everything that the pipeline does around its loop is diffusers': packing, guidance, scheduler, what
it hands to the transformer. Prompts come as random embeddings; where a pipeline takes none, or
encodes images with a network, that one method gives random numbers (`_stubbed`). Grids are 3×4×6
for video, 1×4×6 for images.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from PIL import Image

from tests import tiny
from tests.tiny import Tiny, derived, more
from tests.tiny import packed as packing
from tests.tiny.derived import Blocks
from tests.tiny.parts import GUIDED, NO_TEXT, NO_TEXTS, SIZE, Sizes, make, noise, pipeline, prompts

CALL: dict[str, Any] = SIZE | GUIDED | prompts()
MASKS: dict[str, Any] = dict.fromkeys(
    ("prompt_attention_mask", "negative_prompt_attention_mask"), torch.ones(1, 8).long()
)
VALID: dict[str, Any] = CALL | MASKS
LARGE: dict[str, Any] = {"height": 128, "width": 192}  # where patches and decoder make 32 pixels
PICTURE = Image.new("RGB", (96, 64), "teal")
CLIP: dict[str, Any] = {"num_frames": 9}


class Decoder(Sizes):
    """In place of a decoder of 8×8 pixels and 4 frames."""

    dtype = torch.float32
    temporal_compression_ratio, spatial_compression_ratio = 4, 8
    config = SimpleNamespace(
        z_dim=4,
        latent_channels=4,
        spatial_compression_ratio=8,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
        scaling_factor=1.0,
    )


class Encoder:
    """An encoder that JoyImage samples without a generator: here it gives the mean."""

    def __init__(self) -> None:
        self._vae = _wan_vae(4)
        self.config, self.dtype = self._vae.config, self._vae.dtype

    def encode(self, image: torch.Tensor) -> Any:
        out = self._vae.encode(image)
        out.latent_dist.sample = out.latent_dist.mode
        return out


def chronoedit() -> Tiny:
    """9 frames of thinking, the first of which is the image."""
    sizes = {"in_channels": 36, "out_channels": 16, "image_dim": 4, "added_kv_proj_dim": 32}
    model = make("ChronoEditTransformer3DModel", **more.WAN, **sizes, rope_max_seq_len=64)
    parts = {"image_encoder": None, "image_processor": None, "vae": _wan_vae(16)}
    call = {"enable_temporal_reasoning": True, "num_temporal_reasoning_steps": 4} | CLIP
    made = _made("ChronoEditPipeline", model, parts, image=torch.zeros(1, 3, 64, 96), **call)
    return _stubbed(made, encode_image=noise(1, 5, 4))


def anyflow() -> Tiny:
    """Frames before channels."""
    parts = {"vae": _wan_vae(16), "scheduler": diffusers.FlowMapEulerDiscreteScheduler()}
    return _made("AnyFlowPipeline", more.anyflow().pipe, parts, **CLIP)


def consisid() -> Tiny:
    """The package wants OpenCV for faces; the pipeline itself does not."""
    from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline

    sizes = more._cog_sizes() | {"in_channels": 8, "out_channels": 4, "max_text_seq_length": 8}
    parts: dict[str, Any] = NO_TEXT | {
        "vae": None,
        "transformer": make("ConsisIDTransformer3DModel", **more.COG, **sizes),
        "scheduler": diffusers.CogVideoXDDIMScheduler(),
    }
    pipe: Any = ConsisIDPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    call = CALL | CLIP | {"image": PICTURE, "num_inference_steps": 2, "output_type": "latent"}
    clips = (noise(1, 3, 4, 8, 12), noise(1, 3, 4, 8, 12).flip(1))
    return _stubbed(Tiny(pipe, call), prepare_latents=clips)


def easyanimate() -> Tiny:
    """Prompts of one encoder: 8 tokens in front."""
    sizes = {"in_channels": 4, "out_channels": 4, "patch_size": 2, "mmdit_layers": 1}
    sizes |= {"sample_width": 12, "sample_height": 8}
    model = make("EasyAnimateTransformer3DModel", **more.COG, **sizes)
    return _made("EasyAnimatePipeline", model, {"vae": Sizes()}, **VALID | LARGE | CLIP)


def cogview4() -> Tiny:
    """A call for each prompt."""
    return _made("CogView4Pipeline", more.cogview4().pipe)


def cogview3() -> Tiny:
    """Both prompts in one batch, DDIM."""
    parts = {"scheduler": diffusers.CogVideoXDDIMScheduler()}
    return _made("CogView3PlusPipeline", more.cogview3().pipe, parts)


def bria() -> Tiny:
    """It asks its scheduler for its very class."""
    parts = {"image_encoder": None, "feature_extractor": None, "vae": tiny._image_vae()}
    return _made("BriaPipeline", more.bria().pipe, parts, height=8, width=12)


def longcat() -> Tiny:
    """Prompts of 8 and 9 tokens."""
    model = make("LongCatImageTransformer2DModel", **more.FLUX | {"in_channels": 64})
    parts = {"text_processor": None, "transformer": model}
    call = SIZE | GUIDED | {"prompt": "a", "negative_prompt": "bc", "enable_prompt_rewrite": False}
    made = pipeline("LongCatImagePipeline", NO_TEXT | parts, **call)
    made.pipe._encode_prompt = lambda prompt: noise(1, 7 + len(prompt[0]), 32)
    return made


def ovis() -> Tiny:
    """A call for each prompt."""
    return _made("OvisImagePipeline", more.ovis().pipe, negative_prompt=None)


def hunyuan_image() -> Tiny:
    """Two encoders, and a guider that mixes."""
    glyphs = noise(1, 4, 16)
    second = {"prompt_embeds_2": glyphs, "negative_prompt_embeds_2": glyphs.flip(1)}
    call = SIZE | prompts() | second | _masks() | _masks(4, "prompt_embeds_mask_2")
    guider: Any = diffusers.AdaptiveProjectedMixGuidance(guidance_scale=3.0)
    parts = {"vae": Decoder(), "guider": guider, "ocr_guider": guider}
    parts["transformer"] = more.hunyuan_image().pipe
    return pipeline("HunyuanImagePipeline", NO_TEXTS | parts, **call)


def bria_fibo() -> Tiny:
    """Layers of the text encoder instead of a prompt."""
    parts = NO_TEXT | {"transformer": more.bria_fibo().pipe}
    made = pipeline("BriaFiboPipeline", parts, prompt="a", **SIZE, **GUIDED)
    text, layer, mask = noise(1, 8, 32), noise(1, 8, 16), torch.ones(1, 8)
    layers = [layer, layer.flip(1)]
    told = (text, text.flip(1), torch.zeros(1, 8, 3), mask, mask, layers, layers[::-1])
    return _stubbed(made, encode_prompt=told)


def bria_fibo2() -> Tiny:
    """Prompts summed up in 8 tokens."""
    text = noise(1, 2, 10, 32)
    parts = {"text_encoder": None, "processor": None, "transformer": more.bria_fibo2().pipe}
    call = SIZE | GUIDED | {"prompt_embeds": text, "negative_prompt_embeds": text.flip(2)}
    return pipeline("BriaFibo2Pipeline", parts, **call)


def glm_image() -> Tiny:
    """Tokens that its language model would have drawn before."""
    parts = {"processor": None, "vision_language_encoder": None}
    prior = torch.arange(24)[None] % 16
    return _made("GlmImagePipeline", more.glm_image().pipe, parts, prior_token_ids=prior)


def glm_image_edit() -> Tiny:
    """With an image to edit, whose keys the transformer caches before the loop begins."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "block_out_channels": (4,) * 4}
    blocks["up_block_types"] = ("UpDecoderBlock2D",) * 4
    vae = make("AutoencoderKL", **blocks, latent_channels=4, norm_num_groups=1)
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    model, prior = glm_image(), torch.arange(24) % 16
    model.pipe.register_modules(vae=vae)
    more = {"prior_token_image_ids": [prior], "source_image_grid_thw": [torch.tensor([[1, 4, 6]])]}
    return Tiny(model.pipe, model.call | {"image": [PICTURE]} | more)


def ernie_image() -> Tiny:
    """Prompts as lists."""
    text = noise(8, 32)
    embeds = {"prompt_embeds": [text], "negative_prompt_embeds": [text.flip(0)]}
    return _made("ErnieImagePipeline", more.ernie_image().pipe, **LARGE | embeds)


def motif_video() -> Tiny:
    """Latents, an empty first frame and its mask as channels; a guider."""
    guider: Any = diffusers.ClassifierFreeGuidance(guidance_scale=3.0)
    parts = NO_TEXT | {"vae": Decoder(), "guider": guider}
    parts["transformer"] = more.motif_video(in_channels=9).pipe
    return pipeline("MotifVideoPipeline", parts, **SIZE, **prompts(), **MASKS, **CLIP)


def krea2() -> Tiny:
    """Two layers of the text encoder."""
    text = noise(1, 8, 2, 32)
    call = _masks() | {"prompt_embeds": text, "negative_prompt_embeds": text.flip(1)}
    return _made("Krea2Pipeline", more.krea2().pipe, **call)


def kandinsky6() -> Tiny:
    """Without sound."""
    pooled = noise(1, 16)
    call = {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": pooled.flip(1)}
    parts = NO_TEXTS | {"transformer": more.kandinsky6().pipe}
    return pipeline("Kandinsky6TI2VAPipeline", parts, **CALL, **call, **CLIP, sample_audio=False)


def lumina_next() -> Tiny:
    """Both prompts in one batch."""
    return _made("LuminaPipeline", more.lumina_next().pipe, **VALID)


def joy_image() -> Tiny:
    """An image to edit of the same 4×6 tokens; its sizes of a million pixels are left out."""
    parts = {"processor": None, "vae": Encoder()}
    call = _masks() | {"image": PICTURE}
    made = _made("JoyImageEditPipeline", more.joy_image().pipe, parts, **call)
    made.pipe.vae_image_processor.get_default_height_width = lambda *_: (64, 96)
    return made


def joy_image_plus() -> Tiny:
    """An image to refer to, of 2×3 tokens."""
    parts = {"processor": None, "vae": Encoder(), "transformer": more.joy_image_plus().pipe}
    call = {"images": [[PICTURE]], "prompt": "a", "negative_prompt": "bc"}
    made = pipeline("JoyImageEditPlusPipeline", NO_TEXT | parts, **SIZE, **GUIDED, **call)
    made.pipe.image_processor.get_default_height_width = lambda *_: (32, 48)
    made.pipe.encode_prompt_multiple_images = lambda prompt, **_: (
        noise(1, 8, 32).roll(len(prompt[0]), 1),
        torch.ones(1, 8).long(),
    )
    return made


def flux3() -> Tiny:
    """The blocks around its loop, without encoder and decoder."""
    from diffusers.modular_pipelines.flux3.modular_blocks_flux3 import Flux3CoreDenoiseStep

    pipe: Any = Flux3CoreDenoiseStep().init_pipeline()
    guider: Any = diffusers.ClassifierFreeGuidance(guidance_scale=3.0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe.update_components(transformer=more.flux3().pipe, scheduler=scheduler, guider=guider)
    pipe.set_progress_bar_config(disable=True)
    return Blocks(pipe, SIZE | prompts() | {"num_inference_steps": 2, "output": "latents"})


def anima() -> Tiny:
    """The blocks around its loop over Cosmos, with its conditioner; 8 tokens of two encoders."""
    from diffusers.modular_pipelines.anima.modular_blocks_anima import AnimaCoreDenoiseStep

    pipe: Any = AnimaCoreDenoiseStep().init_pipeline()
    sizes = {"source_dim": 32, "target_dim": 32, "model_dim": 32, "num_attention_heads": 2}
    few = {"num_layers": 1, "target_vocab_size": 16, "min_sequence_length": 8}
    guider: Any = diffusers.ClassifierFreeGuidance(guidance_scale=4.0)
    pipe.update_components(
        text_conditioner=make("AnimaTextConditioner", **sizes, **few),
        transformer=derived.anima().pipe.transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        guider=guider,
    )
    pipe.set_progress_bar_config(disable=True)
    text, ids, mask = noise(1, 8, 32), torch.arange(8)[None], torch.ones(1, 8).long()
    masks = {"qwen_attention_mask": mask, "t5_attention_mask": mask}
    call = {"qwen_prompt_embeds": text, "t5_input_ids": ids} | masks
    other = call | {"qwen_prompt_embeds": text.flip(1), "t5_input_ids": ids.flip(1)}
    call |= {f"negative_{name}": value for name, value in other.items()}
    return Blocks(pipe, SIZE | call | {"num_inference_steps": 2, "output": "latents"})


def echo() -> Tiny:
    """The blocks around its loop over LTX-2, after two images to remember."""
    from diffusers.modular_pipelines.echo.modular_blocks_echo import EchoDenoiseStep

    pipe: Any = EchoDenoiseStep().init_pipeline()
    sound = {"audio_in_channels": 16, "audio_out_channels": 16}
    model = make("LTX2VideoTransformer3DModel", **derived.LTX23 | sound)
    pipe.update_components(transformer=model)
    pipe.set_progress_bar_config(disable=True)
    call = {
        "connector_prompt_embeds": noise(1, 8, 32),
        "connector_audio_prompt_embeds": noise(1, 8, 16),
        "connector_attention_mask": torch.ones(1, 8),
        "memory_video_latents": [noise(1, 4, 1, 4, 6), noise(1, 4, 1, 4, 6).flip(3)],
        "num_frames": 17,
        "sigmas": [1.0, 0.5, 0.0],
        "output": "latents",
    }
    return Blocks(pipe, LARGE | call)


class Pieces(Tiny):
    """A pipeline that gives a list of pieces."""

    def run(self, seed: int = 0, **changes: Any) -> torch.Tensor:
        generator = torch.Generator("cpu").manual_seed(seed)
        made: list[torch.Tensor] = self.pipe(**self.call | changes, generator=generator)[0]
        return made[-1]


def framepack() -> Tiny:
    """One piece of three frames after an image; guidance by a call for each prompt."""
    pooled = noise(1, 8)
    call = VALID | CLIP | {"latent_window_size": 3, "true_cfg_scale": 3.0}
    call |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": pooled.flip(1)}
    parts = {"image_encoder": None, "feature_extractor": None, "vae": Decoder()}
    parts["transformer"] = packing.framepack().pipe
    call["image"] = torch.zeros(1, 3, 64, 96)
    made = pipeline("HunyuanVideoFramepackPipeline", NO_TEXTS | parts, **call)
    images = noise(1, 4, 1, 8, 12)
    made = _stubbed(made, encode_image=noise(1, 2, 8), prepare_image_latents=images)
    return Pieces(made.pipe, made.call)


def _made(cls: str, model: Any, parts: dict[str, Any] | None = None, **call: Any) -> Tiny:
    """A pipeline without a text encoder; the call is that of `CALL` where it does not say."""
    return pipeline(cls, NO_TEXT | {"transformer": model} | (parts or {}), **CALL | call)


def _stubbed(made: Tiny, **results: Any) -> Tiny:
    """With methods of its pipeline that give these, whatever they are asked."""
    for name, result in results.items():
        setattr(made.pipe, name, lambda *_, result=result, **__: result)
    return made


def _masks(length: int = 8, name: str = "prompt_embeds_mask") -> dict[str, Any]:
    """Prompts without padding."""
    return {f"{prefix}{name}": torch.ones(1, length).bool() for prefix in ("", "negative_")}


def _wan_vae(channels: int) -> Any:
    torch.manual_seed(0)
    vae: Any = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    )
    return vae.eval()
