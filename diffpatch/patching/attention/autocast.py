"""Mixed precision as the caller has switched it on, for attention that torch does not know."""

from __future__ import annotations

import contextlib
import functools

import torch


def as_autocast(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What torch's own attention would get of these: floats in autocast's dtype, but for fp64."""
    kind = q.device.type
    if not _is_on(kind):
        return q, k, v, mask
    dtype = torch.get_autocast_dtype(kind)

    def cast(x: torch.Tensor) -> torch.Tensor:
        return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x

    return cast(q), cast(k), cast(v), None if mask is None else cast(mask)


def without_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """For what has its dtypes already: sums in fp32 are not to be cast inside."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if _is_on(kind) else contextlib.nullcontext()


def _is_on(kind: str) -> bool:
    return _has_autocast(kind) and torch.is_autocast_enabled(kind)


_has_autocast = functools.cache(torch.amp.is_autocast_available)  # asked four times a call
