"""Block-sparse attention by its definition: dense attention under a boolean mask."""

from __future__ import annotations

import torch

from diffpatch.kernels.blocks import BlockIndex


def dense_mask(blocks: BlockIndex) -> torch.Tensor:
    """The (query, key) pairs that a block index keeps, for tests and small sequences.

    Args:
        blocks: the index, with P patterns over S tokens.

    Returns:
        bool (P, S, S) [pattern, query, key] in sequence order; memory grows with S².
    """
    tile, place = blocks.tile_of_place, blocks.place
    within = torch.arange(blocks.num_tokens, device=blocks.device) - blocks.starts[tile]
    pairs = blocks.mask_map()[:, tile[:, None], tile]
    in_tile_order = blocks.mask_table()[pairs, within[:, None], within]
    return in_tile_order[:, place[:, None], place]


def attend_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    scale: float,
    key_mask: torch.Tensor | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over the kept pairs, in fp32 (fp64 for fp64 inputs), differentiable throughout.

    Args:
        q: (B, S, H, D).
        k: (B, S, K, D), where K divides H (query head h reads key head ``h * K // H``).
        v: (B, S, K, D).
        blocks: which pairs to keep.
        scale: the factor on q·k.
        key_mask: bool (B, S), False for keys nobody may attend to, or None.
        return_lse: ignored, the log-sum-exp is always returned.

    Returns:
        The output (B, S, H, D) in the dtype of q, zero where a query sees nothing, and the natural
        log-sum-exp (B, S, H) in the computing dtype, -inf there.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[2] // k.shape[2]
    qh = q.to(dtype).transpose(1, 2)
    kh, vh = (x.to(dtype).repeat_interleave(groups, dim=2).transpose(1, 2) for x in (k, v))
    mask = dense_mask(blocks)
    mask = mask[blocks.head_pattern.long()] if blocks.head_pattern is not None else mask
    mask = mask[None] if key_mask is None else mask[None] & key_mask[:, None, None, :]
    seen = mask.any(-1)
    # A row that sees nothing keeps its scores, so that its gradient is zero and not NaN.
    scores = (qh @ kh.mT * scale).masked_fill(~mask & seen[..., None], -torch.inf)
    lse = scores.logsumexp(-1)
    out = (scores.softmax(-1) @ vh).masked_fill(~seen[..., None], 0.0)
    lse = lse.masked_fill(~seen, -torch.inf)
    return out.transpose(1, 2).to(q.dtype), lse.transpose(1, 2)
