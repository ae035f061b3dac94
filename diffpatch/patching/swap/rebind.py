"""The processor swap: diffusers' own processor code, with only its call to attention rebound.

The name of that call, ``dispatch_attention_fn`` (``F.scaled_dot_product_attention`` in older
processors), is looked up by processor code as a global of its module.

A rebound processor is of a subclass of the original class, whose ``__call__`` runs the original's
as it is at that moment, with those two names ours (see `diffpatch.patching.swap.follow`).
Where a compiler or a dispatch mode looks on, our attention goes through one opaque custom operator:
to them it is a black box, inside it plain Python runs.
"""

from __future__ import annotations

import functools
import itertools
import threading
import types
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from diffpatch.errors import DiffpatchError
from diffpatch.internals import (
    DISPATCH,
    PROCESSOR_BACKEND,
    SDPA,
    is_traced,
    same_in_registries,
)
from diffpatch.patching.attention import parallel
from diffpatch.patching.attention.autocast import as_autocast, without_autocast
from diffpatch.patching.attention.layout import Numbers, is_own_call
from diffpatch.patching.swap.follow import Code


class Owner(Protocol):
    """What a rebound processor reports to: one patched transformer."""

    handle: int
    active: bool  # False once the patch is undone

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
    ) -> AbstractContextManager[parallel.Deal | None]:
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


def _here() -> _Slot:
    return _TRACED if torch.compiler.is_compiling() else _EAGER


def _running() -> tuple[Owner, torch.Tensor]:
    """The owner and the layer of the processor that is running."""
    slot = _here()
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
    needs_grad = q.requires_grad or k.requires_grad or v.requires_grad
    trains = torch.is_grad_enabled() and needs_grad
    if not torch.compiler.is_compiling() and (trains or not is_traced(q)):
        # Without the operator, which costs as much as all the rest of a patch; and autograd sees
        # through the torch backend.
        with without_autocast(q):
            return owner.attend(q, k, v, mask, scale, owner.grid, int(layer), ranks)
    return _attend(q, k, v, mask, layer, scale, owner.grid, ranks, owner.handle)


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
        other = dropout_p or is_causal or attention_kwargs
        other = other or not is_own_call(owner.call_shape, query.shape[1], key.shape[1])
        config, left = kwargs.get("parallel_config"), ""
        if not isinstance(attn_mask, torch.Tensor | None):
            left = f"the model's own {type(attn_mask).__name__}"
        elif not other and config is not None and owner.call_shape is not None:
            left = "text without queries is not cut over processes"
        if left and not torch.compiler.is_compiling():
            owner.passed_by(query, left, int(layer))
        if other or left:
            return real(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
                attention_kwargs, backend=backend, **kwargs,
            )  # fmt: skip
        if config is not None:
            dealing: Any = nullcontext()
            if not torch.compiler.is_compiling():
                dealing = owner.dealing(query, key, attn_mask, int(layer))
            return parallel.spread(query, key, value, attn_mask, scale, config, _route, dealing)
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
        own = is_own_call(_running()[0].call_shape, query.shape[2], key.shape[2])
        if not own or dropout_p or is_causal or kwargs:
            if dropout_p:
                kwargs["dropout_p"] = dropout_p
            if is_causal:
                kwargs["is_causal"] = is_causal
            function = F.scaled_dot_product_attention if real is None else real
            kwargs |= _set(attn_mask, scale, enable_gqa)
            return function(query, key, value, **kwargs)
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        return _route(q, k, v, attn_mask, scale).transpose(1, 2)

    return scaled_dot_product_attention


def _set(mask: torch.Tensor | None, scale: float | None, gqa: bool) -> dict[str, Any]:
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


def _stand_in(name: str, value: Any) -> Any:
    """Ours for what a processor calls for attention, however imported and whoever replaced it."""
    if value is F:
        return _FUNCTIONAL
    if isinstance(value, type) or not callable(value):
        return None
    if _is_dispatcher(name, value):
        return _dispatch(value)
    called = SDPA in (name, getattr(value, "__name__", None))
    return _scaled_dot_product(value) if called else None


def _is_dispatcher(name: str, value: Any) -> bool:
    return DISPATCH in (name, getattr(value, "__name__", None))


def _is_active(processor: Any) -> bool:
    owner = processor.__dict__.get("_diffpatch_owner")
    return owner is not None and owner.active


def _link(cls: Any) -> Any:
    """A subclass that super() of a stand-in's class finds before `cls`; None where none need be."""
    try:
        code = Code(cls, _stand_in)
    except DiffpatchError:
        return None

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = code.here() if _is_active(self) else cls.__call__
        return call(self, *args, **kwargs)

    code.wrap(__call__)
    return type(cls)(cls.__name__, (cls,), {"__call__": __call__, "_diffpatch_code": code})


@functools.cache
def _rebound_class(cls: Any) -> Any:
    """A subclass of a processor class whose attention is ours."""
    above = [_link(base) for base in cls.__mro__[1:] if "__call__" in vars(base)]
    links = [link for link in above if link is not None]
    code = Code(cls, _stand_in, [link._diffpatch_code for link in links])

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_active(self):
            return cls.__call__(self, *args, **kwargs)
        call, slot = code.here(), _here()
        slot.owner, slot.layer = self._diffpatch_owner, self._diffpatch_layer
        try:
            return call(self, *args, **kwargs)
        finally:
            slot.owner = slot.layer = None  # keep no model alive

    members = {
        "__call__": __call__,
        "__reduce_ex__": _reduce,
        "_diffpatch_original": cls,
        "_diffpatch_code": code,
    }
    code.wrap(__call__)
    return type(cls)("DiffPatch" + cls.__name__, (cls, *links), members)


def _reduce(self: Any, protocol: Any = 2) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    # Pickles and deep copies come back as the original, unpatched processor.
    state = {k: v for k, v in self.__dict__.items() if not k.startswith("_diffpatch")}
    return _restore, (type(self)._diffpatch_original, state)


def _restore(cls: Any, state: dict[str, Any]) -> Any:
    processor = cls.__new__(cls)
    processor.__dict__.update(state)
    return processor


def rebind(processor: Any, owner: Owner, layer: int) -> Any:
    """A processor that behaves like the given one but sends self-attention to `owner`.

    It shares the original's attributes, so that parameters of processors stay the same objects.

    Raises:
        DiffpatchError: the processor computes attention in a way that cannot be rebound.
    """
    if hasattr(type(processor), "_diffpatch_original"):  # by another patch, now gone
        processor = hand_back(processor)
    original: Any = type(processor)
    cls = _rebound_class(original)
    same_in_registries(cls, original)
    new = cls.__new__(cls)
    new.__dict__.update(processor.__dict__)
    new.__dict__["_diffpatch_owner"] = owner
    new.__dict__["_diffpatch_layer"] = torch.tensor(layer, device="cpu")
    new.__dict__["_diffpatch_source"] = processor
    return new


def hand_back(processor: Any) -> Any:
    """What was rebound, with what was set on its stand-in meanwhile (a backend, a scale)."""
    cls = type(processor)._diffpatch_original
    source = processor.__dict__.get("_diffpatch_source", None) or cls.__new__(cls)
    changed = {k: v for k, v in processor.__dict__.items() if not k.startswith("_diffpatch")}
    source.__dict__.update(changed)
    return source


def is_stray(processor: Any) -> bool:
    """Whether diffusers made the processor from a rebound class alone, as its IP-Adapters do."""
    made = hasattr(type(processor), "_diffpatch_original")
    return made and not hasattr(processor, "_diffpatch_owner")


def is_rebound(processor: Any, owner: Owner) -> bool:
    """Whether the processor sends its attention to this owner."""
    return getattr(processor, "__dict__", {}).get("_diffpatch_owner") is owner


def keep_up(processor: Any) -> None:
    """Follow what others have changed in the code of a rebound processor.

    To be called before a forward, so that modules that look at the signature see the right one.
    """
    type(processor)._diffpatch_code.here()


def dense(
    processor: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """What the unpatched processor would have computed; (B, S, H, D).

    Processors that use diffusers' dispatcher keep the attention backend the user chose.
    """
    code: Code = type(processor)._diffpatch_code
    gqa = q.shape[2] != k.shape[2]
    name, function = code.attention
    if _is_dispatcher(name, function):
        return function(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa,
            backend=getattr(processor, PROCESSOR_BACKEND, None),
        )  # fmt: skip
    function = F.scaled_dot_product_attention if function is F else function
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return function(q, k, v, **_set(mask, scale, gqa)).transpose(1, 2)
