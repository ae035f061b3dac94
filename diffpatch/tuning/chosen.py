"""Which tiles a method that chooses by content computes exactly: seen in a run, for pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from diffpatch.patching.api import named_owners

if TYPE_CHECKING:
    from diffpatch.patching.patch import SparseCall


@dataclass(eq=False)
class ChosenTiles:
    """What the middle layer chose.

    Attributes:
        map: fp32 (N, n) [query tile, strip of keys], the part of the heads that computes a pair
            exactly, in the last step so far; None where nothing was chosen by content.
    """

    map: torch.Tensor | None = None


@contextlib.contextmanager
def chosen_tiles(target: Any) -> Iterator[ChosenTiles]:
    """Watch what the runs in the block choose; a target without a patch chooses nothing. Outputs
    stay the same."""
    found = named_owners(target).values()
    middle = next((len(owner.modules) // 2 for owner in found), 0)
    seen = ChosenTiles()

    def observe(call: SparseCall) -> None:
        if call.place[1] != middle:
            return
        chosen = call.method.selection_of(call.pattern, call.state)
        if chosen is not None:
            seen.map = chosen[0].float().mean((0, 1)).cpu()

    with contextlib.ExitStack() as stack:
        for patch in dict.fromkeys(owner.patch for owner in found):
            stack.enter_context(patch.observed(observe))
        yield seen
