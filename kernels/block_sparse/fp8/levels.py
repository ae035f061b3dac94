"""Weights and values as 8-bit floats, so that their product runs on 8-bit tensor cores.

The format is e4m3: 4 bits of exponent, 3 of mantissa, numbers up to 448. Weights of a softmax,
which are 1 at most, are multiplied by that. Values are smoothed as keys are: their mean over the
tokens is subtracted and added to the output, which changes nothing, as the weights of a query sum
to 1. What is left has one scale for each channel of each head (SageAttention2, arXiv 2411.10958,
section 3). Rounding errs by up to 1/16 of every weight and of every value, by chance up or down.

Here is the definition, in PyTorch.
"""

from __future__ import annotations

import torch

from diffpatch.kernels.block_sparse.int8.levels import SMALLEST

LARGEST = 448.0  # of e4m3
FORMAT = torch.float8_e4m3fn


def round_weights(weights: torch.Tensor) -> torch.Tensor:
    """Weights from 0 to 1 as the nearest that e4m3 has after they are multiplied by `LARGEST`."""
    return (weights * LARGEST).float().to(FORMAT).to(weights.dtype) / LARGEST


def quantize_values(
    v: torch.Tensor, mean: torch.Tensor, key_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values less their mean as 8-bit floats: ``v - mean ≈ e4m3 * scale``.

    Args:
        v: (B, S, K, D).
        mean: fp32 (fp64 for fp64) (B, K, D), what is subtracted; zeros leave values as they are.
        key_mask: bool (B, S), False for values that become 0, whatever they hold; or None.

    Returns:
        e4m3 (B, S, K, D) and the scale of every channel in the dtype of the mean, (B, K, D).
    """
    x = v.to(mean.dtype) - mean[:, None]
    if key_mask is not None:
        x = x.masked_fill(~key_mask[:, :, None, None], 0.0)
    scales = x.abs().amax(1).clamp(min=SMALLEST) / LARGEST
    return (x / scales[:, None]).float().to(FORMAT), scales
