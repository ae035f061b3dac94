"""The same operators as a plain function, for people who write their own model."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from diffpatch.checking import Natural, checked
from diffpatch.errors import BadParameter, DiffpatchError
from diffpatch.kernels.gpu.device import on_device_of
from diffpatch.kernels.memo import Recent
from diffpatch.methods.base import AttentionCall, Method
from diffpatch.methods.packed import pattern_on
from diffpatch.methods.registry import MethodLike, make_method
from diffpatch.patching.attention.autocast import as_autocast, without_autocast
from diffpatch.patching.attention.model_masks import is_transformed
from diffpatch.patching.options import composition
from diffpatch.patterns.grid import Grid, as_grid
from diffpatch.patterns.pattern import BlockPattern

# Few, because a pattern keeps its copies on devices: some megabytes each for a long clip. They go
# with the pattern, once eight others were used after it.
PATTERNS = Recent(8)
_OURS = "of the pattern"  # in a state: the pattern that it is about, and what that was made of


def _pattern(
    method: Method, grid: Grid, variant: Hashable, state: dict[str, Any] | None
) -> BlockPattern:
    """The pattern of a call; throughout a run the same object, or its state would not fit."""
    key = method, grid, variant
    if state is None or not method.needs_steps:
        return PATTERNS(key, lambda: pattern_on(*key))
    held = state.get(_OURS)
    if held is None or held[0] != key:
        held = state[_OURS] = key, PATTERNS(key, lambda: pattern_on(*key))
    pattern: BlockPattern = held[1]
    return pattern


@checked("grid", "method")
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: Grid | tuple[int, int, int],
    method: MethodLike = "radial",
    *,
    scale: float | None = None,
    layer: Natural = 0,
    step: Natural = 0,
    branch: Natural = 0,
    backend: str = "auto",
    state: dict[str, Any] | None = None,
    **params: Any,
) -> torch.Tensor:
    """Self-attention over a token grid by one of the methods.

    Args:
        q: (B, S, H, D), after any normalisation and rotary embedding; S is ``grid.num_tokens``.
        k: (B, S, K, D), where K divides H.
        v: like k.
        grid: where the tokens live: a `TokenGrid`, a `PackedGrid` of several, or three numbers
            (num_frames, height, width).
        method: a name from `list_methods()`, a combination such as "dense+temporal", or a method
            object.
        scale: the factor on q·k; None means 1 / sqrt(D).
        layer: layer number, for methods that alternate between layers.
        step: denoising step, for methods that alternate between steps.
        branch: guidance branch, for methods that treat them apart.
        backend: "auto", "triton", "gluon", "flex", "torch", "reference", "triton-int8",
            "torch-int8", "triton-fp8" or "torch-fp8", as
            `diffpatch.kernels.block_sparse.api.block_sparse_attention` says.
        state: a dictionary of yours for each layer and guidance branch, for methods that carry
            something from step to step; start each run with empty ones.
        **params: parameters of the method.

    Returns:
        (B, S, H, D) like q; under autocast in its dtype, as from torch's own attention.

    Raises:
        DiffpatchError: the method or a parameter cannot work, or a tensor does not fit the grid.
    """
    method, grid = make_method(method, **params), as_grid(grid)
    composition.check_method(method)
    if q.shape[1] != grid.num_tokens:
        raise BadParameter(
            f"q is {tuple(q.shape)}, in (batch, tokens, heads, channels), and the grid {grid} has"
            f" {grid.num_tokens} tokens: q has {q.shape[1]}"
        )
    if is_transformed(q):
        raise DiffpatchError(
            "attention: q is inside a transform of torch.func (vmap, grad, jvp), which its kernels"
            " do not know: pass the batch as it is, (B, S, H, D), and call backward for gradients"
        )
    pattern = _pattern(method, grid, method.variant(layer, step), state).for_heads(q.shape[2])
    q, k, v, _ = as_autocast(q, k, v, None)
    call = AttentionCall(
        pattern,
        scale,
        backend=backend,
        step=step,
        state={} if state is None else state,
        layer=layer,
        branch=branch,
    )
    with on_device_of(q), without_autocast(q):
        return method.attend(q, k, v, call).out
