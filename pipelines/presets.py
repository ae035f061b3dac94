"""Published settings of methods, by family; what `patch` takes where the caller says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A published setting of a method for a family: method parameters and dense schedule."""

    params: Mapping[str, Any] = field(default_factory=dict)
    dense_steps: int | float | None = None
    dense_layers: int | float | None = None
    source: str = ""


# Windows are published in tokens of one grid; as fractions of it they fit every resolution.
WAN = {"radial": Preset({"decay": 0.2}, 0.24, 1, "Radial Attention, Wan 2.1 14B: 12 of 50 steps")}
HUNYUAN = {
    "radial": Preset({"decay": 0.95}, 0.24, 0, "Radial Attention, 768p: 12 of 50 steps"),
    "neighborhood": Preset(
        {"window": (0.6, 0.5, 0.3)}, 0.3, 0, "GNA: 18×24×24 of 30×48×80, 15 of 50 steps dense"
    ),
}
MOCHI = {"radial": Preset({"decay": 1.0}, 2, 2, "Radial Attention, made for its LoRA")}
COSMOS = {
    "neighborhood": Preset(
        {"window": (1.0, 0.73, 0.6)}, 0.34, 0, "GNA: 16×32×48 of 16×44×80, 12 of 35 steps dense"
    )
}
