"""The one operator that attention goes through where a compiler or a dispatch mode looks on.

To them it is a black box, inside it plain Python runs.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from diffpatch.internals import is_traced
from diffpatch.patching.attention.autocast import without_autocast
from diffpatch.patching.attention.layout import Numbers
from diffpatch.patching.attention.parallel import Deal


class Calls(Protocol):
    """What counts the calls of a forward."""

    def beside(self, queries: int, keys: int) -> None:
        """A call over other tokens than self-attention has."""
        ...


class Owner(Protocol):
    """What a rebound processor reports to: one patched transformer."""

    handle: int
    active: bool  # False once the patch is undone

    @property
    def forwards(self) -> Calls:
        """Count its calls."""
        ...

    @property
    def grid(self) -> Numbers:
        """Of the forward that calls."""
        ...

    @property
    def call_shape(self) -> tuple[int, int] | None:
        """(queries, keys) of its calls, or `UNKNOWN`; None where they are as many."""
        ...

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        grid: Sequence[int],
        layer: int,
        ranks: int,
    ) -> torch.Tensor:
        """Attention of one layer; all tensors (B, S, H, D), joined from that many processes."""
        ...

    def dealing(
        self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, layer: int
    ) -> AbstractContextManager[Deal | None]:
        """For the time of one call, the order in which its heads are shared out to processes."""
        ...

    def passed_by(self, q: torch.Tensor, reason: str, layer: int) -> None:
        """One layer's self-attention was left to diffusers, whole."""
        ...


# An operator can only carry an integer, so owners are looked up by one; entries die with them.
_OWNERS: weakref.WeakValueDictionary[int, Owner] = weakref.WeakValueDictionary()
_HANDLES = itertools.count()


def new_handle(owner: Owner) -> int:
    """Make an owner reachable from the operator."""
    handle = next(_HANDLES)
    _OWNERS[handle] = owner
    return handle


# A CUDA graph would replay the kernels of one step and layer for all: the code that chooses them
# runs on the host.
_HOST = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()


@torch.library.custom_op("diffpatch::attend", mutates_args=(), tags=_HOST)
def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    layer: torch.Tensor,  # 0-d on the CPU: an int would make torch.compile specialize on each layer
    scale: float | None,
    grid: Sequence[int],
    ranks: int,
    handle: int,
) -> torch.Tensor:
    owner = _OWNERS[handle]
    with without_autocast(q):
        return owner.attend(q, k, v, mask, scale, grid, int(layer), ranks).contiguous()


@_attend.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def attend(
    owner: Owner,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    layer: torch.Tensor,
    scale: float | None,
    ranks: int,
) -> torch.Tensor:
    """Let an owner compute one call (B, S, H, D), so that autograd or a compiler can follow."""
    needs_grad = q.requires_grad or k.requires_grad or v.requires_grad
    trains = torch.is_grad_enabled() and needs_grad
    if not torch.compiler.is_compiling() and (trains or not is_traced(q)):
        # Without the operator, which costs as much as all the rest of a patch; and autograd sees
        # through the torch backend.
        with without_autocast(q):
            return owner.attend(q, k, v, mask, scale, owner.grid, int(layer), ranks)
    return _attend(q, k, v, mask, layer, scale, owner.grid, ranks, owner.handle)
