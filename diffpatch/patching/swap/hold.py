"""Steps in which a transformer's result would hardly change: its last one is given again.

Which steps these are is said in `diffpatch.patching.run.path`. Unlike a step cache
(`diffpatch.patching.swap.cache`), this makes no block of the transformer in a step that it holds,
and it looks at the results, which guide the picture, in place of the first block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from diffpatch.errors import DiffpatchError
from diffpatch.patching.attention import parallel
from diffpatch.patching.forwards import Forward, Forwards
from diffpatch.patching.patch import Patch
from diffpatch.patching.run.path import Path, copied
from diffpatch.patching.swap.guide import RECORD
from diffpatch.patching.swap.in_place import InPlaceOfForward

_NO_TIMES = "its scheduler runs the model twice a step, or its timesteps do not fall towards 0"
_GRADIENTS = "gradients are recorded: call the transformer under torch.no_grad()"
MEANING = "0.005: how far a held result may lead astray before the transformer is run again"


class Hold(InPlaceOfForward):
    """Stands in for the forward of one transformer, and leaves some out.

    Args:
        patch: says how far the path may be led astray at a time, as a fraction of the result.
        forwards: tells which forward it is.
        arguments: names of the forward's arguments, in order.
        name: of the transformer in the patch.
        model: the transformer.
    """

    def __init__(
        self, patch: Patch, forwards: Forwards, arguments: Sequence[str], name: str, model: Any
    ) -> None:
        super().__init__(model)
        self._on: tuple[Patch, Forwards] | None = patch, forwards
        self._arguments, self._name = arguments, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or self._on is None:
            return self.original(*args, **kwargs)
        patch, forwards = self._on
        forward = forwards.current
        path = None if forward is None else self._path(forward, patch)
        if forward is None or path is None:
            return self.original(*args, **kwargs)
        place, named = forward.place, dict(zip(self._arguments, args, strict=False))
        held, given = path.results.get(place.branch), path.given(place.branch, named | kwargs)
        if place.first:
            path.begin_step(place.step, place.branch, given, patch.hold or 0.0)
        if path.holding and held is not None and held[0].fits(given):
            place.run.record.hold(place.run.place(place.step))
            return copied(held[1])
        result = self.original(*args, **kwargs)
        path.made(place.step, place.branch, given, result, first=place.first)
        return result

    def _path(self, forward: Forward, patch: Patch) -> Path | None:
        """How far the forward's run is; None where nothing tells."""
        place = forward.place
        if (
            not forward.hooked
            or forward.guide == RECORD
            or place.tracker is None
            or place.total is None
        ):
            return None
        if torch.is_grad_enabled():
            patch.holds_none(place.run, _GRADIENTS)
            return None
        paths = place.run.paths
        known = paths.get(self._name)
        # A loop that skips the first timesteps shows it with its first step.
        if known is None or len(known.times) != place.total + 1:
            times = place.tracker.times()
            if times is None:
                patch.holds_none(place.run, _NO_TIMES)
                return None
            _check_processes(self._model())
            paths[self._name] = Path(times)
        return paths[self._name]

    def remove(self) -> None:
        """Give the model its own forward back, and let go of the patch."""
        self._on = None
        super().remove()


def _check_processes(model: Any) -> None:
    """Refuse a model that is cut over processes, which would wait for each other.

    Raises:
        DiffpatchError: it is.
    """
    from torch import distributed

    cut = parallel.context(model) is not None
    if not cut and distributed.is_available() and distributed.is_initialized():
        from torch.distributed.tensor import DTensor

        cut = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    if cut:
        raise DiffpatchError(
            f"hold: {type(model).__name__} is cut over several processes, which might not hold the"
            " same steps and would wait for each other for ever: leave hold out"
        )
