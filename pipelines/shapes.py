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
        time: frames per latent frame.
        patch: latents per token along (time, height, width).
        family: the transformer class, for published presets.
        experts: whether two such transformers share the steps.
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
    family: str = ""
    experts: bool = False

    def grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The token grid (frames, rows, columns) of a clip or image of that many pixels.

        Raises:
            ValueError: the pixels do not fill whole tokens.
        """
        for name, value, patch in (
            ("height", height, self.patch[1]),
            ("width", width, self.patch[2]),
        ):
            if value < 1 or value % (self.space * patch):
                raise ValueError(
                    f"{name}={value} must be a multiple of {self.space * patch} for {self.name}"
                )
        if num_frames < 1 or (num_frames - 1) % self.time:
            below = max(1, (num_frames - 1) // self.time * self.time + 1)
            raise ValueError(
                f"num_frames={num_frames} must be {self.time}·k + 1 for {self.name},"
                f" such as {below} or {below + self.time}"
            )
        frames = math.ceil(((num_frames - 1) // self.time + 1) / self.patch[0])
        rows, columns = height // self.space // self.patch[1], width // self.space // self.patch[2]
        return frames, rows, columns

    def linear_flops(self, tokens: int) -> float:
        """Floating-point operations of one layer besides self-attention, for one forward."""
        dim = self.heads * self.head_dim
        per_token = 8 * dim**2 + 4 * dim * self.ffn
        if self.cross_tokens:
            per_token += 4 * dim**2 + 4 * self.cross_tokens * dim
        return float(tokens) * per_token

    def attention_flops(self, tokens: int) -> float:
        """Floating-point operations of one layer's dense self-attention, for one forward."""
        return 4.0 * tokens**2 * self.heads * self.head_dim


_WAN = {"space": 8, "time": 4, "cross_tokens": 512, "family": "WanTransformer3DModel"}
_FLUX = {"text_tokens": 512, "text_before": True, "family": "FluxTransformer2DModel"}
_COG = {"text_tokens": 226, "text_before": True, "family": "CogVideoXTransformer3DModel"}

MODELS: tuple[ModelShape, ...] = (
    ModelShape("wan-1.3b", "video", 30, 12, 128, 8960, **_WAN),  # type: ignore[arg-type]
    ModelShape("wan-14b", "video", 40, 40, 128, 13824, **_WAN),  # type: ignore[arg-type]
    ModelShape("wan2.2-a14b", "video", 40, 40, 128, 13824, **_WAN, experts=True),  # type: ignore[arg-type]
    ModelShape("wan-5b", "video", 30, 24, 128, 14336, **(_WAN | {"space": 16})),  # type: ignore[arg-type]
    ModelShape(
        "hunyuan-video", "video", 60, 24, 128, 12288, 8, 4, text_tokens=256,
        family="HunyuanVideoTransformer3DModel",
    ),
    ModelShape("cogvideox-2b", "video", 30, 30, 64, 7680, 8, 4, **_COG),  # type: ignore[arg-type]
    ModelShape("cogvideox-5b", "video", 42, 48, 64, 12288, 8, 4, **_COG),  # type: ignore[arg-type]
    ModelShape(
        "mochi", "video", 48, 24, 128, 8192, 8, 6, text_tokens=256, family="MochiTransformer3DModel"
    ),
    ModelShape(
        "ltx-video", "video", 28, 32, 64, 8192, 32, 8, patch=(1, 1, 1), cross_tokens=128,
        family="LTXVideoTransformer3DModel",
    ),
    ModelShape("flux", "image", 57, 24, 128, 12288, 8, **_FLUX),  # type: ignore[arg-type]
    ModelShape(
        "sd3.5-large", "image", 38, 38, 64, 9728, 8, text_tokens=333,
        family="SD3Transformer2DModel",
    ),
    ModelShape(
        "qwen-image", "image", 60, 24, 128, 12288, 8, text_tokens=256, text_before=True,
        family="QwenImageTransformer2DModel",
    ),
)  # fmt: skip


def shape_of(model: str) -> ModelShape:
    """The shape of a built-in model by name.

    Raises:
        KeyError: there is no such row; the message lists them.
    """
    for row in MODELS:
        if row.name == model:
            return row
    names = [row.name for row in MODELS]
    close = difflib.get_close_matches(model, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise KeyError(f"no built-in shape {model!r}: {hint}known: {', '.join(names)}")


def shape_of_pipeline(pipe: Any, transformer: Any, modules: list[str], family: Any) -> ModelShape:
    """The shape of a loaded pipeline, read off its transformer and autoencoder.

    Args:
        pipe: the pipeline.
        transformer: the transformer that is planned for.
        modules: paths of its self-attention modules.
        family: its row in the table of families.
    """
    attention = transformer.get_submodule(modules[0])
    block = transformer.get_submodule(modules[0].rpartition(".")[0])
    config: Mapping[str, Any] = transformer.config
    heads: int = config.get("num_attention_heads") or attention.heads
    projection = getattr(attention, "to_q", None) or getattr(attention, "to_qkv", None)
    if projection is None:
        raise ValueError(f"the attention of {type(transformer).__name__} cannot be planned for")
    dim = projection.in_features
    widths = [
        m.out_features
        for name, m in block.named_modules()
        if name.startswith("ff") and hasattr(m, "out_features")
    ]
    space = getattr(pipe, "vae_scale_factor_spatial", 0) or getattr(pipe, "vae_scale_factor", 8)
    arguments = set(inspect.signature(transformer.forward).parameters)
    packed = bool({"img_ids", "img_shapes"} & arguments)
    return ModelShape(
        name=type(pipe).__name__,
        kind=family.kind,
        layers=len(modules),
        heads=heads,
        head_dim=dim // heads,
        ffn=max(widths, default=4 * dim),
        space=space,
        time=getattr(pipe, "vae_scale_factor_temporal", 0) or 1,
        patch=_patch(config, packed),
        cross_tokens=512 if hasattr(block, "attn2") else 0,
        text_tokens=max(
            (m.text_tokens for m in MODELS if m.family == family.transformer), default=0
        ),
        text_before=family.text == "before",
        family=family.transformer,
    )


def _patch(config: Mapping[str, Any], packed: bool) -> tuple[int, int, int]:
    """Latents per token; packed pipelines fold 2×2 latents before the transformer sees them."""
    size = config.get("patch_size") or 1
    t, h, w = (1, size, size) if isinstance(size, int) else (1, *size)[-3:]
    t = config.get("patch_size_t") or t
    return (t, 2 * h, 2 * w) if packed else (t, h, w)
