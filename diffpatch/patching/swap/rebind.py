"""The processor swap: diffusers' own processor code, with only its call to attention rebound.

The name of that call, ``dispatch_attention_fn`` (``F.scaled_dot_product_attention`` in older
processors), is looked up by processor code as a global of its module.

A rebound processor is of a subclass of the original class, whose ``__call__`` runs the original's
as it is at that moment, with those two names ours (see `diffpatch.patching.swap.follow`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from diffpatch.errors import DiffpatchError
from diffpatch.internals import PROCESSOR_BACKEND, same_in_registries
from diffpatch.patching.swap.follow import Code
from diffpatch.patching.swap.operator import Owner
from diffpatch.patching.swap.stand_ins import is_dispatcher, not_default, slot_here, stand_in


def _is_active(processor: Any) -> bool:
    owner = processor.__dict__.get("_diffpatch_owner")
    return owner is not None and owner.active


def _link(cls: Any) -> Any:
    """A subclass that super() of a stand-in's class finds before `cls`; None where none need be."""
    try:
        code = Code(cls, stand_in)
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
    code = Code(cls, stand_in, [link._diffpatch_code for link in links])

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_active(self):
            return cls.__call__(self, *args, **kwargs)
        call, slot = code.here(), slot_here()
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
    if is_dispatcher(name, function):
        return function(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa,
            backend=getattr(processor, PROCESSOR_BACKEND, None),
        )  # fmt: skip
    function = F.scaled_dot_product_attention if function is F else function
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return function(q, k, v, **not_default(mask, scale, gqa)).transpose(1, 2)
