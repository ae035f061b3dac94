"""Attention over those tiles of a block index that are active, which every head has for itself.

A block index says which pairs of tiles can be visited at all. Here each head of each batch entry
visits its own choice of them, given by one flag a pair, and may find out on the way which pairs
mattered. Flags never leave the device and are kept as bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffpatch.kernels.block_sparse import backends
from diffpatch.kernels.blocks import BlockIndex

LOG2_E = 1.4426950408889634
Result = tuple[torch.Tensor, torch.Tensor | None]  # the output and, if asked for, the hits


@dataclass(frozen=True, eq=False)
class TileTable:
    """The tile pairs of a block index in a row: by query tile, then by key tile.

    Patterns with fewer pairs than the longest are filled up with pairs of area 0.

    Attributes:
        query: int64 (P, E), the query tile of each pair.
        key: int64 (P, E), the key tile.
        mask_ids: int64 (P, E), the row of `masks` of a partial tile, -1 for a full one.
        area: int64 (P, E), the query-key pairs in it.
        row_ptr: int32 (P, N + 1), where the pairs of each query tile begin.
        pattern: int64 (H,), the pattern of each head, or (1,) where all heads share one.
    """

    query: torch.Tensor
    key: torch.Tensor
    mask_ids: torch.Tensor
    area: torch.Tensor
    row_ptr: torch.Tensor
    pattern: torch.Tensor

    @property
    def length(self) -> int:
        """E, flags a head."""
        return self.key.shape[1]

    def valid(self) -> torch.Tensor:
        """bool (H or 1, E), which flags of each head mean anything."""
        return (self.area > 0)[self.pattern]


def tile_table(blocks: BlockIndex) -> TileTable:
    """The table of a block index, on its device; made once."""
    return blocks.derived("tile table", _table)


def _table(blocks: BlockIndex) -> TileTable:
    host = blocks.to("cpu")
    patterns, tiles = host.num_patterns, host.num_tiles
    row_ptr = host.row_ptr.long()
    row = host.rows
    order = (row * tiles + host.cols).argsort()
    key, mask_ids = host.cols.long()[order], host.mask_ids.long()[order]
    sizes = host.sizes
    area = sizes[row % tiles] * sizes[key]
    partial = mask_ids >= 0
    area[partial] = host.masks.sum((1, 2))[mask_ids[partial]]
    first = row_ptr[::tiles]  # (P + 1,), where each pattern's pairs begin
    length = int(first.diff().max())

    def padded(values: torch.Tensor, fill: int) -> torch.Tensor:
        out = values.new_full((patterns, length), fill)
        for p, (a, b) in enumerate(zip(first[:-1].tolist(), first[1:].tolist(), strict=True)):
            out[p, : b - a] = values[a:b]
        return out.to(blocks.device)

    within = torch.stack(
        [row_ptr[p * tiles : (p + 1) * tiles + 1] - first[p] for p in range(patterns)]
    )
    heads = torch.zeros(1, dtype=torch.int64) if host.head_pattern is None else host.head_pattern
    return TileTable(
        padded(row % tiles, 0), padded(key, 0), padded(mask_ids, -1), padded(area, 0),
        within.int().to(blocks.device), heads.long().to(blocks.device),
    )  # fmt: skip


def pack(flags: torch.Tensor) -> torch.Tensor:
    """bool (..., E) -> uint8 (..., ⌈E / 8⌉), the first flag in the lowest bit."""
    short = -flags.shape[-1] % 8
    flags = torch.nn.functional.pad(flags.to(torch.uint8), (0, short))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=flags.device)
    return (flags.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def unpack(bits: torch.Tensor, length: int) -> torch.Tensor:
    """uint8 (..., n) -> bool (..., length), the inverse of `pack`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[..., None] >> shifts) & 1).bool().flatten(-2)[..., :length]


def kept(blocks: BlockIndex, active: torch.Tensor) -> torch.Tensor:
    """The fraction of all query-key pairs that active tiles hold, exactly.

    Args:
        blocks: the index, over S tokens.
        active: bool (B, H, E).

    Returns:
        A number on the device of the flags, so that nothing waits for it.
    """
    table = tile_table(blocks)
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
        backend: as in `block_sparse_attention`; "triton" computes no gradients.

    Returns:
        The output (B, S, H, D), 0 for queries that see nothing, and bool (B, H, E), the active
        tiles that were hit, or None.
    """
    table = tile_table(blocks)
    valid = table.valid().expand(q.shape[0], q.shape[2], -1)
    active = valid if active is None else active & valid
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    used = choose_backend(q, k, v, blocks, backend)
    if used == "triton":
        from diffpatch.kernels.active_tiles.triton_impl import attend as run
    elif used == "torch":
        from diffpatch.kernels.active_tiles.torch_impl import attend as run
    else:
        from diffpatch.kernels.active_tiles.reference import attend as run
    return run(q, k, v, blocks, active, scale, key_mask, threshold, reverse)


def choose_backend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: BlockIndex, backend: str
) -> str:
    """The backend that a call runs on, one of `BACKENDS` but "auto".

    Raises:
        BackendUnavailable: the backend asked for cannot run here; the message says why.
    """
    return backends.choose_backend(backends.ACTIVE_TILES, backend, blocks, q, k, v)
