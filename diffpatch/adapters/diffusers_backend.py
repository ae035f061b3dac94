"""A method as one of diffusers' attention backends, by its own `set_attention_backend`.

    from diffpatch.adapters import diffusers_backend

    backend = diffusers_backend.register("diffpatch_radial", "radial", grid=TokenGrid(21, 30, 52))
    pipe.transformer.set_attention_backend("diffpatch_radial")    # this model
    ...
    with diffusers.attention_backend("diffpatch_radial"):         # or every model, for a while
        ...
    backend.remove()

cache-dit hands names that it does not know to diffusers, so its
``set_attn_backend(pipe, "diffpatch_radial")`` and ``enable_cache(…, attention_backend=…)`` do the
same. For caches alone, `diffpatch.patch` and ``cache_dit.enable_cache(pipe)`` combine in either
order.

A backend sees tensors and nothing else: not the layer, the step or the size of the video. So the
grid is given here, calls that do not fit it (cross-attention, masks, other sizes) get what
diffusers would have used, and methods that need more are refused.

Who it attends for: processors of a model that chose it, and everybody inside
``diffusers.attention_backend``. diffusers itself would make one model's choice everyone's, for
good; as long as a backend of ours is registered, choosing one of ours does not. Families that call
torch themselves, or do not pass their backend on, never ask one: choosing it for them is refused.

Tested with diffusers 0.37 to 0.42 and cache-dit 1.5.3; what it needs of the insides of diffusers is
checked, and named where it has changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models import attention_dispatch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.constants import DIFFUSERS_ATTN_BACKEND

from diffpatch import internals
from diffpatch.adapters.engine import CallPlace, EngineAttention, Told
from diffpatch.errors import BadParameter, DiffpatchError
from diffpatch.methods.base import Method
from diffpatch.methods.registry import MethodLike
from diffpatch.patterns.grid import TokenGrid

_MODEL: Any = ModelMixin
_MARK = "_diffpatch"  # on our `set_attention_backend`: itself and the one it wraps


@dataclass(frozen=True)
class GridBackend:
    """A registered backend.

    Attributes:
        name: what `set_attention_backend` and `attention_backend` call it.
        method: what it computes.
        grid: of the calls that it computes so.
    """

    name: str
    method: Method
    grid: TokenGrid

    def remove(self) -> None:
        """Take it out of diffusers; a second time does nothing.

        Call `reset_attention_backend()` on models that use it first: their processors keep it.
        """
        registry, names = _registry(), attention_dispatch.AttentionBackendName
        member = names._value2member_map_.pop(self.name, None)
        if member is None:
            return
        names._member_map_.pop(self.name)
        names._member_names_.remove(self.name)
        for table in internals.BACKEND_TABLES:
            getattr(registry, table).pop(member, None)
        if getattr(registry, internals.ACTIVE_BACKEND) == member:
            registry.set_active_backend(_default())
        if not any(isinstance(one, _Attend) for one in _functions().values()):
            _choose_for_all_again()


def register(
    name: str, method: MethodLike = "radial", *, grid: TokenGrid, **params: Any
) -> GridBackend:
    """Make a method one of diffusers' attention backends, until it is removed.

    Args:
        name: in lower case, and not one of diffusers' own.
        method: a name from `list_methods()` or a method object.
        grid: where the tokens of self-attention stand.
        **params: parameters of the method.

    Raises:
        BadParameter: the name is taken or not in lower case, or the method needs more than it
            sees there.
        DiffpatchError: diffusers keeps its backends elsewhere now.
    """
    internals.check_backends()
    names = attention_dispatch.AttentionBackendName
    if name in names._value2member_map_ or name != name.lower() or not name:
        raise BadParameter(f"name={name!r} must be in lower case, and new to diffusers")
    attend = _Attend(EngineAttention(method, Told(), **params), grid)
    member = str.__new__(names, name)
    member._name_, member._value_ = name, name
    names._member_map_[name] = names._value2member_map_[name] = member
    names._member_names_.append(name)
    _registry().register(member)(attend)
    _choose_for_one()
    return GridBackend(name, attend.engine.method, grid)


def _registry() -> Any:
    return getattr(attention_dispatch, internals.BACKENDS)


def _functions() -> dict[Any, Callable[..., Any]]:
    """The registered backends: member of `AttentionBackendName` -> what computes it."""
    functions: dict[Any, Callable[..., Any]] = getattr(_registry(), internals.BACKEND_TABLES[0])
    return functions


def _default() -> Any:
    """What diffusers starts with."""
    return attention_dispatch.AttentionBackendName(DIFFUSERS_ATTN_BACKEND)


def _active_is_ours() -> bool:
    active = getattr(_registry(), internals.ACTIVE_BACKEND)
    return isinstance(_functions().get(active), _Attend)


def _choose_for_one() -> None:
    """Let the choice of a backend of ours for one model be the choice of that model alone."""
    original = _MODEL.set_attention_backend
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def set_attention_backend(self: Any, backend: str) -> None:
        registry = _registry()
        before = getattr(registry, internals.ACTIVE_BACKEND)
        original(self, backend)
        chosen = attention_dispatch.AttentionBackendName(backend.lower())
        if not isinstance(_functions().get(chosen), _Attend):
            return
        registry.set_active_backend(before)
        processors = [getattr(module, "processor", None) for module in self.modules()]
        if not any(getattr(p, internals.PROCESSOR_BACKEND, None) == chosen for p in processors):
            raise DiffpatchError(
                f"no attention processor of {type(self).__name__} asks for a backend of its own:"
                f" use diffpatch.patch, or run it inside diffusers.attention_backend({backend!r})"
            )

    setattr(set_attention_backend, _MARK, (set_attention_backend, original))
    _MODEL.set_attention_backend = set_attention_backend


def _choose_for_all_again() -> None:
    """Undo `_choose_for_one`; where somebody has wrapped it since it stays, and changes nothing."""
    now = _MODEL.set_attention_backend
    ours, original = getattr(now, _MARK, (None, None))
    if ours is now:  # a wrapper of somebody else carries the mark of what it wraps
        _MODEL.set_attention_backend = original


class _Attend:
    """What diffusers calls: its signature says which arguments a backend takes."""

    def __init__(self, engine: EngineAttention, grid: TokenGrid) -> None:
        self.engine, self.grid = engine, grid

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        def dense() -> torch.Tensor:
            return internals.dispatcher()(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
                backend=_default() if _active_is_ours() else None,
            )  # fmt: skip

        if attn_mask is not None or dropout_p or is_causal:
            return dense()
        return self.engine.attend(query, key, value, self.grid, CallPlace(), dense, scale)
