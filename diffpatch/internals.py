"""The private parts of diffusers, and one of torch, that diffpatch leans on, each with its reason.

Everything else in diffpatch uses what diffusers documents. `check` compares these parts with what
diffpatch was written for, and raises an error that names the version if one has changed. Without it
a swap that misses its target would show as a wrong picture, or as no speedup.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.hooks.first_block_cache import FBCHeadBlockHook
from diffusers.hooks.hooks import HookRegistry, StateManager
from diffusers.models import attention_dispatch
from diffusers.models._modeling_parallel import ContextParallelConfig
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from tqdm.std import tqdm

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
# Where the hooks of a cache keep their states, one for every `cache_context`.
CACHE_MANAGER, CACHE_STATES = "state_manager", "_state_cache"
# Where layer-skip hooks find by class what to do for a processor; asking it fills it.
PROCESSORS = "_registry"
# How a pipeline names the forward that it is about to make (of the models that have it).
CACHE_CONTEXT = "cache_context"
# Some video-to-video pipelines cut their timesteps and tell nobody but this attribute.
PIPELINE_STEPS = "_num_timesteps"
# Where a pipeline's models run; its public `device` is where offloaded ones wait.
EXECUTION_DEVICE = "_execution_device"
# Where diffusers keeps its attention backends by name, what it keeps of each (first, its function),
# and which one is used where none is asked for (for `diffpatch.adapters` alone).
BACKENDS = "_AttentionBackendRegistry"
BACKEND_TABLES = ("_backends", "_constraints", "_supported_arg_names")
ACTIVE_BACKEND = "_active_backend"
# Where an enumeration of Python keeps its members, which diffusers' names of backends are.
ENUM_TABLES = ("_member_map_", "_value2member_map_", "_member_names_")

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


def is_pipeline(value: Any) -> bool:
    """Whether a value is a pipeline of diffusers, modular ones included."""
    return isinstance(value, DiffusionPipeline | ModularPipeline)


def is_progress_bar(value: Any) -> bool:
    """Whether a value is what pipelines put around their denoising loops, by `with`."""
    return isinstance(value, tqdm)


def exchange() -> Callable[..., Any]:
    """diffusers' exchange of heads for tokens, around a given attention."""
    return getattr(attention_dispatch, EXCHANGE)


def execution_device(pipe: Any) -> torch.device:
    """Where a pipeline's models run.

    Raises:
        DiffpatchError: diffusers keeps it elsewhere now.
    """
    device = getattr(pipe, EXECUTION_DEVICE, None)
    if device is None:
        raise changed(f"{type(pipe).__name__} has no {EXECUTION_DEVICE}")
    return device


def same_in_registries(made: type, original: type) -> None:
    """Let diffusers' hooks, which look classes of processors up, treat one as another."""
    try:
        known = AttentionProcessorRegistry.get(original)
    except ValueError:
        return
    AttentionProcessorRegistry.register(made, known)


def in_backward() -> bool:
    """Whether a backward pass runs in this thread; torch's own checkpointing asks the same way."""
    return torch._C._current_graph_task_id() != -1


def is_traced(tensor: torch.Tensor) -> bool:
    """Whether somebody records what is done with a tensor, or it stands for one without values."""
    return (
        type(tensor) is not torch.Tensor
        or tensor.is_meta
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


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
    _expect_arguments(EXCHANGE, getattr(attention_dispatch, EXCHANGE, None), _EXCHANGE_ARGUMENTS)
    _expect_arguments(SDPA, getattr(F, SDPA, None), None)
    for owner, method, name in _kept_names():
        function = getattr(owner, method, None)
        if function is None:
            raise changed(f"{owner.__name__}.{method} is gone")
        if name not in set(_words(inspect.unwrap(function).__code__)):
            raise changed(f"{owner.__name__}.{method} does not use {name} any more")


def check_backends() -> None:
    """Look whether diffusers keeps its attention backends as expected.

    Raises:
        DiffpatchError: it does not, with the version of diffusers and what changed.
    """
    check()
    registry = getattr(attention_dispatch, BACKENDS, None)
    if registry is None:
        raise changed(f"{BACKENDS} is gone")
    for name in (*BACKEND_TABLES, ACTIVE_BACKEND):
        if not hasattr(registry, name):
            raise changed(f"{BACKENDS}.{name} is gone")
    _expect_arguments("register", getattr(registry, "register", None), ("backend", "constraints"))
    for method in ("register", "set_active_backend"):
        words = set(_words(inspect.unwrap(getattr(registry, method)).__code__))
        used = (ACTIVE_BACKEND,) if method == "set_active_backend" else BACKEND_TABLES
        for name in used:
            if name not in words:
                raise changed(f"{BACKENDS}.{method} does not use {name} any more")
    for name in ENUM_TABLES:
        if not hasattr(attention_dispatch.AttentionBackendName, name):
            raise changed(f"AttentionBackendName has no {name}")


def _kept_names() -> list[tuple[Any, str, str]]:
    """(class, its method, the name it must use): a renamed one would be read as absent."""
    return [
        (ModelMixin, "set_attention_backend", PROCESSOR_BACKEND),
        (ModelMixin, "enable_parallelism", PARALLEL),
        (ContextParallelConfig, "setup", ULYSSES_MESH),
        (CacheMixin, "enable_cache", CACHE),
        (AttentionProcessorRegistry, "get", PROCESSORS),
        (AttentionProcessorRegistry, "register", PROCESSORS),
        (HookRegistry, "check_if_exists_or_initialize", HOOKS),
        (FBCHeadBlockHook, "reset_state", CACHE_MANAGER),
        (StateManager, "reset", CACHE_STATES),
    ]


def _words(code: types.CodeType) -> Iterator[str]:
    """Every name and every string in a code object and those nested in it."""
    yield from code.co_names
    yield from code.co_varnames
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, types.CodeType):
            yield from _words(constant)


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
