"""A method as one of diffusers' attention backends, by its own `set_attention_backend`.

    from diffpatch.adapters import diffusers_backend

    backend = diffusers_backend.register("diffpatch_radial", "radial", grid=TokenGrid(21, 30, 52))
    pipe.transformer.set_attention_backend("diffpatch_radial")
    ...
    backend.remove()

A backend sees tensors and nothing else: not the layer, the step or the size of the video. So the
grid is given here, calls that do not fit it (cross-attention, masks, other sizes) are dense, and
methods that need more are refused. Families that call torch themselves never ask a backend.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models import attention_dispatch

from diffpatch import functional, internals
from diffpatch.errors import BadParameter
from diffpatch.methods.base import Method, MethodLike, make_method
from diffpatch.patching import composition
from diffpatch.patterns.grid import TokenGrid


@dataclass(frozen=True)
class Backend:
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
        functional.made_pattern.cache_clear()  # patterns hold memory of the device
        member = names._value2member_map_.pop(self.name, None)
        if member is None:
            return
        names._member_map_.pop(self.name)
        names._member_names_.remove(self.name)
        for table in (registry._backends, registry._constraints, registry._supported_arg_names):
            table.pop(member, None)
        if registry._active_backend == member:
            registry.set_active_backend(names.NATIVE)  # diffusers makes a model's choice everyone's


def register(
    name: str, method: MethodLike = "radial", *, grid: TokenGrid, **params: Any
) -> Backend:
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
    made, names = make_method(method, **params), attention_dispatch.AttentionBackendName
    if name in names._value2member_map_ or name != name.lower() or not name:
        raise BadParameter(f"name={name!r} must be in lower case, and new to diffusers")
    places = itertools.product(composition.STEPS, composition.STEPS)
    varies = len({made.variant(*place) for place in places}) > 1
    if varies or made.needs_steps or made.learned_from():
        raise BadParameter(
            f"{made.name} differs between layers or steps, which a backend cannot tell: use"
            " diffpatch.patch, or parameters that do not"
        )
    member = str.__new__(names, name)
    member._name_, member._value_ = name, name
    names._member_map_[name] = names._value2member_map_[name] = member
    names._member_names_.append(name)
    _registry().register(member)(_attention(made, grid))
    return Backend(name, made, grid)


def _registry() -> Any:
    registry = getattr(attention_dispatch, internals.BACKENDS, None)
    if registry is None:
        raise internals.changed(f"{internals.BACKENDS} is gone")
    return registry


def _attention(method: Method, grid: TokenGrid) -> Callable[..., torch.Tensor]:
    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        fits = query.shape[1] == key.shape[1] == grid.num_tokens
        if fits and attn_mask is None and not dropout_p and not is_causal:
            return functional.attention(query, key, value, grid, method, scale=scale)
        return internals.dispatcher()(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
            backend=attention_dispatch.AttentionBackendName.NATIVE,
        )  # fmt: skip

    return attend
