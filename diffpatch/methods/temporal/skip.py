"""Temporal attention, mode "skip": tiles that did not matter stay out until the next re-check."""

from __future__ import annotations

import torch

from diffpatch.kernels.active_tiles import api as active_tiles
from diffpatch.methods.base import Attended, AttentionCall
from diffpatch.methods.selection import always, remembered


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    call: AttentionCall,
    *,
    refresh: int,
    threshold: float,
    reverse: bool,
    keep_frames: int,
) -> Attended:
    """The tiles that were hit in every step since the last re-check, which computes them all.

    A stricter threshold than that of the step before is a reason for a re-check, too. A tile that
    is not hit (see `active_tiles.attend`) still counts in the step that finds it out.
    """
    state, blocks = call.state, call.pattern.on(q.device)
    bits = remembered(call, state, q)
    if bits is not None and (
        call.step - state["step"] >= refresh or threshold < state["threshold"]
    ):
        bits = None
    active, kept = None, torch.tensor(call.pattern.kept, dtype=torch.float32)
    if bits is not None:
        active = active_tiles.unpack(bits, active_tiles.tile_table(blocks).length)
        kept = active_tiles.kept(blocks, active)
    (out, _, hits), used = active_tiles.attend_on(
        q, k, v, blocks, active, scale=call.scale, key_mask=call.key_mask,
        threshold=threshold, reverse=reverse, backend=call.backend,
    )  # fmt: skip
    assert hits is not None
    going_on = hits | always(blocks, call.pattern.grid, keep_frames)
    since = call.step if bits is None else state["step"]
    state.update(
        bits=active_tiles.pack(going_on), step=since, threshold=threshold, pattern=call.pattern
    )
    return Attended(out, kept, used)
