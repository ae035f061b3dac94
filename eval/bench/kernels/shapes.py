"""The attention calls of known models that the kernels are measured at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import diffpatch

KEPT = (0.5, 0.25, 0.1, 0.05)  # on GPUs, besides the window of each shape


@dataclass(frozen=True)
class Shape:
    """An attention call of a known model, and what to attend to.

    Attributes:
        grid: the tokens.
        heads: of the call.
        head_dim: channels of a head.
        method: the window to measure.
        last: measured after everything else, with this window only.
    """

    grid: diffpatch.TokenGrid
    heads: int
    head_dim: int
    method: diffpatch.Method
    last: bool = False


def _shape(
    grid: tuple[int, int, int],
    heads: int,
    head_dim: int,
    window: tuple[float, float, float],
    stride: Literal["auto"] | tuple[int, int, int] = "auto",
    text: int = 0,
    last: bool = False,
) -> Shape:
    token_grid = diffpatch.TokenGrid(*grid, text_after=text)
    neighborhood = diffpatch.Neighborhood(window=window, stride=stride)
    return Shape(token_grid, heads, head_dim, neighborhood, last)


SHAPES = {
    # 9 % kept, the case that kernels for tiles are compared on (STA; GNA, arXiv 2504.16922).
    "hunyuan": _shape((30, 48, 80), 24, 128, (18, 24, 24), (16, 8, 8)),
    "wan-720p": _shape((21, 45, 80), 40, 128, (11, 23, 24)),
    "wan-480p": _shape((21, 30, 52), 12, 128, (11, 16, 24)),
    "flux-1k": _shape((1, 64, 64), 24, 128, (1, 32, 32), text=512),
    "flux-4k": _shape((1, 256, 256), 24, 128, (1, 80, 80), text=512),
    # What h3-sparse-attn was measured at: 64 of the blocks of 128 keys.
    "h3-38k": _shape((29, 26, 50), 24, 128, (0.6, 0.6, 0.6)),
    "h3-104k": _shape((80, 26, 50), 24, 128, (0.43, 0.43, 0.43)),
    # What NATTEN is known to do: windows of its papers, and ones that slide token by token.
    "hunyuan-sliding": _shape((30, 48, 80), 24, 128, (18, 24, 24), (1, 1, 1), last=True),
    "wan-720p-natten": _shape((21, 45, 80), 40, 128, (21, 24, 24), (1, 8, 8), last=True),
    "wan-720p-sliding": _shape((21, 45, 80), 40, 128, (13, 23, 40), (1, 1, 1), last=True),
    "wan-480p-natten": _shape((21, 30, 52), 12, 128, (12, 16, 24), (4, 8, 8), last=True),
    "flux-4k-natten": _shape((1, 256, 256), 24, 128, (1, 80, 80), (1, 16, 16), last=True),
    "flux-4k-sliding": _shape((1, 256, 256), 24, 128, (1, 80, 80), (1, 1, 1), last=True),
    # For CPUs: 16,384 tokens; windows that many queries share, lists of each tile's own, and a
    # window that slides token by token.
    "small-25%": _shape((16, 32, 32), 4, 64, (0.5, 0.5, 1.0)),
    "small-10%": _shape((16, 32, 32), 4, 64, (0.5, 0.5, 0.4)),
    "small-25%-d128": _shape((16, 32, 32), 4, 128, (0.5, 0.5, 1.0)),
    "small-10%-d128": _shape((16, 32, 32), 4, 128, (0.5, 0.5, 0.4)),
    "small-radial": Shape(diffpatch.TokenGrid(16, 32, 32), 4, 64, diffpatch.Radial()),
    "small-sliding": _shape((16, 32, 32), 4, 64, (9, 17, 17), (1, 1, 1)),
}
SMALL = tuple(name for name in SHAPES if name.startswith("small"))
LARGE = tuple(name for name in SHAPES if name not in SMALL)
