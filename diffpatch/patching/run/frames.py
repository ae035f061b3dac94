"""Whether the frames of a forward are those of the forward before: not if a window moved on.

With diffusion forcing (SkyReels-V2) every frame has a timestep of its own, and pipelines that make
long videos slide a window over their frames within a run. What was remembered about a place in the
window is then about another frame. The window itself is nowhere told, but a frame's timestep only
ever falls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class FrameClock:
    """Follows the timesteps of the frames of one transformer from forward to forward."""

    def __init__(self) -> None:
        self._before: torch.Tensor | None = None

    def moved(self, arguments: Mapping[str, Any]) -> bool:
        """Whether there are other frames than in the call before, by the arguments of a forward.

        They are the same if no timestep rose and at least one fell. Reads numbers of the device,
        which waits for it, but only where frames have timesteps of their own.
        """
        times = arguments.get("timestep")
        if not arguments.get("enable_diffusion_forcing") or not isinstance(times, torch.Tensor):
            return False
        if times.ndim != 2:
            return False
        before, self._before = self._before, times.detach().cpu()
        if before is None or before.shape != self._before.shape:
            return before is not None
        fell = self._before < before
        return not (bool(fell.any()) and bool((fell | (self._before == before)).all()))
