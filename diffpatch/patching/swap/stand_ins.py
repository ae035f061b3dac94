"""What stands in for the functions that processors call for attention: diffusers' and torch's.

A stand-in decides from its arguments whether a call is self-attention that the owner of the running
processor understands; all else goes on to the function that it stands for.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from diffpatch.internals import DISPATCH, SDPA
from diffpatch.patching.attention import parallel
from diffpatch.patching.attention.autocast import as_autocast
from diffpatch.patching.attention.layout import is_own_call
from diffpatch.patching.swap.operator import Owner, attend


class _Slot:
    """Where a rebound processor leaves its identity for the attention call it is about to make."""

    owner: Owner | None = None
    layer: torch.Tensor | None = None


class _LocalSlot(threading.local, _Slot):
    """One slot a thread, so that pipelines in different threads never meet."""


_EAGER = _LocalSlot()
# Under torch.compile the slot is written and read while one frame is traced, and what is read
# becomes an input of the graph; at run time nothing reads it. (Thread-local objects cannot be
# traced.)
_TRACED = _Slot()


def slot_here() -> _Slot:
    return _TRACED if torch.compiler.is_compiling() else _EAGER


def _running() -> tuple[Owner, torch.Tensor]:
    """The owner and the layer of the processor that is running."""
    slot = slot_here()
    assert slot.owner is not None and slot.layer is not None
    return slot.owner, slot.layer


def _route(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    ranks: int = 1,
) -> torch.Tensor:
    """Send one self-attention call (B, S, H, D) to the owner of the running processor."""
    owner, layer = _running()
    q, k, v, mask = as_autocast(q, k, v, mask)
    return attend(owner, q, k, v, mask, layer, scale, ranks)


def _dispatch(real: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    """What stands in for diffusers' dispatcher, or what others put in its place; (B, S, H, D)."""

    def dispatch_attention_fn(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        backend: Any = None,
        **kwargs: Any,  # parallel_config, from diffusers 0.36 on
    ) -> torch.Tensor:
        owner, layer = _running()
        own = is_own_call(owner.call_shape, query.shape[1], key.shape[1])
        config, left = kwargs.get("parallel_config"), ""
        if not isinstance(attn_mask, torch.Tensor | None):
            left = f"the model's own {type(attn_mask).__name__}"
        elif own and config is not None and owner.call_shape is not None:
            left = "text without queries is not cut over processes"
        left = left or _asked(dropout_p, is_causal, attention_kwargs)
        _tell(owner, layer, query, key, own, left)
        if left or not own:
            return real(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
                attention_kwargs, backend=backend, **kwargs,
            )  # fmt: skip
        if config is not None:
            dealing: Any = nullcontext()
            if not torch.compiler.is_compiling():
                dealing = owner.dealing(query, key, attn_mask, int(layer))
            return parallel.through_ulysses(
                query, key, value, attn_mask, scale, config, _route, dealing
            )
        return _route(query, key, value, attn_mask, scale)

    return dispatch_attention_fn


def _scaled_dot_product(real: Callable[..., Any] | None) -> Callable[..., torch.Tensor]:
    """What stands in for torch's operator or for one in its place; None is torch's, as it is now.

    Others put their own there whose arguments have other names (SageAttention's), so that they get
    what processors give them: three tensors, and by name what is not as usual.
    """

    def scaled_dot_product_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        owner, layer = _running()
        own = is_own_call(owner.call_shape, query.shape[2], key.shape[2])
        left = _asked(dropout_p, is_causal, kwargs)
        if left or not own:
            _tell(owner, layer, query.transpose(1, 2), key.transpose(1, 2), own, left)
            if dropout_p:
                kwargs["dropout_p"] = dropout_p
            if is_causal:
                kwargs["is_causal"] = is_causal
            function = F.scaled_dot_product_attention if real is None else real
            kwargs |= not_default(attn_mask, scale, enable_gqa)
            return function(query, key, value, **kwargs)
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        return _route(q, k, v, attn_mask, scale).transpose(1, 2)

    return scaled_dot_product_attention


def _asked(dropout: float, causal: bool, rest: Mapping[str, Any] | None) -> str:
    """What a call asks for that sparse attention does not know, in words; "" for nothing."""
    asked = ["dropout"] * bool(dropout) + ["a causal mask"] * causal + [*(rest or ())]
    return f"the model asks for {', '.join(asked)}" if asked else ""


def _tell(
    owner: Owner, layer: torch.Tensor, q: torch.Tensor, k: torch.Tensor, own: bool, left: str
) -> None:
    """Tell the owner of a call (B, S, H, D) that is not its own, or is left to others."""
    if torch.compiler.is_compiling():
        return
    if not own:
        owner.forwards.beside(q.shape[1], k.shape[1])
    elif left:
        owner.passed_by(q, left, int(layer))


def not_default(mask: torch.Tensor | None, scale: float | None, gqa: bool) -> dict[str, Any]:
    """Those arguments of torch's operator that differ from its defaults."""
    given: dict[str, Any] = {}
    if mask is not None:
        given["attn_mask"] = mask
    if scale is not None:
        given["scale"] = scale
    if gqa:
        given["enable_gqa"] = True
    return given


class _Functional(types.ModuleType):
    """`torch.nn.functional` as it is now, but for attention."""

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)


_FUNCTIONAL = _Functional("diffpatch_functional")
_FUNCTIONAL.__dict__[SDPA] = _scaled_dot_product(None)


def stand_in(name: str, value: Any) -> Any:
    """Ours for what a processor calls for attention, however imported and whoever replaced it."""
    if value is F:
        return _FUNCTIONAL
    if isinstance(value, type) or not callable(value):
        return None
    if is_dispatcher(name, value):
        return _dispatch(value)
    called = SDPA in (name, getattr(value, "__name__", None))
    return _scaled_dot_product(value) if called else None


def is_dispatcher(name: str, value: Any) -> bool:
    return DISPATCH in (name, getattr(value, "__name__", None))
