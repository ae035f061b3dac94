"""The method `longer`: clips beyond the trained length, with the field of view of training."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch

from diffpatch.errors import BadParameter
from diffpatch.methods.base import Method, param
from diffpatch.methods.registry import register
from diffpatch.methods.slowing import CUT, Slowing
from diffpatch.patterns.build import from_axes
from diffpatch.patterns.grid import TokenGrid
from diffpatch.patterns.pattern import BlockPattern
from diffpatch.patterns.tiles import Tiling, choose_tile

UNKNOWN = (
    "longer: trained=None, and how many latent frames the model was trained at is not known: pass"
    " trained=21, for example"
)
ADVICE = "pass riflex=False"


@register
@dataclass(frozen=True)
class Longer(Method):
    """Clips longer than the model was trained for, at a cost that grows with their length.

    A query sees, whole, the frames near its own, the first frames of the clip, and keyframes at
    equal distances. Together they are about as many frames as in training, so attention stays as
    sharp as the model expects. The keyframes move on by one frame with every denoising step, so in
    the course of a run all frames meet. Clips up to `trained` × `scale` frames stay dense.

    With `riflex`, one temporal frequency of the rotary embedding is slowed down until its period
    spans the clip: the one with the shortest period that a clip of the trained length does not
    pass. Without that, models repeat themselves after the length that they know.
    """

    name = "longer"
    summary = "near frames, first frames and moving keyframes, for clips beyond the trained length"
    source = "LVSA's frames (vLLM-Omni); RIFLEx, arXiv 2502.15894"
    kinds = ("video",)
    default_dense_steps = 0
    kept_parameters = ("scale", "window", "first")

    trained: int | None = param(
        None, "latent frames that the model was trained at; None takes the family's"
    )
    window: int = param(4, "frames on each side that a query sees")
    first: int = param(1, "first frames that every query sees")
    scale: float = param(1.0, "frames that a query sees, as a multiple of the trained ones")
    riflex: bool = param(True, "slow one temporal frequency down, so that nothing repeats")

    def validate(self) -> None:
        if self.trained is not None:
            self.check(self.trained >= 1, "trained", "a count of latent frames, or None")
        self.check(self.window >= 0, "window", "a count of frames")
        self.check(self.first >= 0, "first", "a count of frames")
        self.check(0 < self.scale < math.inf, "scale", "a positive number")

    @property
    def slowing(self) -> Slowing | None:
        if self.trained is None or not self.riflex:
            return None
        return Slowing((self.trained, None, None), None, ADVICE)

    @property
    def why_one_process(self) -> str | None:
        return None if self.slowing is None else f"{CUT}: {ADVICE}"

    def variant(self, layer: int, step: int) -> int:
        """The step, by which the keyframes have moved."""
        return step

    def pattern(self, grid: TokenGrid, variant: Hashable = 0) -> BlockPattern:
        assert isinstance(variant, int)
        frames = self.visible_frames(grid.num_frames, variant)
        tile = choose_tile((1, grid.height, grid.width))
        rules = [frames, *(torch.ones(n, n, dtype=torch.bool) for n in grid.shape[1:])]
        return from_axes(grid, Tiling.even(grid, tile), [rules])

    def why_whole(self, grid: TokenGrid) -> str:
        return (
            f"{grid.num_frames} frames are no longer than the {self.trained} of training"
            if self.trained is not None and grid.num_frames <= self.trained
            else super().why_whole(grid)
        )

    def for_model(
        self, num_frames: int | None, size: tuple[int, int] | None, cross_attention: bool
    ) -> Longer:
        if self.trained is not None:
            return self
        if num_frames is None:
            raise BadParameter(UNKNOWN)
        return replace(self, trained=num_frames)

    def visible_frames(self, num_frames: int, step: int) -> torch.Tensor:
        """bool (T, T): which frames [query frame, key frame] see each other in a step.

        Raises:
            BadParameter: the trained length is not known, or less is asked for than it has.
        """
        if self.trained is None:
            raise BadParameter(UNKNOWN)
        seen = self.trained * self.scale
        if self.first > num_frames:
            raise BadParameter(
                f"longer: first={self.first} frames, but the clip has {num_frames}: lower first"
            )
        if num_frames <= seen:
            return torch.ones(num_frames, num_frames, dtype=torch.bool)
        wanted = max(self.first, math.floor(seen) - (2 * self.window + 1))
        interval = keyframe_interval(num_frames, wanted, self.first)
        always = keyframes(num_frames, interval, step) | set(range(self.first))
        rows = [_seen_from(f, num_frames, always, self.window) for f in range(num_frames)]
        return torch.stack(rows)


def keyframes(num_frames: int, interval: int, offset: int) -> set[int]:
    """Every `interval`-th frame, moved on by `offset`, around the end of the clip to its start."""
    count = math.ceil(num_frames / interval)
    return {(offset + i * interval) % num_frames for i in range(count)}


def keyframe_interval(num_frames: int, wanted: int, first: int) -> int:
    """The largest distance of keyframes that gives `wanted` frames with the first ones included.

    1 where even all frames are not enough.
    """
    for interval in range(num_frames, 1, -1):
        if len(keyframes(num_frames, interval, 0) | set(range(first))) >= wanted:
            return interval
    return 1


def _seen_from(frame: int, num_frames: int, always: set[int], window: int) -> torch.Tensor:
    """bool (T,): the frames that everybody sees, and the 2·window + 1 nearest of the others.

    Counting only the others keeps the number of frames the same at the edges of the clip and near
    keyframes; of two that are equally near, the earlier one counts as nearer.
    """
    others = sorted((f for f in range(num_frames) if f not in always), key=lambda f: abs(f - frame))
    seen = torch.zeros(num_frames, dtype=torch.bool)
    seen[sorted({frame} | always | set(others[: 2 * window + 1]))] = True
    return seen
