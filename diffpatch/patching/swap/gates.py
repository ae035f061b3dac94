"""Learned gates on attention: what they are of is the input of the attention module.

A call to attention shows queries, keys and values. Checkpoints trained with VSA also hold a
projection of the module's own input, so the modules that have one are listened to.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from diffpatch.methods.dynamic import trained
from diffpatch.methods.learned.checkpoint import VSA
from diffpatch.methods.learned.files import Learned

UNTOLD = "the input of compiled layers, of which their gate is made, is not known"


class Gates:
    """The inputs of attention modules, from the moment they are called until they attend.

    Args:
        learned: what each layer learned.
    """

    def __init__(self, learned: Sequence[Mapping[str, torch.Tensor]]) -> None:
        self._gated = {i for i, one in enumerate(learned) if f"{VSA}.weight" in one}
        self._here = threading.local()

    def listen(self, modules: Sequence[Any]) -> list[Any]:
        """Hooks on the modules that have a gate."""
        return [
            modules[i].register_forward_pre_hook(functools.partial(self._note, i), with_kwargs=True)
            for i in sorted(self._gated)
        ]

    def _note(self, layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self._here.input = layer, args[0] if args else kwargs["hidden_states"]

    def take(self, layer: int) -> torch.Tensor | None:
        """The input that the layer was called with last; it is let go."""
        noted, self._here.input = getattr(self._here, "input", None), None
        return noted[1] if noted is not None and noted[0] == layer else None

    def missing(self, layer: int, q: torch.Tensor, noted: torch.Tensor | None) -> str | None:
        """Why the gate of a call with queries (B, S, H, D) cannot be computed, or None."""
        if layer not in self._gated:
            return None
        if noted is None:
            return UNTOLD
        same = noted.shape[:2] == q.shape[:2]
        return None if same else "a gate is of other tokens than attention is"

    def gate(
        self, learned: Mapping[str, torch.Tensor], noted: torch.Tensor | None, q: torch.Tensor
    ) -> Mapping[str, torch.Tensor]:
        """What a layer learned, with the gate (B, S, H, D) of the call at hand."""
        if noted is None:
            return learned
        gate = trained.linear(noted.to(q.dtype), learned, VSA)
        return {**learned, "gate": gate.unflatten(-1, (q.shape[2], -1))}


def on_device(learned: Learned, device: torch.device) -> Learned:
    """What a layer learned, moved to the device that its calls run on."""
    if all(x.device == device for x in learned.values()):
        return learned
    with torch.inference_mode(False):  # a training step may use them next
        return {name: x.to(device) for name, x in learned.items()}
