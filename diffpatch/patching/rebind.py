"""The processor swap: diffusers' own processor code, with only its call to attention rebound.

The name of that call, ``dispatch_attention_fn`` (``F.scaled_dot_product_attention`` in older
processors), is looked up by processor code as a global of its module.

A rebound processor is a subclass of the original whose ``__call__`` runs the original's code object
over a copy of its module in which those two names are ours. The copy is a real, registered module,
because torch.compile resolves a function's globals through ``sys.modules``. Our attention then goes
through one opaque custom operator: to a compiler it is a black box, inside it plain Python runs.
"""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from diffpatch.errors import DiffpatchError
from diffpatch.internals import DISPATCH, PROCESSOR_BACKEND, SDPA, dispatcher
from diffpatch.patching import parallel
from diffpatch.pipelines.families.grids import Grid


class Owner(Protocol):
    """What a rebound processor reports to: one patched transformer."""

    handle: int
    active: bool  # False once the patch is undone
    grid: Grid

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        grid: Grid,
        layer: int,
        ranks: int,
    ) -> torch.Tensor:
        """Attention of one layer; all tensors (B, S, H, D), joined from that many processes."""
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
    num_frames: int,
    height: int,
    width: int,
    before: int,
    after: int,
    ranks: int,
    handle: int,
) -> torch.Tensor:
    owner = _OWNERS[handle]
    grid = (num_frames, height, width, before, after)
    return owner.attend(q, k, v, mask, scale, grid, int(layer), ranks).contiguous()


@_attend.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    layer: torch.Tensor,
    scale: float | None,
    num_frames: int,
    height: int,
    width: int,
    before: int,
    after: int,
    ranks: int,
    handle: int,
) -> torch.Tensor:
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


def _route(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    ranks: int = 1,
) -> torch.Tensor:
    """Send one self-attention call (B, S, H, D) to the owner of the running processor."""
    slot = _here()
    owner, layer = slot.owner, slot.layer
    assert owner is not None and layer is not None
    needs_grad = q.requires_grad or k.requires_grad or v.requires_grad
    if not torch.compiler.is_compiling() and torch.is_grad_enabled() and needs_grad:
        # Eager training: outside the operator autograd sees through the torch backend.
        return owner.attend(q, k, v, mask, scale, owner.grid, int(layer), ranks)
    return _attend(q, k, v, mask, layer, scale, *owner.grid, ranks, owner.handle)


def _dispatch_attention_fn(
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
    """Stands in for diffusers' dispatcher in rebound processors; (B, S, H, D)."""
    other = query.shape[1] != key.shape[1] or dropout_p or is_causal or attention_kwargs
    if not other and not isinstance(attn_mask, torch.Tensor | None):
        other = True
        if not torch.compiler.is_compiling():
            slot, what = _here(), type(attn_mask).__name__
            slot.owner.passed_by(query, f"the model's own {what}", int(slot.layer))
    if other:
        return dispatcher()(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
            attention_kwargs, backend=backend, **kwargs,
        )  # fmt: skip
    if (config := kwargs.get("parallel_config")) is not None:
        return parallel.spread(query, key, value, attn_mask, scale, config, _route)
    return _route(query, key, value, attn_mask, scale)


def _scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Stands in for torch's operator in rebound processors; (B, H, S, D)."""
    if query.shape[2] != key.shape[2] or dropout_p or is_causal:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return _route(q, k, v, attn_mask, scale).transpose(1, 2)


def _rebind_function(function: types.FunctionType, globals_: dict[str, Any]) -> Any:
    """The same code over other globals."""
    new = types.FunctionType(
        function.__code__, globals_, function.__name__, function.__defaults__, function.__closure__
    )
    new.__kwdefaults__ = function.__kwdefaults__
    return new


def _replacements(original: types.ModuleType, name: str) -> dict[str, Any]:
    """Ours for every global of a processor's module that stands for attention, however named."""
    functional = types.ModuleType(name + "._F")
    functional.__dict__.update({k: v for k, v in F.__dict__.items() if not k.startswith("__")})
    functional.__dict__[SDPA] = _scaled_dot_product_attention
    sys.modules[functional.__name__] = functional
    found: dict[str, Any] = {}
    for key, value in original.__dict__.items():
        if value is F:
            found[key] = functional
        elif value is dispatcher():
            found[key] = _dispatch_attention_fn
        elif value is F.scaled_dot_product_attention:
            found[key] = _scaled_dot_product_attention
    return found


def _calls_one(code: types.CodeType, replaced: dict[str, Any]) -> bool:
    """Whether the code uses one of the replacements and, of functional modules, attention."""
    steps = [step for inner in _codes(code) for step in dis.get_instructions(inner)]
    used = [replaced[s.argval] for s in steps if s.opname == "LOAD_GLOBAL" and s.argval in replaced]
    asks = any(step.argval == SDPA for step in steps)
    return any(asks or not isinstance(value, types.ModuleType) for value in used)


def _rebound_globals(call: types.FunctionType) -> dict[str, Any] | None:
    """The globals of a processor's code with our attention; None if it never reaches that."""
    original = sys.modules[call.__module__]
    name = f"diffpatch_rebound.{original.__name__}.{call.__qualname__}"
    module = types.ModuleType(name)
    private = ("__name__", "__loader__", "__spec__")
    module.__dict__.update({k: v for k, v in original.__dict__.items() if k not in private})
    replaced = _replacements(original, name)
    module.__dict__.update(replaced)
    for key, value in original.__dict__.items():  # helpers that call attention for the processor
        own = isinstance(value, types.FunctionType) and value.__module__ == original.__name__
        if own and _calls_one(value.__code__, replaced):
            module.__dict__[key] = replaced[key] = _rebind_function(value, module.__dict__)
    sys.modules[name] = module
    return module.__dict__ if _calls_one(call.__code__, replaced) else None


@functools.cache
def _rebound_class(cls: Any) -> Any:
    """A subclass of a processor class whose attention is ours."""
    original = inspect.unwrap(cls.__call__)
    globals_ = _rebound_globals(original)
    if globals_ is None:
        raise DiffpatchError(
            f"{cls.__name__}.__call__ calls neither {DISPATCH} nor F.{SDPA} by a global of its"
            " module: diffpatch does not know how it computes its attention"
        )
    call = _rebind_function(original, globals_)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        owner = self.__dict__.get("_diffpatch_owner")
        if owner is None or not owner.active:
            return original(self, *args, **kwargs)
        slot = _here()
        slot.owner, slot.layer = owner, self._diffpatch_layer
        try:
            return call(self, *args, **kwargs)
        finally:
            slot.owner = slot.layer = None  # keep no model alive

    # Attention modules drop keyword arguments that the signature of __call__ does not name.
    __call__.__wrapped__ = original  # type: ignore[attr-defined]
    members = {"__call__": __call__, "__reduce_ex__": _reduce, "_diffpatch_original": cls}
    return type("DiffPatch" + cls.__name__, (cls,), members)


def _codes(code: types.CodeType) -> list[types.CodeType]:
    """A code object and those nested in it."""
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return [code, *itertools.chain.from_iterable(map(_codes, inner))]


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
    return hasattr(type(processor), "_diffpatch_original") and not hasattr(
        processor, "_diffpatch_owner"
    )


def is_rebound(processor: Any, owner: Owner) -> bool:
    """Whether the processor sends its attention to this owner."""
    return getattr(processor, "__dict__", {}).get("_diffpatch_owner") is owner


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
    original = inspect.unwrap(type(processor)._diffpatch_original.__call__)
    gqa = q.shape[2] != k.shape[2]
    known = sys.modules[original.__module__].__dict__.values()
    if any(value is dispatcher() for value in known):
        return dispatcher()(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa,
            backend=getattr(processor, PROCESSOR_BACKEND, None),
        )  # fmt: skip
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=gqa)
    return out.transpose(1, 2)
