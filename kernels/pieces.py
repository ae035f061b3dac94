"""Tiles cut into pieces: neighbouring tokens that stand together in tile order."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffpatch.kernels.blocks import BlockIndex


@dataclass(frozen=True, eq=False)
class Pieces:
    """All tokens in consecutive pieces, in tile order, on the device of the blocks.

    Attributes:
        first: int32 (V + 1,), the first place (in tile order) of each piece; the last entry is S.
        tile: int64 (V,), the tile each piece lies in.
        whole: int64 (V,), the piece of the coarser cut it lies in; its tile where there is none.
        index: int64 (V, L), the tokens of each piece as sequence indices. Shorter pieces are filled
            up with any token.
        valid: bool (V, L), which of them are real.
        even: whether all of them are, so that pieces are the rows of a view.
        sizes: what `cut` was asked for.
    """

    first: torch.Tensor
    tile: torch.Tensor
    whole: torch.Tensor
    index: torch.Tensor
    valid: torch.Tensor
    even: bool
    sizes: tuple[int, int]

    def __len__(self) -> int:
        return self.tile.shape[0]

    @property
    def longest(self) -> int:
        """L, the most tokens in a piece."""
        return self.index.shape[1]


def cut(blocks: BlockIndex, size: int = 0, within: int = 0) -> Pieces:
    """Tiles cut into as few pieces of at most `size` tokens as can be, of about equal length.

    Args:
        blocks: the tiles.
        size: most tokens of a piece; 0 for whole tiles.
        within: cut into pieces of at most that many tokens first, and these into smaller ones, so
            that no piece crosses a border of the coarser cut; 0 for no coarser cut.

    Returns:
        The pieces, made once for each index.
    """
    return blocks.derived(("pieces", size, within), lambda b: _cut(b, size, within))


def gathered(x: torch.Tensor, pieces: Pieces) -> torch.Tensor:
    """(B, V, L, K, D): the tokens of every piece of (B, S, K, D), shorter ones filled up."""
    # (Indexing by the table itself would be several times slower on a CPU.)
    return x.index_select(1, pieces.index.flatten()).unflatten(1, pieces.index.shape)


def _cut(blocks: BlockIndex, size: int, within: int) -> Pieces:
    host = blocks.to("cpu")
    first, tile = host.starts.long(), torch.arange(host.num_tiles)
    whole = tile
    for most in (within, size):
        if most:
            first, whole = _split(first, most)
            tile = tile[whole]
    place = first[:-1, None] + torch.arange(int(first.diff().max()))
    valid = place < first[1:, None]
    index = host.order[place.clamp(max=host.num_tokens - 1)]
    on = blocks.device
    return Pieces(
        first.int().to(on), tile.to(on), whole.to(on), index.to(on), valid.to(on),
        even=bool(valid.all()), sizes=(size, within),
    )  # fmt: skip


def _split(first: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Borders of a finer cut, and for each of its pieces the old one it lies in."""
    sizes = first.diff()
    parts = -(-sizes // most)
    old = torch.arange(len(sizes)).repeat_interleave(parts)
    nth = torch.arange(len(old)) - (parts.cumsum(0) - parts)[old]
    begins = first[old] + sizes[old] * nth // parts[old]
    return torch.cat([begins, first[-1:]]), old
