"""Neighborhood attention: every query sees the keys around it (GNA, with FreeSwim's variant)."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from diffpatch.checking import checked
from diffpatch.errors import BadParameter
from diffpatch.methods import axis
from diffpatch.methods.base import Method, param
from diffpatch.methods.registry import register
from diffpatch.methods.sizes import KEPT, check_kept
from diffpatch.patterns.build import from_axes
from diffpatch.patterns.grid import TokenGrid
from diffpatch.patterns.pattern import BlockPattern
from diffpatch.patterns.tiles import Cuts, Tiling, choose_tile, even_cuts, refine, step_cuts

# Query tokens that share a window under stride="auto": what CPUs want, and no loss on GPUs.
GROUP = 512
AXES = ("time", "height", "width")


@register
@dataclass(frozen=True)
class Neighborhood(Method):
    """Generalized Neighborhood Attention on a (time, height, width) grid.

    Sizes are one number for all axes, three, or two for (height, width) and all of time: ints are
    tokens, floats fractions of the axis, -1 the whole axis. ``stride=1`` is sliding-window
    attention to the token, and stride = window is blocked attention. With ``stride="auto"`` the
    queries of a box of about 512 tokens share a window; windows given as fractions are then rounded
    to whole tiles where that changes them by less than 15 %, so that most visited tiles are full.

    A window of w keys under dilation d spans w × d tokens. Counts must fit the axis; fractions and
    -1 take what fits. Along an axis of one token, such as time in images, no setting matters.

    `heads` and `layers` hold windows, or whole settings where more than the window differs::

        Neighborhood(heads=((-1, 0.3, 0.3), (0.3, -1, -1)))         # half of the heads each
        Neighborhood(layers=(0.3, Neighborhood(0.3, dilation=3)))   # in turn, as in DiNAT
    """

    name = "neighborhood"
    summary = "every token sees a window around it, shifted inwards at the edges"
    source = "GNA, arXiv 2504.16922; NATTEN; dilation by layer: DiNAT, arXiv 2209.15001"
    default_dense_steps = 0.25
    kept_parameters = ("kept", "window", "heads", "layers")

    window: axis.Sizes = param(0.6, "keys along each axis: int, fraction, or -1 for all")
    stride: Literal["auto"] | axis.Counts = param("auto", "queries that share a window, or 'auto'")
    dilation: axis.Counts = param(1, "distance between the keys of a window, in tokens")
    causal: axis.Flags = param(False, "see only earlier positions, per axis")
    heads: tuple[axis.Sizes | Neighborhood, ...] = param(
        (), "windows of equal groups of heads, instead of one window"
    )
    layers: tuple[axis.Sizes | Neighborhood, ...] = param(
        (), "windows of the layers, repeated over the depth, instead of one window"
    )
    sharpen: float = param(1.0, "factor on the scale of the softmax (see entropy_scale)")
    kept: float | None = KEPT

    def validate(self) -> None:
        self.check(axis.are_sizes(self.window), "window", axis.SIZES)
        for name in ("heads", "layers"):
            windows = [s for s in getattr(self, name) if not isinstance(s, Neighborhood)]
            good = all(map(axis.are_sizes, windows))
            self.check(good, name, f"made of windows, each {axis.SIZES}")
        self.check(min(axis.triple(self.dilation, 1)) >= 1, "dilation", "one positive int or three")
        strides = () if self.stride == "auto" else axis.triple(self.stride, 1)
        self.check(min(strides, default=1) >= 1, "stride", "'auto', one positive int or three")
        self.check(self.sharpen > 0, "sharpen", "positive")
        check_kept(self, (*self.heads, *self.layers))
        for setting in map(self._with, (*self.heads, *self.layers)):
            # The softmax is one for all heads and layers, and groups do not nest.
            plain = setting.sharpen == self.sharpen and not setting.layers
            if not plain or (setting.heads and self.heads):
                raise BadParameter(
                    f"neighborhood: {setting} cannot be the setting of some heads or layers:"
                    " layers may hold heads and nothing else nests; sharpen is one for all"
                )

    @classmethod
    def freeswim(cls, height: int, width: int) -> Neighborhood:
        """FreeSwim's inward window, for running a video model above its resolution.

        Every token sees all frames within the frame size that the model was made for, given in
        tokens (30×52 for Wan at 480×832): windows of 2·⌊height/2⌋ + 1 by 2·⌊width/2⌋ + 1, shifted
        inwards at the edges. The softmax is sharpened by sqrt(log(2·h·w) / log(h·w)), which for
        30×52 is the constant of its code, sqrt(log₁₅₆₀ 3120) (arXiv 2511.14712).
        """
        window = (-1, 2 * (height // 2) + 1, 2 * (width // 2) + 1)
        tokens = height * width
        return cls(window=window, stride=1, sharpen=entropy_scale(2 * tokens, tokens))

    def _with(self, item: axis.Sizes | Neighborhood) -> Neighborhood:
        """The whole setting that an item of `heads` or `layers` stands for."""
        if isinstance(item, Neighborhood):
            return item
        return replace(self, window=item, heads=(), layers=())

    def softmax_factor(self) -> float:
        return self.sharpen

    def with_kept(self, kept: float, kind: str = "video") -> Neighborhood:
        return replace(self, kept=kept, heads=(), layers=())

    def sized(self, grid: TokenGrid) -> Neighborhood:
        """This method with the windows that keep `kept` of the visual pairs of a grid."""
        assert self.kept is not None
        dilations, causal = axis.triple(self.dilation, 1), axis.triple(self.causal, False)
        strides, tile = self._strides(grid)
        shares = []
        for i, length in enumerate(grid.shape):
            place = i, length, dilations[i] if length > 1 else 1, strides[i], tile[i]
            # What fractions come to: windows of whole tiles, where they are near.
            sizes = {
                replace(self, window=size / length)._window(*place)
                for size in range(1, length + 1)
                if self.stride == "auto" or size >= min(strides[i], length)
            }
            # On a causal axis the first positions see less.
            shares.append({n: (n - causal[i] * n * (n - 1) / length / 2) / length for n in sizes})
        return replace(self, window=axis.box(shares, self.kept), kept=None)

    def variant(self, layer: int, step: int) -> Hashable:
        return layer % len(self.layers) if self.layers else None

    def pattern(self, grid: TokenGrid, variant: Hashable = None) -> BlockPattern:
        if self.kept is not None:
            return self.sized(grid).pattern(grid)
        setting = self
        if self.layers:
            assert isinstance(variant, int)
            setting = self._with(self.layers[variant])
        groups = [setting._with(item) for item in setting.heads] or [setting]
        cuts, rules = zip(*(group._axes(grid) for group in groups), strict=True)
        tiling = Tiling(grid, cuts[0])
        if len(set(cuts)) > 1:  # one tiling for all heads: no stride fits them all
            tiling = Tiling.even(grid, choose_tile(grid.shape))
        return from_axes(grid, tiling, rules, range(len(groups)) if len(groups) > 1 else None)

    def _axes(self, grid: TokenGrid) -> tuple[tuple[Cuts, Cuts, Cuts], list[torch.Tensor]]:
        """The best tiling and the rule of every axis, of one setting for all heads."""
        dilations, causal = axis.triple(self.dilation, 1), axis.triple(self.causal, False)
        strides, tile = self._strides(grid)
        cuts, rules = [], []
        for i, length in enumerate(grid.shape):
            dilation = dilations[i] if length > 1 else 1
            window = self._window(i, length, dilation, strides[i], tile[i])
            stride = self._stride(i, strides[i], window, whole=window == length // dilation)
            even = even_cuts(length, tile[i])
            cuts.append(refine(step_cuts(length, stride), tile[i]) if stride > 1 else even)
            rules.append(axis.neighborhood(length, window, stride, dilation, causal[i]))
        t, h, w = cuts
        return (t, h, w), rules

    def _strides(self, grid: TokenGrid) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Queries that share a window, and the tile of the kernel, along each axis."""
        if self.stride == "auto":
            strides = choose_tile(grid.shape, GROUP, [-(-n // 2) for n in grid.shape])
            return strides, choose_tile(strides)
        return axis.triple(self.stride, 1), choose_tile(grid.shape)

    def _window(self, i: int, length: int, dilation: int, stride: int, tile: int) -> int:
        """Keys along an axis."""
        size, most = axis.sizes(self.window)[i], length // dilation
        if most == 0:
            raise BadParameter(
                f"neighborhood: dilation={dilation} along {AXES[i]} exceeds the axis length"
                f" {length}; lower it"
            )
        window = axis.resolve(size, length, f"window along {AXES[i]}")
        if size == -1 or (isinstance(size, float) and window >= most):
            return most
        if isinstance(size, float):
            return _whole_tiles(window, most, stride, tile) if self.stride == "auto" else window
        if window > most:
            raise BadParameter(
                f"neighborhood: window={size} × dilation={dilation} along {AXES[i]} spans"
                f" {window * dilation} tokens and the axis has {length}: give a window of at most"
                f" {most}, a fraction such as 0.5, or a smaller dilation"
            )
        return window

    def _stride(self, i: int, stride: int, window: int, whole: bool) -> int:
        """Queries that share a window along an axis, where that is not a whole one."""
        if stride > window and not whole and self.stride != "auto":
            raise BadParameter(
                f"neighborhood: stride={stride} along {AXES[i]} must be between 1 and the window,"
                f" {window} there"
            )
        return min(stride, window)


@checked()
def entropy_scale(tokens: int, trained: int) -> float:
    """sqrt(log(tokens) / log(trained)), the factor on the softmax scale that keeps its entropy.

    Attention over more tokens than in training is flatter than the model expects, over fewer
    sharper; this factor evens it out (arXiv 2306.08645). For `Neighborhood.sharpen`.

    Args:
        tokens: keys that a query sees.
        trained: keys that a query saw in training.
    """
    if min(tokens, trained) < 2:
        raise BadParameter(f"tokens={tokens} and trained={trained} must both be at least 2")
    return math.sqrt(math.log(tokens) / math.log(trained))


def _whole_tiles(window: int, most: int, stride: int, tile: int) -> int:
    """The window nearest to the wanted one that covers its stride and whole tiles on both sides."""
    side = min(tile, stride)
    more = max(0, round((window - stride) / (2 * side)))
    rounded = min(most, stride + 2 * side * more)
    return rounded if abs(rounded - window) < 0.15 * window else window
