"""Attention over those tiles of a block index that are active, which every head has for itself.

A block index says which pairs of tiles can be visited at all. Here each head of each batch entry
visits its own choice of them, given by one flag a pair, and may find out on the way which pairs
mattered. Windows, chosen tiles, everything and nothing are flags too, so that heads which do
different things share one call. Flags never leave the device and are kept as bits.
"""

from __future__ import annotations

from importlib import import_module

import torch

from diffpatch.kernels.active_tiles.table import Result, TileTable, tile_table
from diffpatch.kernels.block_sparse.backends import run
from diffpatch.kernels.block_sparse.operators import ACTIVE_TILES
from diffpatch.kernels.blocks import BlockIndex

MODULES = {"triton": "triton_impl", "torch": "torch_impl", "reference": "reference"}

__all__ = [
    "Result",
    "TileTable",
    "attend",
    "attend_on",
    "kept",
    "pack",
    "tile_table",
    "unpack",
]


def pack(flags: torch.Tensor) -> torch.Tensor:
    """bool (..., E) -> uint8 (..., ⌈E / 8⌉), the first flag in the lowest bit."""
    short = -flags.shape[-1] % 8
    flags = torch.nn.functional.pad(flags.to(torch.uint8), (0, short))
    # Made on the device: numbers of the host would be copied there, and the call wait for it.
    shifts = torch.arange(8, dtype=torch.uint8, device=flags.device)
    return (flags.unflatten(-1, (-1, 8)) << shifts).sum(-1, dtype=torch.uint8)


def unpack(bits: torch.Tensor, length: int) -> torch.Tensor:
    """uint8 (..., n) -> bool (..., length), the inverse of `pack`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[..., None] >> shifts) & 1).bool().flatten(-2)[..., :length]


def kept(blocks: BlockIndex, active: torch.Tensor, strip: int = 0) -> torch.Tensor:
    """The fraction of all query-key pairs that active tiles hold, exactly.

    Args:
        blocks: the index, over S tokens.
        active: bool (B, H, E).
        strip: as in `attend`.

    Returns:
        A number on the device of the flags, so that nothing waits for it.
    """
    table = tile_table(blocks, strip)
    wide = torch.float32 if active.device.type == "mps" else torch.float64
    pairs = (active * table.area[table.pattern]).sum(dtype=wide)
    return pairs / (active.shape[0] * active.shape[1] * blocks.num_tokens**2)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    active: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    threshold: float | None = None,
    reverse: bool = False,
    strip: int = 0,
    backend: str = "auto",
) -> Result:
    """Attention of every query tile to its active key tiles, one by one in the order of the keys.

    A tile is *hit* if for some query its largest score, in powers of 2, exceeds the largest of the
    tiles before it by more than `threshold` (LiteAttention, arXiv 2511.11062, equation 7, as its
    kernel applies it: a tile that is not hit still counts in this call). The first tile is hit.

    Args:
        q: (B, S, H, D), fp32, bf16 or fp16 (torch and reference also fp64).
        k: (B, S, K, D), where K divides H: query head h reads key head ``h * K // H``.
        v: like k.
        blocks: which pairs can be visited, over S tokens; E of tiles in its `tile_table`.
        active: bool (B, H, E), the tiles to visit; None visits all.
        scale: the factor on q·k; None means 1 / sqrt(D).
        key_mask: bool (B, S), True where a key may be attended to.
        threshold: at most 0; None asks for no hits.
        reverse: go from the last key tile to the first.
        strip: cut key tiles into strips of at most that many keys, each with flags of its own, so
            that keys are cut finer than queries; 0 leaves them whole. What is said of key tiles
            holds for strips then.
        backend: as in `block_sparse_attention`; "triton" computes no gradients.

    Returns:
        The output, its log-sum-exp, and the hits if there is a threshold.
    """
    return attend_on(
        q, k, v, blocks, active, scale=scale, key_mask=key_mask, threshold=threshold,
        reverse=reverse, strip=strip, backend=backend,
    )[0]  # fmt: skip


def attend_on(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    active: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    threshold: float | None = None,
    reverse: bool = False,
    strip: int = 0,
    backend: str = "auto",
) -> tuple[Result, str]:
    """`attend`, and the backend that computed it."""
    table = tile_table(blocks, strip)
    valid = table.valid().expand(q.shape[0], q.shape[2], -1)
    visited = valid if active is None else active & valid
    factor = q.shape[-1] ** -0.5 if scale is None else scale

    def compute(name: str) -> Result:
        implementation = import_module(f"diffpatch.kernels.active_tiles.{MODULES[name]}")
        result: Result = implementation.attend(
            q, k, v, blocks, visited, factor, key_mask, threshold, reverse, strip
        )
        return result

    return run(ACTIVE_TILES, backend, blocks, (q, k, v), compute)
