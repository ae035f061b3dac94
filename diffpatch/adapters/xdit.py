"""xDiT: a method in the place of one of its attention backends.

xDiT keeps a function for each of its backends, and `register_attention_function` replaces one. Run
this in the script that starts xDiT, in every process, before its model is made::

    from diffpatch.adapters import xdit

    replaced = xdit.register("radial")          # what "sdpa_efficient" computes from now on
    ...                                         # xDiT, with attention_backend="sdpa_efficient"
    replaced.remove()

The first and last steps can stay dense by xDiT's own schedule: ``--use_hybrid_attn_schedule`` with
``sdpa_efficient`` as the low-precision backend and the one of your choice as the other.

xDiT tells a backend the grid of Wan and HunyuanVideo 1.5 (``attention_kwargs["thw"]``) and nothing
else: neither layer nor step, so that methods that depend on these are refused. Calls that do not
fit (cross-attention, masks, text beside the video) are computed by torch, dense; padding for
Ulysses, at the end of the video, is seen as xDiT's own attention sees it. Ulysses works for methods
whose pattern is the same for all heads; under ring attention, where no call sees all keys, calls
are refused.

Written for xDiT 0.7 (the package xfuser) and tested, on a CPU, with its own registry and the
function that calls what is in it; xDiT itself starts on accelerators alone. Another version is
checked for what is needed of it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from diffpatch.adapters.engine import CallPlace, EngineAttention, Told
from diffpatch.errors import DiffpatchError
from diffpatch.methods.base import Method
from diffpatch.methods.registry import MethodLike
from diffpatch.patterns.grid import TokenGrid

_BACKENDS = "xfuser.core.distributed.attention_backend"
_STATE = "xfuser.core.distributed.parallel_state"
_NAMES = ("AttentionBackendType", "ATTENTION_FUNCTION_REGISTRY", "register_attention_function")
_MASKS = ("attn_mask", "indices_k")  # under which names xDiT hands masks to its backends


@dataclass(frozen=True)
class Replaced:
    """A backend of xDiT with a method in its place.

    Attributes:
        member: its name in xDiT.
        method: what it computes now.
        original: what it computed.
    """

    member: str
    method: Method
    original: Callable[..., Any]

    def remove(self) -> None:
        """Put the original back; a second time does nothing."""
        backends = _module()
        backends.register_attention_function(backends.AttentionBackendType[self.member])(
            self.original
        )


def register(
    method: MethodLike = "radial", *, member: str = "SDPA_EFFICIENT", **params: Any
) -> Replaced:
    """Put a method in the place of one of xDiT's backends, until it is removed.

    Args:
        method: a name from `list_methods()` or a method object.
        member: the backend to replace, one that needs no package of its own.
        **params: parameters of the method.

    Raises:
        BadParameter: the method needs more than xDiT tells.
        DiffpatchError: xDiT is not there, or another than expected.
    """
    engine, backends = EngineAttention(method, Told(), **params), _module()
    kinds, functions = backends.AttentionBackendType, backends.ATTENTION_FUNCTION_REGISTRY
    if member not in kinds.__members__ or kinds[member] not in functions:
        raise _changed(f"backend {member}")
    original, dense = functions[kinds[member]], functions[kinds["SDPA"]]
    names = list(inspect.signature(dense).parameters)
    if names != ["query", "key", "value", "dropout_p", "is_causal", "attention_kwargs"]:
        raise _changed("backend with the arguments query, key, value, dropout_p, is_causal and"
                       " attention_kwargs")  # fmt: skip
    attend = _attention(engine, dense)
    backends.register_attention_function(kinds[member])(attend)
    return Replaced(member, engine.method, original)


def _attention(engine: EngineAttention, dense: Callable[..., Any]) -> Callable[..., Any]:
    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        dropout_p: float | None = 0.0,
        is_causal: bool | None = False,
        attention_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[torch.Tensor, None]:
        """(B, H, S, D) in and out; the second result would be a log-sum-exp, for rings."""
        ring, shared = _degrees()
        if ring > 1:
            raise DiffpatchError(
                f"ring_degree={ring}: no call sees all keys, which a sparse one needs; use"
                " ulysses_degree alone"
            )

        def without() -> torch.Tensor:
            out, _ = dense(query, key, value, dropout_p or 0.0, bool(is_causal), attention_kwargs)
            return out.transpose(1, 2)

        grid = _grid(query.shape[2], shared, attention_kwargs or {})
        if dropout_p or is_causal:
            grid = "causal attention or dropout"
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = engine.attend(q, k, v, grid, CallPlace(some_heads=shared > 1), without)
        return out.transpose(1, 2), None

    return attend


def _grid(tokens: int, devices: int, told: Mapping[str, Any]) -> TokenGrid | str:
    """Where the tokens of a call stand, or why it is dense."""
    if any(told.get(name) is not None for name in _MASKS):
        return "a mask of the model"
    sizes = told.get("thw")
    if sizes is None:
        return "xDiT does not tell the grid of this model"
    frames, height, width = sizes
    rest = tokens - frames * height * width
    if not 0 <= rest < devices:  # less than a token a device is padding, and more is text
        return f"a sequence of {tokens} tokens is not the grid {tuple(sizes)}"
    return TokenGrid(frames, height, width, text_after=rest)


def _degrees() -> tuple[int, int]:
    """How many devices cut the sequence in a ring, and how many share the heads."""
    state = importlib.import_module(_STATE)
    if not state.model_parallel_is_initialized():
        return 1, 1
    return state.get_ring_parallel_world_size(), state.get_ulysses_parallel_world_size()


def _module() -> Any:
    """xDiT's module of backends.

    Raises:
        DiffpatchError: xDiT is not there, or another than expected.
    """
    try:
        module = importlib.import_module(_BACKENDS)
    except ImportError as error:
        raise DiffpatchError(f"xDiT cannot be imported ({error}): pip install xfuser") from None
    for name in _NAMES:
        if not hasattr(module, name):
            raise _changed(name)
    return module


def _changed(what: str) -> DiffpatchError:
    version = importlib.metadata.version("xfuser")
    return DiffpatchError(
        f"xDiT {version} has no {what}: this was written for 0.7; install that, or a newer"
        " diffpatch"
    )
