"""Neighborhood attention: every query sees the keys around it (GNA, of which STA is a case)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

from diffpatch.errors import BadParameter
from diffpatch.grid import TokenGrid
from diffpatch.methods import axis
from diffpatch.methods.base import Method, param, register
from diffpatch.pattern import BlockPattern, from_axes
from diffpatch.tiles import Tiling, choose_tile, even_cuts, refine, step_cuts

GROUP = (
    512  # query tokens that share a window under stride="auto": what CPUs want, and no loss on GPUs
)


@register
@dataclass(frozen=True)
class Neighborhood(Method):
    """Generalized Neighborhood Attention on a (time, height, width) grid.

    Sizes are one number for all axes or three: ints are tokens, floats fractions of the axis, -1
    the whole axis. With ``stride="auto"`` neighbouring queries share a window in boxes of about 512
    tokens, and windows given as fractions are rounded to whole tiles where that changes them by
    less than 15 %, so that most visited tiles are full; ``stride=1`` is sliding-window attention to
    the token; stride = window is blocked attention.
    """

    name = "neighborhood"
    summary = "every token sees a window around it, shifted inwards at the edges"
    source = "GNA, arXiv 2504.16922; NATTEN; sliding tiles: STA, arXiv 2502.04507"
    default_dense_steps = 0.25
    size_parameters = ("window",)

    window: axis.Size | tuple[axis.Size, ...] = param(
        0.6, "keys along each axis: int, fraction, or -1 for all"
    )
    stride: str | int | tuple[int, ...] = param("auto", "queries that share a window, or 'auto'")
    dilation: int | tuple[int, ...] = param(1, "distance between the keys of a window")
    causal: bool | tuple[bool, ...] = param(False, "see only earlier positions, per axis")

    def __post_init__(self) -> None:
        axis.triple(self.window)
        _ints(self.dilation, "dilation")
        self.check(
            self.stride == "auto" or not isinstance(self.stride, str), "stride", "'auto' or ints"
        )

    def sized(self, amount: float, kind: str = "video") -> Neighborhood:
        if kind == "image":
            return replace(self, window=(-1, amount ** (1 / 2), amount ** (1 / 2)))
        return replace(self, window=amount ** (1 / 3))

    def pattern(self, grid: TokenGrid, variant: Hashable = None) -> BlockPattern:
        names = ("time", "height", "width")
        windows = [
            axis.resolve(size, length, f"window along {name}")
            for size, length, name in zip(axis.triple(self.window), grid.shape, names, strict=True)
        ]
        dilations = _ints(self.dilation, "dilation")
        causal = self.causal if isinstance(self.causal, tuple) else (self.causal,) * 3
        if self.stride == "auto":
            strides = choose_tile(grid.shape, GROUP, [-(-n // 2) for n in grid.shape])
            tile = choose_tile(strides)
            sizes = axis.triple(self.window)
            for i, (size, length) in enumerate(zip(sizes, grid.shape, strict=True)):
                if isinstance(size, float):
                    windows[i] = _whole_tiles(windows[i], length, strides[i], tile[i])
        else:
            strides, tile = _ints(self.stride, "stride"), choose_tile(grid.shape)
        # A window over the whole axis needs no stride, and a stride cannot exceed its window.
        auto = self.stride == "auto"
        strides = axis.each(
            min(s, w) if auto or w == n else s
            for s, w, n in zip(strides, windows, grid.shape, strict=True)
        )
        t, h, w = (
            refine(step_cuts(n, s), size) if s > 1 else even_cuts(n, size)
            for n, s, size in zip(grid.shape, strides, tile, strict=True)
        )
        rules = [
            axis.neighborhood(*args)
            for args in zip(grid.shape, windows, strides, dilations, causal, strict=True)
        ]
        return from_axes(grid, Tiling(grid, (t, h, w)), [rules])


def _ints(value: object, what: str) -> tuple[int, int, int]:
    values = value if isinstance(value, tuple) else (value,) * 3
    if len(values) != 3 or not all(isinstance(v, int) and v >= 1 for v in values):
        raise BadParameter(f"neighborhood: {what}={value!r} must be one positive int or three")
    return values


def _whole_tiles(window: int, length: int, stride: int, tile: int) -> int:
    """The window nearest to the wanted one that covers its stride and whole tiles on both sides."""
    side = min(tile, stride)
    more = max(0, round((window - stride) / (2 * side)))
    rounded = min(length, stride + 2 * side * more)
    return rounded if abs(rounded - window) < 0.15 * window else window
