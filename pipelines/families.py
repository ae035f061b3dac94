"""What diffpatch knows about each diffusers transformer: one row a family.

A row says which modules are the self-attention over visual tokens, how the token grid follows from
the arguments of the forward, and where the visual tokens start. Nothing else differs between
families; everything behind these rows is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# (model, forward arguments by name) -> (num_frames, height, width, first visual token)
GridFunction = Callable[[Any, Mapping[str, Any]], tuple[int, int, int, int]]


@dataclass(frozen=True)
class Preset:
    """A published setting of a method for a family: method parameters and dense schedule."""

    params: Mapping[str, Any] = field(default_factory=dict)
    dense_steps: int | float | None = None
    dense_layers: int | float | None = None
    source: str = ""


@dataclass(frozen=True)
class FamilyInfo:
    """One row.

    Attributes:
        name: what people call it.
        transformer: diffusers' class name.
        kind: "video" or "image".
        modules: regular expression that full-matches the paths of its self-attention modules.
        grid: reads the token grid from the arguments of the transformer's forward.
        text: where always-visible tokens stand: "none", "before" or "after".
        presets: method name -> published setting.
        note: limits worth knowing.
    """

    name: str
    transformer: str
    kind: str
    modules: str
    grid: GridFunction
    text: str = "none"
    presets: Mapping[str, Preset] = field(default_factory=dict)
    note: str = ""


def _latent_video(model: Any, args: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Latents (B, C, F, H, W) cut by ``config.patch_size``; no text in the sequence."""
    frames, height, width = args["hidden_states"].shape[2:]
    t, h, w = model.config.patch_size
    return frames // t, height // h, width // w, 0


def _image_ids(model: Any, args: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Text in front, then packed image tokens whose ``img_ids`` (S, 3) are (image, row, column).

    Reference images (Kontext) have another first column and stand behind: always-visible tokens.
    """
    ids = args["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    last = (ids * (ids[:, :1] == ids[:1, :1])).amax(0)  # rows of reference images count as 0
    text = args["encoder_hidden_states"].shape[1]
    return 1, int(last[1]) + 1, int(last[2]) + 1, text


_WAN_RADIAL = Preset({"decay": 0.2}, 0.24, 1, "Radial Attention, Wan2.1-14B: 12 of 50 steps")

FAMILIES: tuple[FamilyInfo, ...] = (
    FamilyInfo(
        "Wan 2.1 / 2.2",
        "WanTransformer3DModel",
        "video",
        r"blocks\.\d+\.attn1",
        _latent_video,
        presets={"radial": _WAN_RADIAL},
        note="T2V, I2V, TI2V; both experts of 2.2",
    ),
    FamilyInfo(
        "Flux.1",
        "FluxTransformer2DModel",
        "image",
        r"(single_)?transformer_blocks\.\d+\.attn",
        _image_ids,
        text="before",
        note="dev, schnell, Kontext (reference tokens stay always visible), Fill, Control",
    ),
)


def families() -> list[FamilyInfo]:
    """All families, in the order of the table."""
    return list(FAMILIES)


def family_of(model: Any) -> FamilyInfo | None:
    """The family of a transformer, or None."""
    names = {cls.__name__ for cls in type(model).__mro__}
    return next((f for f in FAMILIES if f.transformer in names), None)
