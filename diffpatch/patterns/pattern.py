"""Patterns: the key tiles that each query tile visits, and what counts in the partial ones."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import torch

from diffpatch import showing
from diffpatch.checking import Count, Natural, checked
from diffpatch.errors import BadParameter
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.memo import Memo
from diffpatch.patterns.grid import Grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class BlockPattern:
    """The pattern of one method on one grid.

    Attributes:
        grid: the grid it was made for.
        blocks: the tensors a kernel reads.
        kept: query-key pairs computed, as a fraction of all pairs; text included, mean over heads.
    """

    grid: Grid
    blocks: BlockIndex
    kept: float
    _memo: Memo = field(default_factory=Memo, init=False, repr=False)

    def __repr__(self) -> str:
        return f"BlockPattern({self.grid}: {self.blocks.num_tiles} tiles, {self.kept:.1%} kept)"

    def once(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """What follows from this pattern and a key, made once and kept as long as the pattern."""
        return self._memo(key, make)

    def for_heads(self, heads: int) -> BlockPattern:
        """The pattern with its groups of heads spread over all heads, in runs of equal length.

        Raises:
            BadParameter: the groups do not divide the heads.
        """
        groups = self.blocks.head_pattern
        if groups is None or len(groups) == heads:
            return self
        if heads % len(groups):
            raise BadParameter(
                f"{len(groups)} groups of heads do not divide the {heads} heads of the model:"
                " give as many settings as divide them"
            )

        def make() -> BlockPattern:
            each = groups.repeat_interleave(heads // len(groups))
            return BlockPattern(self.grid, replace(self.blocks, head_pattern=each), self.kept)

        return self.once(("groups of heads", heads), make)

    def on(self, device: torch.device) -> BlockIndex:
        """The blocks on a device, copied there once."""
        return self.once(device, lambda: self.blocks.to(device))

    def dense(self) -> torch.Tensor:
        """bool (P, S, S): the pattern as a dense mask in sequence order. For tests and small S."""
        from diffpatch.kernels.block_sparse.reference import dense_mask

        return dense_mask(self.blocks)

    def tile_map(self) -> torch.Tensor:
        """float (P, N, N): the kept fraction of every pair of tiles."""
        b = self.blocks
        out = torch.zeros(b.num_patterns * b.num_tiles, b.num_tiles, dtype=torch.float32)
        rows, sizes = b.rows, b.sizes.float()
        share = torch.ones(b.cols.shape[0], dtype=torch.float32)
        partial = b.mask_ids >= 0
        area = sizes[rows % b.num_tiles] * sizes[b.cols.long()]
        share[partial] = b.masks.sum((1, 2)).float()[b.mask_ids[partial].long()] / area[partial]
        out[rows, b.cols.long()] = share
        return out.view(b.num_patterns, b.num_tiles, b.num_tiles)

    def _repr_png_(self) -> bytes:
        return showing.png(self.draw())

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """The tile map as a plot, the mean over patterns of heads.

        Args:
            ax: where to; None makes a figure.

        Raises:
            DiffpatchError: matplotlib is not installed.
        """
        words = ("query tile", "key tile", "kept")
        figure, ax = showing.heat(ax, self.tile_map().mean(0).tolist(), repr(self), words)
        ax.set_aspect("equal")
        return figure, ax

    @checked()
    def draw(self, size: Count = 512, pattern: Natural = 0) -> Image.Image:
        """A picture of the tile map: rows are query tiles, columns key tiles, white is kept.

        Args:
            size: about so many pixels wide, and at least one for each tile.
            pattern: which, where groups of heads have patterns of their own.

        Raises:
            BadParameter: there is no such pattern.
        """
        from PIL import Image

        if pattern >= self.blocks.num_patterns:
            raise BadParameter(f"pattern={pattern} must be below {self.blocks.num_patterns}")

        grey = (self.tile_map()[pattern] * 255).round().to(torch.uint8)
        picture = Image.fromarray(grey.numpy())
        scale = max(1, size // grey.shape[0])
        return picture.resize((grey.shape[0] * scale,) * 2, Image.Resampling.NEAREST)
