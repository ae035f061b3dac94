"""Queries and keys in 8 bits, so that scores can be computed on 8-bit tensor cores.

Keys are smoothed first: their mean over the tokens is subtracted, which adds the same number to all
scores of a query, so that the softmax does not change and the log-sum-exp is put right by
``scale * q·mean``. What is left has no channel far from 0, which would take all 255 levels for
itself (SageAttention, arXiv 2410.02367). Every query has a scale of its own, which costs nothing in
a kernel whose softmax goes by rows; of the keys every strip of `STRIP` tokens of a tile.

Here is the definition, in PyTorch.
"""

from __future__ import annotations

import torch

from diffpatch.kernels.blocks import BlockIndex

STRIP = 64  # a multiple of every kernel's sub-blocks of keys
LEVELS = 127
SMALLEST = 1e-20  # the largest magnitude is taken to be this or more


def mean_key(k: torch.Tensor, key_mask: torch.Tensor | None = None) -> torch.Tensor:
    """The mean over the tokens that count.

    Args:
        k: (B, S, K, D).
        key_mask: bool (B, S), False for keys nobody may attend to, whatever they hold; or None.

    Returns:
        fp32 (fp64 for fp64) (B, K, D), 0 where no token counts.
    """
    dtype = torch.promote_types(k.dtype, torch.float32)
    if key_mask is None:
        return k.mean(1, dtype=dtype)
    count = key_mask.sum(1).clamp(min=1)[:, None, None]
    return k.masked_fill(~key_mask[:, :, None, None], 0.0).sum(1, dtype=dtype) / count


def mean_score(q: torch.Tensor, mean: torch.Tensor, scale: float) -> torch.Tensor:
    """What smoothing took from the scores of each query: ``scale * q·mean``.

    Args:
        q: (B, S, H, D).
        mean: (B, K, D), where K divides H.
        scale: the factor on q·k.

    Returns:
        (B, S, H) in the dtype of the mean.
    """
    groups = q.shape[2] // mean.shape[1]
    of_head = mean.repeat_interleave(groups, 1)[:, None]
    return (q.to(mean.dtype) * of_head).sum(-1) * scale


def quantize_queries(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries (B, S, H, D) as int8 of the same shape and scales (B, S, H): q ≈ int8 * scale."""
    x = q.to(torch.promote_types(q.dtype, torch.float32))
    scales = x.abs().amax(-1).clamp(min=SMALLEST) / LEVELS
    return (x / scales[..., None] + 0.5).floor().to(torch.int8), scales


def quantize_keys(
    k: torch.Tensor,
    mean: torch.Tensor,
    blocks: BlockIndex,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys less their mean as 8-bit integers, in tile order: ``k - mean ≈ int8 * scale``.

    Args:
        k: (B, S, K, D).
        mean: fp32 (B, K, D), what is subtracted; zeros leave the keys as they are.
        blocks: the tiles.
        key_mask: bool (B, S), False for keys that become 0; or None.

    Returns:
        int8 (B, S, K, D) and the scale of every key, fp32 (fp64 for fp64) (B, K, S).
    """
    x = k.to(mean.dtype) - mean[:, None]
    if key_mask is not None:
        x = x.masked_fill(~key_mask[:, :, None, None], 0.0)
    x = x[:, blocks.order].transpose(1, 2)  # (B, K, S, D), in tile order
    strip = blocks.derived("quantization strips", _strips)
    largest = x.abs().amax(-1)
    of_strip = largest.new_zeros(*x.shape[:2], int(strip[-1]) + 1)
    of_strip.scatter_reduce_(2, strip.expand_as(largest), largest, "amax")
    scales = of_strip[:, :, strip].clamp(min=SMALLEST) / LEVELS
    return (x / scales[..., None] + 0.5).floor().to(torch.int8).transpose(1, 2), scales


def _strips(blocks: BlockIndex) -> torch.Tensor:
    """int64 (S,), the number of the strip that each place of tile order belongs to."""
    place = torch.arange(blocks.num_tokens, device=blocks.device)
    in_tile = place - blocks.starts[blocks.tile_of_place]
    return (in_tile % STRIP == 0).cumsum(0) - 1
