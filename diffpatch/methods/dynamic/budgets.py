"""How much each head keeps, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffpatch.errors import BadParameter

Budgets = tuple[tuple[int, tuple[float, ...]], ...]


def read(given: Any) -> Budgets | None:
    """Budgets as they are kept: ((layer, (kept of each head, ...)), ...), in order."""
    if given is None:
        return None
    pairs = given.items() if isinstance(given, Mapping) else given
    try:
        found = tuple(sorted((int(n), tuple(float(x) for x in heads)) for n, heads in pairs))
    except (TypeError, ValueError):
        raise BadParameter(f"dynamic: budgets={given!r} must be {{layer: (kept, ...)}}") from None
    wrong = [x for _, heads in found for x in heads if not 0 < x <= 1]
    if wrong or not found:
        raise BadParameter(f"dynamic: budgets={wrong or given!r} must be in (0, 1]")
    return found
