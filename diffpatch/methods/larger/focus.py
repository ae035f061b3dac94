"""Heads sharpened by how local they are: UltraImage's entropy-guided attention concentration.

In a larger picture a softmax spreads over more tokens, and details blur. Sharpening all heads alike
mends details and breaks the composition, so that each head gets a factor of its own on its scores
(arXiv 2512.04504, equations 9 to 11): `most` for the head whose attention has the lowest entropy of
all, 1 for that with the highest. Each sample of a batch has its own, as if it were alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

POWER = 2.0  # of the fall from the highest entropy; the authors' for all models
SAMPLED = 256  # queries of a call whose entropy is taken, at equal distances: all in small calls


def entropies(
    q: torch.Tensor, k: torch.Tensor, scale: float | None, key_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Shannon entropy of the attention of each head of each sample, in nats, the mean over queries.

    Args:
        q: (B, S, H, D).
        k: (B, S, H', D), H' a divisor of H.
        scale: factor on q·k; None means 1 / sqrt(D).
        key_mask: bool (B, S), True where a key may be attended to.

    Returns:
        (B, H) fp32.
    """
    heads, scale = q.shape[2], q.shape[-1] ** -0.5 if scale is None else scale
    count = min(SAMPLED, q.shape[1])
    places = torch.linspace(0, q.shape[1] - 1, count, device=q.device).round().long()
    found = []
    for head in range(heads):  # one at a time: its scores are (B, count, S)
        keys = k[:, :, head * k.shape[2] // heads].float()
        scores = scale * q[:, places, head].float() @ keys.transpose(1, 2)
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[:, None], float("-inf"))
        chances = scores.softmax(-1)
        found.append(-torch.special.xlogy(chances, chances).sum(-1).mean(-1))
    return torch.stack(found, 1)


def factors(found: Sequence[torch.Tensor], most: float) -> list[torch.Tensor]:
    """The factor of each head on its scores, from the entropies of all heads of all layers.

    Args:
        found: (B, H) of every layer.
        most: of the head with the lowest entropy.

    Returns:
        (B, H) of every layer, from 1 to `most`.
    """
    everything = torch.cat(list(found), 1)
    low, high = everything.amin(1, keepdim=True), everything.amax(1, keepdim=True)
    span = (high - low).clamp_min(torch.finfo(high.dtype).tiny)
    return [1 + (most - 1) * ((high - one) / span) ** POWER for one in found]


def factor_of(
    q: torch.Tensor,
    k: torch.Tensor,
    most: float,
    common: dict[str, Any],
    *,
    layer: int,
    step: int,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """The factors of a layer's heads in a call, (B, H); None in the step that measures entropies.

    That is the first in which the layer is called with so many samples. What a head does stays the
    same over the steps, so that one is enough.

    Args:
        q, k, scale, key_mask: of the call.
        most: as in `factors`.
        common: what is kept for all layers of the branch.
        layer: the layer of the call.
        step: of the run.
    """
    measured: dict[int, tuple[int, torch.Tensor]] = common.setdefault("entropies", {})
    if layer not in measured or len(measured[layer][1]) != len(q):
        measured[layer] = step, entropies(q, k, scale, key_mask)
        common.pop("factors", None)
    if measured[layer][0] == step:
        return None
    known: dict[int, torch.Tensor] = common.get("factors", {})
    if layer not in known:
        alike = {i: found for i, (_, found) in measured.items() if len(found) == len(q)}
        known = dict(zip(alike, factors([*alike.values()], most), strict=True))
        common["factors"] = known
    return known[layer]
