"""Published settings of methods, by family; what `patch` takes where the caller says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A published setting of a method for a family: method parameters and dense schedule.

    Attributes:
        params: of the method.
        dense_steps: as in `patch`.
        dense_layers: as in `patch`.
        source: where it was published, and for what run.
        experts: the setting where two of these transformers share the steps (Wan 2.2 A14B, whose
            transformers look exactly like those of Wan 2.1).
    """

    params: Mapping[str, Any] = field(default_factory=dict)
    dense_steps: int | float | None = None
    dense_layers: int | float | None = None
    source: str = ""
    experts: Preset | None = None


def two_experts(pipe: Any) -> bool:
    """Whether a pipeline is one of two experts, of which either may be left out."""
    config = getattr(pipe, "config", None) or {}
    boundary = config.get("boundary_ratio") if isinstance(config, Mapping) else None
    return boundary is not None or getattr(pipe, "transformer_2", None) is not None


# Every published choice of tiles by content leaves its first steps and layers alone.
SOL = "Sol-Attn at 85 % left out: 20 % of the steps and the first layer dense"
FLUX = {"dynamic": Preset({}, None, 4, "PISA, FLUX.1-dev: the first 4 layers dense")}
# Windows are published in tokens of one grid; as fractions of it they fit every resolution.
WAN = {
    "radial": Preset(
        {"decay": 0.2},
        0.24,
        1,
        "Radial Attention, Wan 2.1 14B: 12 of 50 steps",
        experts=Preset({"decay": 0.8}, 0.275, 1, "Radial Attention, Wan 2.2 A14B: 11 of 40 steps"),
    ),
    "dynamic": Preset({}, 0.2, 1, SOL),
}
HUNYUAN = {
    "dynamic": Preset({}, 0.2, 1, SOL),
    "radial": Preset({"decay": 0.95}, 0.24, 0, "Radial Attention, 768p: 12 of 50 steps"),
    "neighborhood": Preset(
        {"window": (0.6, 0.5, 0.3)},
        0.3,
        0,
        "GNA: 18×24×24 of 30×48×80, 15 of 50 steps dense",
    ),
}
MOCHI = {"radial": Preset({"decay": 1.0}, 2, 2, "Radial Attention, made for its LoRA")}
COSMOS = {
    "neighborhood": Preset(
        {"window": (1.0, 0.73, 0.6)},
        0.34,
        0,
        "GNA: 16×32×48 of 16×44×80, 12 of 35 steps dense",
    )
}
