"""Temporal attention, mode "tail": what the sparse method leaves out is kept as a result."""

from __future__ import annotations

import torch

from diffpatch.kernels.merge import merge
from diffpatch.methods.base import Attended, AttentionCall
from diffpatch.patterns.build import rest


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, refresh: int
) -> Attended:
    """The call's pattern now, merged with the rest as of the last refresh."""
    state = call.state
    near, near_lse, used = call.sparse(q, k, v)
    fits = "out" in state and state["pattern"] is call.pattern and state["out"].shape == q.shape
    if fits and call.step - state["step"] < refresh:
        out, _ = merge(near, near_lse, state["out"], state["lse"])
        return Attended(out, call.pattern.kept, used)
    far, far_lse, _ = call.sparse(q, k, v, rest(call.pattern))
    state.update(out=far, lse=far_lse, step=call.step, pattern=call.pattern)
    full, _ = merge(near, near_lse, far, far_lse)
    return Attended(full, 1.0, used)
