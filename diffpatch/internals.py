"""The private parts of diffusers, and one of torch, that diffpatch leans on, each with its reason.

Everything else in diffpatch uses what diffusers documents. `check` compares these parts with what
diffpatch was written for and turns a changed one into an error that names the version, because a
swap that misses its target would otherwise show as a wrong picture, or as no speedup.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch

from diffpatch.errors import DiffpatchError

# Processor code finds attention under one of these two names, as a global of its module: the
# dispatcher (most families), or torch's own operator (older ones).
DISPATCH = "dispatch_attention_fn"
SDPA = "scaled_dot_product_attention"

# Where a processor keeps the backend that `set_attention_backend` chose, for dense calls.
PROCESSOR_BACKEND = "_attention_backend"
# Where `enable_parallelism` notes its configuration, on the model and on processors.
PARALLEL = "_parallel_config"
# The share of one process in it; of ulysses, ring and tensor parallelism.
ULYSSES_MESH, TENSOR_MESH = "_ulysses_mesh", "_mesh"
# Exchanges heads for tokens between processes around an attention of our own.
EXCHANGE = "_templated_context_parallel_attention"
# What `enable_cache` notes on the model, and where hooks on a module are kept.
CACHE, HOOKS = "_cache_config", "_diffusers_hook"
# Some video-to-video pipelines cut their timesteps and tell nobody but this attribute.
PIPELINE_STEPS = "_num_timesteps"

_DISPATCH_ARGUMENTS = (
    "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa",
    "attention_kwargs", "backend",
)  # fmt: skip
_EXCHANGE_ARGUMENTS = (
    "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa",
    "return_lse", "forward_op", "backward_op", PARALLEL,
)  # fmt: skip


def dispatcher() -> Callable[..., Any]:
    """diffusers' own attention, (B, S, H, D) in and out."""
    return attention_dispatch.dispatch_attention_fn


def exchange() -> Callable[..., Any]:
    """diffusers' exchange of heads for tokens, around a given attention."""
    return getattr(attention_dispatch, EXCHANGE)


def in_backward() -> bool:
    """Whether a backward pass runs in this thread; torch's own checkpointing asks the same way."""
    return torch._C._current_graph_task_id() != -1


def changed(what: str) -> DiffpatchError:
    """The error for an internal that is not what it was."""
    return DiffpatchError(
        f"diffusers {diffusers.__version__} has changed inside: {what}; this diffpatch would not"
        " compute what it should. Install a diffusers that its README names, or a newer diffpatch"
    )


@functools.cache
def check() -> None:
    """Look whether the internals are as expected; the first patch asks, later ones need not.

    Raises:
        DiffpatchError: one is not, with the version of diffusers and what changed.
    """
    function = getattr(attention_dispatch, DISPATCH, None)
    _expect_arguments(DISPATCH, function, _DISPATCH_ARGUMENTS)
    known = inspect.signature(attention_dispatch.dispatch_attention_fn).parameters
    if "parallel_config" in known:  # from 0.36 on
        _expect_arguments(
            EXCHANGE, getattr(attention_dispatch, EXCHANGE, None), _EXCHANGE_ARGUMENTS
        )
    _expect_arguments(SDPA, getattr(F, SDPA, None), None)


def _expect_arguments(name: str, function: Any, expected: tuple[str, ...] | None) -> None:
    if not callable(function):
        raise changed(f"{name} is gone")
    if expected is None:
        return
    parameters = inspect.signature(function).parameters
    missing = [argument for argument in expected if argument not in parameters]
    if missing:
        raise changed(f"{name} has no argument {', '.join(missing)}")
    first = tuple(parameters)[: len(expected)]
    if first != expected:
        raise changed(f"the arguments of {name} are now {', '.join(parameters)}")
