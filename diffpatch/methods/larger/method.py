"""The method `larger`: frames beyond the trained size, with the field of view of training."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from diffpatch.errors import BadParameter
from diffpatch.kernels.block_sparse.api import work_of
from diffpatch.kernels.block_sparse.work import Work
from diffpatch.methods.base import Attended, AttentionCall, Method, param
from diffpatch.methods.larger import focus
from diffpatch.methods.neighborhood import Neighborhood, entropy_scale
from diffpatch.methods.registry import register
from diffpatch.methods.slowing import CUT, Slowing, sharpened
from diffpatch.methods.window import partitioned
from diffpatch.patterns.grid import TokenGrid
from diffpatch.patterns.pattern import BlockPattern
from diffpatch.patterns.tiles import equal_cuts

UNKNOWN = (
    "larger: trained=None, and which frame size the model was trained at is not known: pass"
    " trained=(30, 52), for example, the rows and columns of tokens"
)

USUAL_GUIDE = 2  # steps, as in FreeSwim's code


@register
@dataclass(frozen=True)
class Larger(Method):
    """Frames larger than the model was trained for, at a cost that grows with their area.

    A query sees, in all frames, a window of the trained size around it, shifted inwards at the
    edges, so that attention spans as much of the picture as in training and objects keep their
    scale. The softmax is sharpened a little. Frames up to the trained size stay dense.

    Windows alone know nothing of the whole picture. So in models with cross-attention every
    `guide`-th step begins with one more forward, with full attention, and what its cross-attention
    gives takes the place of that of the windows until the next such step. Held meanwhile: a tensor
    of all tokens for every layer. Forwards that diffusers calls "uncond" are not guided. Models
    that read their text in self-attention have no such branch.

    (HiDiffusion's RAU-Net, made for the same, resizes the feature maps of a U-Net, which diffusion
    transformers do not have; its windows are those of the method `window` with ``shift="random"``.)

    With ``shape="count"`` the windows do not slide: frames are cut into K × K of them in every
    other layer and (K + 1) × (K + 1) in the others, K being the fewest that are no larger than in
    training. UltraGen trains its models for that; here nothing is trained.

    UltraImage, for pictures, lets everything see everything, ``shape="whole"``, and mends what that
    breaks; its parts work with windows as well. `slowed` frequencies of the rotary embedding, along
    rows and columns, turn so slowly that one period spans the picture: without that, models repeat
    themselves after the size that they know (its authors slow down 1 for Flux, 2 for Qwen-Image).
    `focus` sharpens the softmax of every head by how local it is, as the first sparse step shows
    it, the most local one by that factor (its authors': 1.3).
    """

    name = "larger"
    summary = "windows of the trained size in all frames, for frames beyond it, with a guide branch"
    source = (
        "FreeSwim, arXiv 2511.14712; shape='count': UltraGen, arXiv 2510.18775; slowed, focus:"
        " UltraImage, arXiv 2512.04504"
    )
    default_dense_steps = 0
    kept_parameters = ("scale",)

    trained: tuple[int, int] | None = param(
        None, "rows and columns of tokens that the model was trained at; None takes the family's"
    )
    scale: float = param(1.0, "side of the window, as a multiple of the trained size")
    shape: Literal["inward", "count", "whole"] = param(
        "inward", "of what is seen: inward (windows that slide), count (that do not), whole"
    )
    stride: Literal["auto"] | int = param(1, "queries that share a sliding window, or 'auto'")
    sharpen: float | None = param(
        None, "factor on the scale of the softmax; None is FreeSwim's, a little above 1, in windows"
    )
    slowed: int = param(0, "frequencies of the rotary embedding, along each axis, that turn slowly")
    focus: float = param(
        1.0, "sharpens local heads: factor on the softmax scale of the most local one"
    )
    guide: int | None = param(
        None, "steps between guide forwards; 0 for none, None is 2 where there is cross-attention"
    )

    def validate(self) -> None:
        if self.trained is not None:
            self.check(min(self.trained) >= 2, "trained", "rows and columns of tokens, or None")
        self.check(0 < self.scale < math.inf, "scale", "a positive number")
        self.check(self.stride == "auto" or int(self.stride) >= 1, "stride", "'auto' or positive")
        good = self.sharpen is None or 0 < self.sharpen < math.inf
        self.check(good, "sharpen", "a positive number, or None")
        self.check(self.guide is None or self.guide >= 0, "guide", "a count of steps, or None")
        self.check(self.slowed >= 0, "slowed", "a count of frequencies")
        self.check(1 <= self.focus < math.inf, "focus", "a number from 1, which changes nothing")
        if self.shape == "whole":
            self.check(not self.guide, "guide", "None with shape='whole', where all is seen anyway")

    @property
    def only_skips(self) -> bool:
        return self.focus == 1

    @property
    def needs_steps(self) -> bool:
        return bool(self.guide) or self.focus > 1

    @property
    def state_advice(self) -> str:
        return "pass guide=0"

    @property
    def slowing(self) -> Slowing | None:
        if self.trained is None or not self.slowed:
            return None
        return Slowing((None, *self.trained), self.slowed, "pass slowed=0")

    @property
    def why_one_process(self) -> str | None:
        if self.focus > 1:
            return "focus compares all heads, of which a process has a part: pass focus=1"
        return f"{CUT}: pass slowed=0" if self.slowed else None

    def guide_every(self, grid: TokenGrid | None = None) -> int:
        return 0 if grid is not None and self._is_whole(grid) else self.guide or 0

    def variant(self, layer: int, step: int) -> int:
        """Windows that the layer has more than the fewest, along each axis."""
        return layer % 2 if self.shape == "count" else 0

    def pattern(self, grid: TokenGrid, variant: Hashable = 0) -> BlockPattern:
        if self.shape == "whole":
            return Neighborhood(window=(-1, -1, -1)).pattern(grid)
        if self.shape == "count":
            assert isinstance(variant, int)
            counts = zip(grid.shape[1:], self._counts(grid, variant), strict=True)
            cuts = [equal_cuts(length, count) for length, count in counts]
            return partitioned(grid, [[(0, grid.num_frames), *cuts]])
        window = self._window(grid)
        return Neighborhood(window=(-1, *window), stride=self.stride).pattern(grid)

    def for_model(
        self, num_frames: int | None, size: tuple[int, int] | None, cross_attention: bool
    ) -> Larger:
        if self.trained is None and size is None:
            raise BadParameter(UNKNOWN)
        guide = self.guide
        if guide is None:
            guide = USUAL_GUIDE if cross_attention and self.shape != "whole" else 0
        return replace(self, trained=self.trained or size, guide=guide)

    def softmax_factor(self) -> float:
        if self.sharpen is not None:
            return self.sharpen
        if self.shape == "whole":
            return 1.0
        tokens = math.prod(self._trained())
        return entropy_scale(2 * tokens, tokens)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall
    ) -> Attended:
        if self.focus > 1:
            scale = sharpened(call.scale, self.softmax_factor(), q.shape[-1])
            factor = focus.factor_of(
                q, k, self.focus, call.common(), layer=call.layer, step=call.step, scale=scale,
                key_mask=call.key_mask,
            )  # fmt: skip
            if factor is not None:
                q = q * factor.to(q.dtype)[:, None, :, None]
        return super().attend(q, k, v, call)

    def work(self, pattern: BlockPattern, age: int, backend: str) -> Work | None:
        return work_of(pattern.blocks, backend)

    def changes_whole(self, grid: TokenGrid) -> bool:
        changes = self.focus > 1 or self.softmax_factor() != 1
        return self.shape == "whole" and changes and not self._is_whole(grid)

    def why_whole(self, grid: TokenGrid) -> str:
        height, width = self._trained()
        if self.shape == "whole" and not self._is_whole(grid):
            return "shape='whole' leaves nothing out"
        return (
            f"a window of the trained {height}×{width} tokens holds all {grid.height}×{grid.width}"
            " of a frame"
        )

    def _trained(self) -> tuple[int, int]:
        if self.trained is None:
            raise BadParameter(UNKNOWN)
        return self.trained

    def _window(self, grid: TokenGrid) -> tuple[int, int]:
        """Rows and columns of a window; -1 for all of an axis."""
        height, width = (
            self._along(length, trained)
            for length, trained in zip(grid.shape[1:], self._trained(), strict=True)
        )
        return height, width

    def _is_whole(self, grid: TokenGrid) -> bool:
        """Whether a grid is no larger than what is seen."""
        if self.shape == "whole":
            pairs = zip(grid.shape[1:], self._trained(), strict=True)
            return all(length <= trained for length, trained in pairs)
        if self.shape == "count":
            return max(self._counts(grid, 0)) == 1
        return self._window(grid) == (-1, -1)

    def _counts(self, grid: TokenGrid, more: int) -> list[int]:
        """Windows along height and width: the fewest as small as in training, and `more`."""
        counts = []
        for length, trained in zip(grid.shape[1:], self._trained(), strict=True):
            fewest = math.ceil(length / max(1.0, trained * self.scale))
            counts.append(min(length, fewest + more) if fewest > 1 else 1)
        return counts

    def _along(self, length: int, trained: int) -> int:
        if length <= trained * max(1.0, self.scale):
            return -1
        side = 2 * math.floor(trained * self.scale / 2) + 1
        return -1 if length <= side else side
