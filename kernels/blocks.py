"""The tensors that tell a block-sparse kernel what to visit: tiles, key lists, masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class BlockIndex:
    """Which key tiles each query tile visits, as plain tensors on one device.

    The sequence is cut into N tiles of at most T tokens; queries and keys share the tiling. Tiles are
    numbered in *tile order*, an order of the tokens in which every tile is contiguous.

    Attributes:
        order: int64 (S,), the sequence index of the token at each place of tile order.
        starts: int32 (N + 1,), the first place (in tile order) of each tile; the last entry is S.
        row_ptr: int32 (P * N + 1,), where each row's key tiles begin in `cols`. Row ``p * N + i`` is
            query tile i under pattern p; P patterns let heads differ.
        full_end: int32 (P * N,), where the row's full tiles end and its partial ones begin, with
            ``row_ptr[r] <= full_end[r] <= row_ptr[r + 1]``.
        cols: int32 (nnz,), key tile numbers: ascending full tiles, then ascending partial tiles.
        mask_ids: int32 (nnz,), the row of `masks` that a partial tile uses, -1 for a full tile.
        masks: bool (M, T, T), deduplicated element masks [query in tile, key in tile]; entries past the
            size of an edge tile are False. M may be 0.
        head_pattern: int32 (H,), the pattern of each head, or None when P is 1.
    """

    order: torch.Tensor
    starts: torch.Tensor
    row_ptr: torch.Tensor
    full_end: torch.Tensor
    cols: torch.Tensor
    mask_ids: torch.Tensor
    masks: torch.Tensor
    head_pattern: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.order.shape[0]

    @property
    def num_tiles(self) -> int:
        return self.starts.shape[0] - 1

    @property
    def num_patterns(self) -> int:
        return self.full_end.shape[0] // self.num_tiles

    @property
    def max_tile(self) -> int:
        """T, the most tokens a tile holds."""
        return self.masks.shape[-1]

    def to(self, device: torch.device | str) -> BlockIndex:
        """The same index on another device."""
        moved = {
            name: None if value is None else value.to(device) for name, value in vars(self).items()
        }
        return BlockIndex(**moved)
