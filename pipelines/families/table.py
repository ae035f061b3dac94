"""What diffpatch knows about each diffusers transformer: one row a family.

A row says which modules are the self-attention over visual tokens, how the token grid follows from
the arguments of the forward, and where the visual tokens start. Nothing else differs between
families; everything behind these rows is shared. Classes are known by name, so that rows of models
that the installed diffusers lacks cost nothing.
"""

from __future__ import annotations

import re
from typing import Any

from diffpatch.pipelines.families.image import IMAGE_FAMILIES
from diffpatch.pipelines.families.info import FamilyInfo
from diffpatch.pipelines.families.refused import REFUSED
from diffpatch.pipelines.families.video import VIDEO_FAMILIES

__all__ = ["FAMILIES", "FamilyInfo", "attention_modules", "family_of", "list_families"]

FAMILIES: tuple[FamilyInfo, ...] = VIDEO_FAMILIES + IMAGE_FAMILIES + REFUSED


def list_families() -> list[FamilyInfo]:
    """All families, in the order of the table, with those that are refused and the reason why."""
    return list(FAMILIES)


def family_of(model: Any) -> FamilyInfo | None:
    """The family of a transformer, or None."""
    names = {cls.__name__ for cls in type(model).__mro__}
    return next((f for f in FAMILIES if f.transformer in names), None)


def attention_modules(model: Any, family: FamilyInfo) -> list[tuple[str, Any]]:
    """(path, module) of the self-attention over visual tokens, in the order of the model."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if re.fullmatch(family.modules, path) and hasattr(module, "processor")
    ]
