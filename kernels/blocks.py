"""The tensors that tell a block-sparse kernel what to visit: tiles, key lists, masks."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch

from diffpatch.kernels.memo import Memo

Value = TypeVar("Value")

NOTHING, EVERYTHING = -2, -1  # in tables of mask ids, beside rows of `masks`


@dataclass(frozen=True, eq=False)
class BlockIndex:
    """Which key tiles each query tile visits, as plain tensors on one device.

    The sequence is cut into N tiles of at most T tokens; queries and keys share the tiling. Tiles
    are numbered in *tile order*, an order of the tokens in which every tile is contiguous.

    Attributes:
        order: int64 (S,), the sequence index of the token at each place of tile order.
        starts: int32 (N + 1,), the first place (in tile order) of each tile; the last entry is S.
        row_ptr: int32 (P * N + 1,), where each row's key tiles begin in `cols`. Row ``p * N + i``
            is query tile i under pattern p; P patterns let heads differ.
        full_end: int32 (P * N,), where the row's full tiles end and its partial ones begin, with
            ``row_ptr[r] <= full_end[r] <= row_ptr[r + 1]``.
        cols: int32 (nnz,), key tile numbers: ascending full tiles, then ascending partial tiles.
        mask_ids: int32 (nnz,), the row of `masks` that a partial tile uses, -1 for a full tile.
        masks: bool (M, T, T), deduplicated element masks [query in tile, key in tile]; entries past
            the size of an edge tile are False. M may be 0.
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
    _memo: Memo = field(default_factory=Memo, init=False, repr=False)

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

    @property
    def sizes(self) -> torch.Tensor:
        """int64 (N,), the tokens of each tile."""
        return self.starts.long().diff()

    @property
    def rows(self) -> torch.Tensor:
        """int64 (nnz,), the row of every entry of `cols`: ``p * N + i`` for query tile i."""
        row = torch.arange(self.full_end.shape[0], device=self.device)
        return row.repeat_interleave(self.row_ptr.long().diff(), output_size=self.cols.shape[0])

    @property
    def tile_of_place(self) -> torch.Tensor:
        """int64 (S,), the tile that each place of tile order lies in."""
        tile = torch.arange(self.num_tiles, device=self.device)
        return tile.repeat_interleave(self.sizes, output_size=self.num_tokens)

    @property
    def place(self) -> torch.Tensor:
        """int64 (S,), where each token of the sequence stands in tile order; made once."""
        return self.derived("place", lambda index: index.order.argsort())

    @property
    def share(self) -> torch.Tensor:
        """fp64 (P,) on the CPU, the share of the heads that follow each pattern."""
        if self.head_pattern is None:
            return torch.full((self.num_patterns,), 1.0 / self.num_patterns, dtype=torch.float64)
        count = self.head_pattern.cpu().long().bincount(minlength=self.num_patterns).double()
        return count / count.sum()

    def mask_table(self) -> torch.Tensor:
        """bool (M + 2, T, T), `masks`, then one of nothing and one of everything.

        So that mask ids and ``NOTHING`` (-2) and ``EVERYTHING`` (-1) all name a row of it.
        """
        nothing = self.masks.new_zeros(1, self.max_tile, self.max_tile)
        return torch.cat([self.masks, nothing, ~nothing])

    def mask_map(self) -> torch.Tensor:
        """int64 (P, N, N) [query tile, key tile], the row of `mask_table` of every pair of tiles.

        Pairs that no row lists are ``NOTHING``.
        """
        ids = torch.full((self.full_end.shape[0], self.num_tiles), NOTHING, device=self.device)
        ids[self.rows, self.cols.long()] = self.mask_ids.long()
        return ids.view(self.num_patterns, self.num_tiles, self.num_tiles)

    @property
    def device(self) -> torch.device:
        return self.order.device

    def to(self, device: torch.device | str) -> BlockIndex:
        """The same index on another device; itself, with all it has cached, if already there."""
        if self.order.device == torch.empty(0, device=device).device:
            return self
        moved: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        for name, value in moved.items():
            moved[name] = None if value is None else value.to(device)
        return BlockIndex(**moved)

    def derived(self, key: Hashable, build: Callable[[BlockIndex], Value]) -> Value:
        """What `build` makes of this index, made once per `key` and kept as long as the index.

        Kernels keep their plans and repacked masks here, so that a call reads nothing back from the
        device (see `Memo`).
        """
        return self._memo(key, lambda: build(self))

    def validate(self) -> None:
        """Check every promise above, once per index (later calls are free).

        Raises:
            ValueError: what is wrong, with the value found and the one expected.
        """
        self.derived("validated", _validate)


def _require(ok: bool | torch.Tensor, message: str) -> None:
    if not bool(ok):
        raise ValueError(f"BlockIndex: {message}; build it again from its pattern.")


def _validate(blocks: BlockIndex) -> bool:
    _validate_shapes(blocks)
    host = blocks.to("cpu")
    _validate_tiles(host)
    _validate_rows(host)
    return True


def _validate_shapes(blocks: BlockIndex) -> None:
    integers = ("starts", "row_ptr", "full_end", "cols", "mask_ids", "head_pattern")
    expected = dict.fromkeys(integers, (torch.int32, 1)) | {
        "order": (torch.int64, 1),
        "masks": (torch.bool, 3),
    }
    for name, (dtype, ndim) in expected.items():
        value = getattr(blocks, name)
        if value is None and name == "head_pattern":
            continue
        _require(
            value.dtype == dtype and value.ndim == ndim and value.device == blocks.device,
            f"{name} is {value.dtype} with {value.ndim} dimension(s) on {value.device}, "
            f"expected {dtype} with {ndim} on {blocks.device}",
        )
    tiles, rows = blocks.num_tiles, blocks.full_end.shape[0]
    _require(tiles >= 1, f"starts has {tiles + 1} entries, expected one more than there are tiles")
    _require(
        rows >= tiles and rows % tiles == 0,
        f"full_end has {rows} rows, expected a multiple of the {tiles} tiles",
    )
    _require(
        blocks.row_ptr.shape[0] == rows + 1,
        f"row_ptr has {blocks.row_ptr.shape[0]} entries, expected {rows + 1}",
    )
    _require(
        blocks.cols.shape == blocks.mask_ids.shape,
        f"cols has {blocks.cols.shape[0]} entries and mask_ids {blocks.mask_ids.shape[0]}",
    )
    _require(
        blocks.masks.shape[1] == blocks.masks.shape[2] > 0,
        f"masks has shape {tuple(blocks.masks.shape)}, expected (M, T, T)",
    )
    _require(
        blocks.num_patterns == 1 or blocks.head_pattern is not None,
        f"{blocks.num_patterns} patterns but head_pattern is None",
    )


def _validate_tiles(blocks: BlockIndex) -> None:
    tokens = blocks.num_tokens
    _require(
        torch.equal(blocks.order.sort().values, torch.arange(tokens)),
        f"order is not a permutation of 0..{tokens - 1}",
    )
    sizes = blocks.sizes
    _require(
        blocks.starts[0] == 0 and blocks.starts[-1] == tokens,
        f"starts runs from {int(blocks.starts[0])} to {int(blocks.starts[-1])}, "
        f"expected 0 to {tokens}",
    )
    _require(
        (sizes > 0).all() and (sizes <= blocks.max_tile).all(),
        f"tiles hold {int(sizes.min())} to {int(sizes.max())} tokens, "
        f"expected 1 to {blocks.max_tile} (T of masks)",
    )
    if blocks.head_pattern is not None:
        low, high = blocks.head_pattern.aminmax()
        _require(
            low >= 0 and high < blocks.num_patterns,
            f"head_pattern holds {int(low)} to {int(high)}, "
            f"expected 0 to {blocks.num_patterns - 1}",
        )


def _validate_rows(blocks: BlockIndex) -> None:
    row_ptr, full_end, cols = blocks.row_ptr.long(), blocks.full_end.long(), blocks.cols.long()
    _require(
        row_ptr[0] == 0 and row_ptr[-1] == cols.shape[0] and (row_ptr.diff() >= 0).all(),
        f"row_ptr must rise from 0 to the {cols.shape[0]} entries of cols",
    )
    _require(
        (full_end >= row_ptr[:-1]).all() and (full_end <= row_ptr[1:]).all(),
        "full_end must lie between the row's first entry and its last",
    )
    if not cols.shape[0]:
        return
    tiles = blocks.num_tiles
    _require(
        cols.min() >= 0 and cols.max() < tiles,
        f"cols holds {int(cols.min())} to {int(cols.max())}, expected 0 to {tiles - 1}",
    )
    row = blocks.rows
    partial = torch.arange(cols.shape[0]) >= full_end[row]
    _require(
        ((row * 2 + partial) * tiles + cols).diff().gt(0).all()
        and (row * tiles + cols).unique().shape[0] == cols.shape[0],
        "a row lists a key tile twice or out of order (ascending full, then ascending partial)",
    )
    mask_ids = blocks.mask_ids.long()
    _require(
        ((mask_ids >= 0) == partial).all() and mask_ids.max() < blocks.masks.shape[0],
        f"mask_ids must be -1 for full tiles and 0 to {blocks.masks.shape[0] - 1} for partial ones",
    )
    sizes, used = blocks.sizes, mask_ids[partial]
    for axis, tile in ((2, (row % tiles)[partial]), (1, cols[partial])):
        seen = blocks.masks.any(axis)  # (M, T): does the query (then the key) take part?
        extent = (seen * torch.arange(1, blocks.max_tile + 1)).amax(1)
        _require((extent[used] <= sizes[tile]).all(), "a mask is True past the end of an edge tile")
