"""What one case of the matrix of families says, and the ways in which latents are packed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from diffpatch import PackedGrid, TokenGrid
from tests.tiny import Tiny

Arguments = dict[str, Any]
# (arguments of a forward, frame, row, column) -> the same with that one patch changed
Touch = Callable[[Arguments, int, int, int], Arguments]


@dataclass(frozen=True)
class Case:
    """One tiny model.

    Attributes:
        build: makes it.
        transformer: its class in diffusers.
        layers: the paths of exactly those attention modules that are to be patched.
        grid: (num_frames, height, width).
        touch: changes one patch in the arguments of the transformer.
        before: always-visible tokens in front; None: all that are not visual.
        after: how many stand behind, over all calls.
        spans: of a sequence with several grids, all of it; `grid` is then the last of them.
        silent: how many of the tokens in front, or (negative) behind, have no queries.
    """

    build: Callable[[], Tiny]
    transformer: str
    layers: tuple[str, ...]
    grid: tuple[int, int, int]
    touch: Touch
    before: int | None = 0
    after: frozenset[int] = frozenset({0})
    spans: tuple[int | tuple[int, int, int], ...] = ()
    silent: int = 0

    def is_own(self, queries: int, keys: int) -> bool:
        """Whether a call over so many tokens is that of the grid."""
        if not self.silent:
            return queries == keys
        return keys - queries == abs(self.silent) and queries >= math.prod(self.grid)

    def asking(self, length: int) -> slice:
        """Those of so many tokens that have queries."""
        return slice(max(self.silent, 0), length + min(self.silent, 0))

    def origin(self, length: int) -> int:
        """Where the grid begins in a call over that many tokens."""
        grid = self.tokens(length)
        if isinstance(grid, TokenGrid):
            return grid.text_before
        return grid.starts[max(i for i, s in enumerate(grid.spans) if s == self.grid)]

    def tokens(self, length: int) -> TokenGrid | PackedGrid:
        """The grid of a call over that many tokens."""
        if self.spans:
            assert PackedGrid(self.spans).num_tokens == length
            return PackedGrid(self.spans)
        frames, height, width = self.grid
        rest = length - frames * height * width
        before = rest if self.before is None else self.before
        assert rest - before in self.after, f"{rest - before} tokens behind, not {self.after}"
        return TokenGrid(frames, height, width, before, rest - before)

    def missing(self) -> str | None:
        """Why the installed diffusers cannot run this case."""
        if hasattr(diffusers, self.transformer):
            return None
        return f"diffusers {diffusers.__version__} has no {self.transformer}"


def latents(axes: str, t: int = 1, p: int = 2) -> Touch:
    """For transformers that cut `hidden_states` into patches of t×p×p themselves."""

    def touch(args: Arguments, frame: int, row: int, column: int) -> Arguments:
        places = {"F": frame * t, "H": row * p, "W": column * p}
        index = tuple(places.get(axis, slice(None)) for axis in axes)
        changed = args["hidden_states"].clone()
        changed[index] += 1
        return args | {"hidden_states": changed}

    return touch


def packed(pipe: str, grid: tuple[int, int, int], before: int = 0) -> Touch:
    """For transformers that get tokens: the pipeline's own packing tells which one it is."""

    def touch(args: Arguments, frame: int, row: int, column: int) -> Arguments:
        pack = getattr(diffusers, pipe)._pack_latents
        frames, height, width = grid
        if pipe == "LTXPipeline":
            video = torch.zeros(1, 1, frames, height, width)
            video[:, :, frame, row, column] = 1
            tokens = pack(video, 1, 1)
        elif pipe == "Flux2Pipeline":
            picture = torch.zeros(1, 1, height, width)
            picture[:, :, row, column] = 1
            tokens = pack(picture)
        else:
            picture = torch.zeros(1, 1, 2 * height, 2 * width)
            picture[:, :, 2 * row, 2 * column] = 1
            tokens = pack(picture, 1, 1, 2 * height, 2 * width)
        changed = args["hidden_states"].clone()
        changed[:, before + int(tokens[0].sum(-1).argmax())] += 1
        return args | {"hidden_states": changed}

    return touch


def listed(args: Arguments, frame: int, row: int, column: int) -> Arguments:
    """For Z-Image, whose latents are a list."""
    changed = [x.clone() for x in args["x"]]
    for x in changed:
        x[:, frame, 2 * row, 2 * column] += 1
    return args | {"x": changed}


def last_item(args: Arguments, frame: int, row: int, column: int) -> Arguments:
    """For JoyImage, whose latents are of several images, the generated one last."""
    changed = args["hidden_states"].clone()
    changed[:, -1, :, frame, 2 * row, 2 * column] += 1
    return args | {"hidden_states": changed}


def row(width: int, first: int = 0) -> Touch:
    """For tokens that come as rows, of which `first` are not of the grid; rows of a frame: 4."""

    def touch(args: Arguments, frame: int, row: int, column: int) -> Arguments:
        changed = args["hidden_states"].clone()
        changed[:, first + (frame * 4 + row) * width + column] += 1
        return args | {"hidden_states": changed}

    return touch


def last_video(args: Arguments, frame: int, row: int, column: int) -> Arguments:
    """For Cosmos 3, whose latents are a list of videos."""
    *others, video = args["vision_tokens"]
    changed = video.clone()
    changed[:, :, frame, 2 * row, 2 * column] += 1
    return args | {"vision_tokens": [*others, changed]}
