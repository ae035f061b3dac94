"""How large models are: what a plan needs to know, from a name or from a loaded pipeline.

The built-in rows follow the published configurations, so that planning needs no weights.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffpatch.errors import BadParameter


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide what attention costs.

    Attributes:
        name: what people call the model.
        kind: "video" or "image".
        layers: patched self-attention layers.
        heads: attention heads.
        head_dim: channels of a head.
        ffn: hidden width of the feed-forward layer.
        cross_tokens: text tokens that every layer cross-attends to; 0 where there are none.
        text_tokens: text tokens inside the self-attention sequence.
        text_before: whether they stand in front of the visual ones.
        space: pixels per latent along height and width.
        time: frames per latent frame, or per group of them.
        groups: (first frames, first latent frames, latent frames of a group): time·k + first frames
            are as many groups of latent frames and the first ones.
        patch: latents per token along (time, height, width).
        transformer: its class, for published presets.
        experts: whether two such transformers share the steps.
        channels: of a token outside of attention; 0 where they are heads × head_dim.
        sound: (latents a second, frames a second, tokens a latent) of the sound in the sequence.
        packed: whether videos to refer to stand in the sequence, each in a grid of its own.
        ids: hub ids of checkpoints of this shape, so that naming one needs no network.
    """

    name: str
    kind: str
    layers: int
    heads: int
    head_dim: int
    ffn: int
    space: int
    time: int = 1
    patch: tuple[int, int, int] = (1, 2, 2)
    cross_tokens: int = 0
    text_tokens: int = 0
    text_before: bool = False
    transformer: str = ""
    experts: bool = False
    groups: tuple[int, int, int] = (1, 1, 1)
    channels: int = 0
    sound: tuple[int, int, int] = (0, 1, 1)
    packed: bool = False
    ids: tuple[str, ...] = ()

    def grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The token grid (frames, rows, columns) of a clip or image of that many pixels.

        Raises:
            ValueError: the pixels do not fill whole tokens.
        """
        rows, columns = self.frame(height, width)
        if self.kind == "image" and num_frames != 1:
            raise ValueError(f"num_frames={num_frames}, but {self.name} makes images: leave it out")
        if self.kind == "video" and num_frames == 1:
            raise ValueError(
                f"num_frames=1, but {self.name} makes videos: say how many frames, such as"
                f" {self.frames_up_to(20 * self.time + self.groups[0])}"
            )
        below = self.frames_up_to(num_frames)
        if num_frames != below:
            raise ValueError(
                f"num_frames={num_frames} must be {self.time}·k + {self.groups[0]} for {self.name},"
                f" such as {below} or {below + self.time}"
            )
        return math.ceil(self.latent_frames(num_frames) / self.patch[0]), rows, columns

    def frame(self, height: int, width: int) -> tuple[int, int]:
        """The rows and columns of tokens of a frame of that many pixels.

        Raises:
            ValueError: the pixels do not fill whole tokens.
        """
        for name, value, patch in (
            ("height", height, self.patch[1]),
            ("width", width, self.patch[2]),
        ):
            step = self.space * patch
            if value < 1 or value % step:
                near = max(step, round(value / step) * step)
                raise ValueError(
                    f"{name}={value} must be a multiple of {step} for {self.name}, such as {near}"
                )
        return height // self.space // self.patch[1], width // self.space // self.patch[2]

    def frames_up_to(self, num_frames: int) -> int:
        """The longest clip of up to so many frames that fills latent frames, or the shortest."""
        first = self.groups[0]
        return max(0, num_frames - first) // self.time * self.time + first

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of a clip."""
        first, first_latents, latents = self.groups
        return (num_frames - first) // self.time * latents + first_latents

    def sound_tokens(self, num_frames: int) -> int:
        """Tokens of the sound that goes with a clip."""
        latents, frames, tokens = self.sound
        return round(num_frames / frames * latents) * tokens

    def linear_flops(self, tokens: int) -> float:
        """Floating-point operations of one layer besides self-attention, for one forward."""
        inner = self.heads * self.head_dim
        dim = self.channels or inner
        per_token = 8 * dim * inner + 4 * dim * self.ffn
        if self.cross_tokens:
            per_token += 4 * dim * inner + 4 * self.cross_tokens * inner
        return float(tokens) * per_token

    def attention_flops(self, tokens: int) -> float:
        """Floating-point operations of one layer's dense self-attention, for one forward."""
        return 4.0 * tokens**2 * self.heads * self.head_dim


_WAN = {"space": 8, "time": 4, "cross_tokens": 512, "transformer": "WanTransformer3DModel"}
_FLUX = {"text_tokens": 512, "text_before": True, "transformer": "FluxTransformer2DModel"}
_COG = {"text_tokens": 226, "text_before": True, "transformer": "CogVideoXTransformer3DModel"}
_WAN_14B = ("T2V-14B", "I2V-14B-480P", "I2V-14B-720P")

MODELS: tuple[ModelShape, ...] = (
    ModelShape(
        "wan-1.3b", "video", 30, 12, 128, 8960, **_WAN,  # type: ignore[arg-type]
        ids=("Wan-AI/Wan2.1-T2V-1.3B-Diffusers",),
    ),
    ModelShape(
        "wan-14b", "video", 40, 40, 128, 13824, **_WAN,  # type: ignore[arg-type]
        ids=tuple(f"Wan-AI/Wan2.1-{size}-Diffusers" for size in _WAN_14B),
    ),
    ModelShape(
        "wan2.2-a14b", "video", 40, 40, 128, 13824, **_WAN, experts=True,  # type: ignore[arg-type]
        ids=("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "Wan-AI/Wan2.2-I2V-A14B-Diffusers"),
    ),
    ModelShape(
        "wan-5b", "video", 30, 24, 128, 14336, **(_WAN | {"space": 16}),  # type: ignore[arg-type]
        ids=("Wan-AI/Wan2.2-TI2V-5B-Diffusers",),
    ),
    ModelShape(
        "hunyuan-video", "video", 60, 24, 128, 12288, 8, 4, text_tokens=256,
        transformer="HunyuanVideoTransformer3DModel", ids=("hunyuanvideo-community/HunyuanVideo",),
    ),
    ModelShape(
        "cogvideox-2b", "video", 30, 30, 64, 7680, 8, 4, **_COG,  # type: ignore[arg-type]
        ids=("THUDM/CogVideoX-2b", "zai-org/CogVideoX-2b"),
    ),
    ModelShape(
        "cogvideox-5b", "video", 42, 48, 64, 12288, 8, 4, **_COG,  # type: ignore[arg-type]
        ids=("THUDM/CogVideoX-5b", "zai-org/CogVideoX-5b"),
    ),
    ModelShape(
        "mochi", "video", 48, 24, 128, 8192, 8, 6, text_tokens=256,
        transformer="MochiTransformer3DModel", ids=("genmo/mochi-1-preview",),
    ),
    ModelShape(
        "ltx-video", "video", 28, 32, 64, 8192, 32, 8, patch=(1, 1, 1), cross_tokens=128,
        transformer="LTXVideoTransformer3DModel", ids=("Lightricks/LTX-Video",),
    ),
    ModelShape(
        "flux", "image", 57, 24, 128, 12288, 8, **_FLUX,  # type: ignore[arg-type]
        ids=("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"),
    ),
    ModelShape(
        "sd3.5-large", "image", 38, 38, 64, 9728, 8, text_tokens=333,
        transformer="SD3Transformer2DModel", ids=("stabilityai/stable-diffusion-3.5-large",),
    ),
    ModelShape(
        "qwen-image", "image", 60, 24, 128, 12288, 8, text_tokens=256, text_before=True,
        transformer="QwenImageTransformer2DModel", ids=("Qwen/Qwen-Image",),
    ),
    ModelShape(  # its three matrices of 14,336 a feed-forward layer count as two of 21,504
        "minimax-h3", "video", 50, 56, 128, 21504, 16, 17, groups=(5, 2, 5), channels=5376,
        text_tokens=512, text_before=True, sound=(40, 24, 2), packed=True,
        transformer="MiniMaxH3Transformer3DModel", ids=("MiniMaxAI/MiniMax-H3",),
    ),
)  # fmt: skip


def shape_of(model: str) -> ModelShape:
    """The shape of a built-in model by its name or a hub id.

    Raises:
        KeyError: there is no such row; the message lists them.
    """
    for row in MODELS:
        if model == row.name or model in row.ids:
            return row
    names = [row.name for row in MODELS]
    close = difflib.get_close_matches(model, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise KeyError(f"no built-in shape {model!r}: {hint}known: {', '.join(names)}")


def shape_of_pipeline(pipe: Any, transformer: Any, modules: list[str], family: Any) -> ModelShape:
    """The shape of a pipeline, read off its transformer and autoencoder; no weights are needed.

    Args:
        pipe: the pipeline, or the transformer itself.
        transformer: the transformer that is planned for.
        modules: paths of its self-attention modules.
        family: its row in the table of families.
    """
    attention = transformer.get_submodule(modules[0])
    block = transformer.get_submodule(modules[0].rpartition(".")[0])
    config: Mapping[str, Any] = transformer.config
    counts = (getattr(attention, n, 0) for n in ("heads", "num_heads", "num_attention_heads"))
    heads = config.get("num_attention_heads") or next(filter(None, counts), 0)
    names = ("to_q", "to_qkv", "to_query", "q_proj", "img_qkv_proj", "img_attn_qkv")
    name = next((n for n in names if getattr(attention, n, None) is not None), None)
    if name is None or not heads:
        raise BadParameter(
            f"the attention of {type(transformer).__name__} cannot be planned for: it does not say"
            " its heads and sizes in a way that is known"
        )
    projection = getattr(attention, name)
    dim: int = projection.in_features
    inner = dim if "qkv" in name else projection.out_features
    widths = [
        m.out_features
        for name, m in block.named_modules()
        if name.startswith("ff") and hasattr(m, "out_features")
    ]
    usual = next((m for m in MODELS if m.transformer == family.transformer), None)
    space, time = _scales(pipe, family, usual)
    arguments = set(inspect.signature(transformer.forward).parameters)
    packed = bool({"img_ids", "img_shapes"} & arguments)
    return ModelShape(
        name=type(pipe).__name__,
        kind=family.kind,
        layers=len(modules),
        heads=heads,
        head_dim=inner // heads,
        ffn=max(widths, default=4 * dim),
        space=space,
        time=time,
        patch=_patch(config, packed),
        cross_tokens=512 if hasattr(block, "attn2") else 0,
        text_tokens=max(
            (m.text_tokens for m in MODELS if m.transformer == family.transformer), default=0
        ),
        text_before=family.text in ("before", "packed"),
        transformer=family.transformer,
        groups=(1, 1, 1) if usual is None else usual.groups,
        channels=0 if dim == inner else dim,
        sound=(0, 1, 1) if usual is None else usual.sound,
        packed=family.text == "packed",
    )


def _scales(pipe: Any, family: Any, usual: ModelShape | None) -> tuple[int, int]:
    """Pixels per latent, and frames per latent frame; the family's usual without a pipeline."""
    space = getattr(pipe, "vae_scale_factor_spatial", 0) or getattr(pipe, "vae_scale_factor", 0)
    if space:
        return space, getattr(pipe, "vae_scale_factor_temporal", 0) or 1
    if usual is not None:
        return usual.space, usual.time
    return 8, 4 if family.kind == "video" else 1


def _patch(config: Mapping[str, Any], packed: bool) -> tuple[int, int, int]:
    """Latents per token; packed pipelines fold 2×2 latents before the transformer sees them."""
    size = config.get("patch_size") or 1
    t, h, w = (1, size, size) if isinstance(size, int) else (1, *size)[-3:]
    t = config.get("patch_size_t") or t
    return (t, 2 * h, 2 * w) if packed else (t, h, w)
