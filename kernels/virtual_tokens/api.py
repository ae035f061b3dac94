"""Virtual tokens: pieces of tiles are represented by the mean of their keys, in the same softmax.

With k̄, v̄ the means and n the count of a piece, its keys together contribute
``exp(s q·k̄ + log n + w) v̄``, the expansion of their exponentials around the mean: the first order
cancels, and ``w = ½ s² Σ_c q_c² var_c`` is the (diagonal) second order, capped at log n because
outlier channels would otherwise blow it up (PISA, arXiv 2602.01077; the cap and the second order:
PWT). Attention to virtual tokens and attention to exact tiles share one softmax by merging their
log-sum-exps.
"""

from __future__ import annotations

import torch

from diffpatch.kernels.block_sparse.backends import run
from diffpatch.kernels.block_sparse.operators import VIRTUAL_TOKENS
from diffpatch.kernels.blocks import NOTHING, BlockIndex
from diffpatch.kernels.merge import merge
from diffpatch.kernels.pieces import cut
from diffpatch.kernels.virtual_tokens import reference, torch_correction, torch_impl
from diffpatch.kernels.virtual_tokens.tokens import Missed, VirtualTokens


def pool(
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    size: int,
    *,
    second_order: bool = True,
    key_mask: torch.Tensor | None = None,
    strip: int = 0,
    backend: str = "auto",
) -> VirtualTokens:
    """Pool keys and values over pieces of at most `size` tokens of each tile, in tile order.

    Args:
        k: (B, S, K, D), after any rotary embedding.
        v: (B, S, K, D).
        blocks: the tiles.
        size: most tokens a virtual token stands for.
        second_order: whether to keep the variance of the keys.
        key_mask: bool (B, S), True where a key counts.
        strip: most keys of a strip, as in `active_tiles.attend`: no piece crosses its border.
        backend: "triton", "torch", "reference", or "auto".
    """
    pieces = cut(blocks, size, strip)

    def compute(name: str) -> VirtualTokens:
        if name == "reference":
            return reference.pool(k, v, pieces, second_order, key_mask)
        if name == "triton":
            from diffpatch.kernels.virtual_tokens import triton_impl as kernels

            pooled = kernels.pool(k, v, blocks, pieces.first, second_order, key_mask)
            return VirtualTokens(*pooled, pieces)
        return torch_impl.pool(k, v, pieces, second_order, key_mask)

    return run(VIRTUAL_TOKENS, backend, blocks, (k, v), compute)[0]


def attend_virtual(
    q: torch.Tensor,
    tokens: VirtualTokens,
    blocks: BlockIndex,
    scale: float,
    near: tuple[torch.Tensor, torch.Tensor] | None = None,
    backend: str = "auto",
    *,
    shown: torch.Tensor | None = None,
    missed: Missed | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query to the virtual tokens of the tiles it does not visit, or is shown.

    Args:
        q: (B, S, H, D).
        tokens: what `pool` made of the keys and values; K heads, K divides H.
        blocks: tiles that a query's tile visits, even partly, are left out, unless `shown` says
            what is.
        scale: the factor on q·k.
        near: the exact part, an output (B, S, H, D) and its log-sum-exp (B, S, H), to be in the
            same softmax; None for the virtual tokens alone.
        backend: "triton", "torch", "reference", or "auto".
        shown: bool (B, H, N, n) [query tile, strip], whose virtual tokens take part: what is not
            active, where tiles are chosen by their content, and nothing in heads that drop it.
        missed: what `missed` found for the same `shown`, to be added to the virtual part.

    Returns:
        The output (B, S, H, D) and its natural log-sum-exp (B, S, H), fp32 (fp64 for fp64).
    """

    def compute(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        if name == "triton":
            from diffpatch.kernels.virtual_tokens import triton_impl as kernels

            seen = _shown_pieces(tokens, blocks, shown)
            return kernels.attend(q, tokens, blocks, scale, near, seen, missed)
        if name == "reference" and missed is None:
            return reference.attend(q, tokens, blocks, scale, near, shown)
        if name == "reference":
            far = reference.attend(q, tokens, blocks, scale, None, shown)
        else:
            far = torch_impl.attend(q, tokens, blocks, scale, _shown_pieces(tokens, blocks, shown))
        far = far if missed is None else missed.added(*far, blocks)
        return far if near is None else merge(*near, *far)

    return run(VIRTUAL_TOKENS, backend, blocks, (q, tokens.keys, tokens.values), compute)[0]


def missed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tokens: VirtualTokens,
    blocks: BlockIndex,
    scale: float,
    *,
    shown: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    backend: str = "auto",
) -> Missed:
    """What attention to virtual tokens misses, as the mean query of each tile sees it.

    Args:
        q: (B, S, H, D).
        k: (B, S, K, D), of which `tokens` were made.
        v: like k.
        tokens: what `pool` made of k and v with this `key_mask`.
        blocks: the tiles.
        scale: the factor on q·k.
        shown: as in `attend_virtual`.
        key_mask: bool (B, S), True where a key counts.
        backend: "triton", "torch", "reference", or "auto".

    Returns:
        What `attend_virtual` takes as `missed`.
    """

    def compute(name: str) -> Missed:
        if name == "reference":
            return reference.missed(q, k, v, tokens, blocks, scale, shown, key_mask)
        seen = _shown_pieces(tokens, blocks, shown)
        if name == "triton":
            from diffpatch.kernels.virtual_tokens import triton_correction as kernels

            if kernels.supports(tokens):
                return kernels.missed(q, k, v, tokens, blocks, scale, seen, key_mask)
        return torch_correction.missed(q, k, v, tokens, blocks, scale, seen, key_mask)

    return run(VIRTUAL_TOKENS, backend, blocks, (q, k, v), compute)[0]


def _shown_pieces(
    tokens: VirtualTokens, blocks: BlockIndex, shown: torch.Tensor | None
) -> torch.Tensor:
    """bool (B or 1, H or 1, N, V): which pieces each query tile of each head attends to."""
    pieces = tokens.pieces
    if shown is not None:
        return shown if shown.shape[-1] == len(pieces) else shown[..., pieces.whole]

    def build(index: BlockIndex) -> torch.Tensor:
        left_out = (index.mask_map() == NOTHING)[None, :, :, pieces.tile]  # (1, P, N, V)
        heads = index.head_pattern
        return left_out if heads is None else left_out[:, heads.long()]

    return blocks.derived(("pieces left out", pieces.sizes), build)
