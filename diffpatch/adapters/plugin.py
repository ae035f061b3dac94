"""EXPERIMENTAL: a method as a sparse-attention plugin of an engine, vLLM-Omni's proposal.

The proposal (its issues 2233 and 4661) is ``fn(q, k, v, params, is_causal, softmax_scale)``, which
the engine calls in every layer; step and geometry are told once a forward. It is not settled, and
names here may change with it.

    plugin = Plugin("radial", decay=0.2, dense_steps=10)
    for step in range(50):
        for branch in (0, 1):                    # with the prompt, without
            plugin.begin(step, TokenGrid(21, 30, 52), branch=branch)
            ...  # the engine's layers: plugin(q, k, v, Params(layer=i), False, None)
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch

from diffpatch import functional
from diffpatch.errors import DiffpatchError
from diffpatch.kernels import dense as dense_attention
from diffpatch.methods.base import MethodLike, make_method
from diffpatch.patching import composition
from diffpatch.patterns.grid import TokenGrid


@dataclass(frozen=True)
class Params:
    """What the engine says of one call.

    Attributes:
        layer: which layer calls, from 0.
        mask: bool (B, S), True where a key may be attended to; such a call is dense.
    """

    layer: int
    mask: torch.Tensor | None = None


class Plugin:
    """A method with the state of one run; one plugin a request.

    Args:
        method: a name from `list_methods()` or a method object.
        dense_steps: the first steps stay dense, that many.
        dense_layers: the first layers stay dense, that many.
        **params: parameters of the method.
    """

    def __init__(
        self,
        method: MethodLike = "radial",
        *,
        dense_steps: int = 0,
        dense_layers: int = 0,
        **params: Any,
    ) -> None:
        self.method = make_method(method, **params)
        composition.check_method(self.method)
        self.dense_steps, self.dense_layers = dense_steps, dense_layers
        self._step, self._branch = -1, 0
        self._grid: TokenGrid | None = None
        # What the method carries from step to step: of each layer, branch and grid its own.
        self._states: dict[Any, dict[str, Any]] = defaultdict(dict)

    def begin(self, step: int, grid: TokenGrid, branch: int = 0) -> None:
        """The next forward: its denoising step, from 0, its grid, and its branch of guidance.

        A step before the last one begins a new run, which forgets the state of the old.
        """
        if step < self._step:
            self._states.clear()
        self._step, self._grid, self._branch = step, grid, branch

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        params: Params,
        is_causal: bool = False,
        softmax_scale: float | None = None,
    ) -> torch.Tensor:
        """Attention of one layer, (B, S, H, D) in and out; dense where the method cannot run.

        Raises:
            DiffpatchError: no forward has begun.
        """
        if self._grid is None:
            raise DiffpatchError("the plugin was called before begin(step, grid)")
        early = self._step < self.dense_steps or params.layer < self.dense_layers
        fits = q.shape[1] == k.shape[1] == self._grid.num_tokens
        if early or not fits or is_causal or params.mask is not None:
            return dense_attention.attend(q, k, v, softmax_scale, params.mask, is_causal=is_causal)
        return functional.attention(
            q, k, v, self._grid, self.method, scale=softmax_scale, layer=params.layer,
            step=self._step, state=self._states[params.layer, self._branch, self._grid],
        )  # fmt: skip
