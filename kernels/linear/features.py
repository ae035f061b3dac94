"""Feature maps of linear attention: φ, so that φ(q)·φ(k) stands for exp(q·k)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

FEATURES = ("elu", "relu", "softmax", "hedgehog")


def feature_map(x: torch.Tensor, feature: str) -> torch.Tensor:
    """φ(x), never negative, in the dtype of x: (..., D) -> (..., D), or 2D for "hedgehog".

    "elu" is elu(x) + 1; "softmax" is over the channels; "hedgehog" is the softmax of x and -x.
    """
    if feature == "elu":
        return F.elu(x) + 1
    if feature == "relu":
        return x.relu()
    if feature == "softmax":
        return x.softmax(-1)
    return torch.cat([x, -x], -1).softmax(-1)
