"""Where every token of a self-attention sequence lives.

Most sequences hold one grid among text (`TokenGrid`). A packed one (`PackedGrid`) is a row of
*spans*: a span is either a grid (a video, or an image as a grid of one frame) or a stretch of
tokens that have none (text, keyframes, audio). Tokens without a grid stay exact: they see every
token, and every token sees them. Inside a grid a method's own pattern for that grid decides;
between two grids a rule of the layout does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from diffpatch.checking import check_fields, frozen
from diffpatch.errors import BadParameter

Shape = tuple[int, int, int]  # (num_frames, height, width)
BETWEEN = ("exact", "aligned")


@dataclass(frozen=True)
class TokenGrid:
    """The lattice of visual tokens of one self-attention call, and the tokens around it.

    The sequence is ``[text_before, visual tokens, text_after]``. Visual tokens are frame-major and
    row-major: token (f, h, w) stands at ``text_before + (f * height + h) * width + w``. "Text"
    means any token that everything may see: prompt tokens, registers, reference-image tokens.

    Attributes:
        num_frames: latent frames; 1 for images.
        height: rows of tokens in a frame.
        width: tokens in a row.
        text_before: always-visible tokens in front of the visual ones.
        text_after: always-visible tokens behind them.
    """

    num_frames: int
    height: int
    width: int
    text_before: int = 0
    text_after: int = 0

    def __post_init__(self) -> None:
        numbers = (self.num_frames, self.height, self.width, self.text_before, self.text_after)
        if not all(type(number) is int for number in numbers):  # torch.compile traces no further
            check_fields(self, "TokenGrid")
        for name in ("num_frames", "height", "width"):
            if getattr(self, name) < 1:
                raise BadParameter(f"TokenGrid: {name}={getattr(self, name)} must be at least 1")
        for name in ("text_before", "text_after"):
            if getattr(self, name) < 0:
                raise BadParameter(f"TokenGrid: {name}={getattr(self, name)} must be at least 0")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(num_frames, height, width)."""
        return self.num_frames, self.height, self.width

    @property
    def frame_tokens(self) -> int:
        """Visual tokens in one frame."""
        return self.height * self.width

    @property
    def visual_tokens(self) -> int:
        return self.num_frames * self.frame_tokens

    @property
    def num_tokens(self) -> int:
        """Length of the whole sequence."""
        return self.text_before + self.visual_tokens + self.text_after

    def is_text(self, index: torch.Tensor) -> torch.Tensor:
        """Whether tokens, given by their place in the sequence, stand beside the grid."""
        return (index < self.text_before) | (index >= self.text_before + self.visual_tokens)

    def in_first_frames(self, index: torch.Tensor, frames: int) -> torch.Tensor:
        """Whether tokens, given by their place in the sequence, are of the first frames."""
        end = self.text_before + min(self.visual_tokens, frames * self.frame_tokens)
        return (index >= self.text_before) & (index < end)

    def __str__(self) -> str:
        text = self.text_before + self.text_after
        return "×".join(map(str, self.shape)) + (f" + {text} text" if text else "")


@dataclass(frozen=True)
class PackedGrid:
    """Where the tokens of a packed sequence live.

    >>> grid = PackedGrid((12, (5, 4, 6), 20, (3, 4, 6)))  # text, a reference, audio, the video
    >>> grid.num_tokens, grid.starts
    (224, (0, 12, 132, 152))

    Attributes:
        spans: in the order of the sequence; a number is that many tokens without a grid, three
            numbers (num_frames, height, width) are a grid in frame-major, row-major order.
        between: what queries of one grid see of another one: "exact" is all of it; "aligned" is
            what the tile of the other grid at the same relative place sees there, in whole tiles.

    Raises:
        BadParameter: the spans are not as described, or none of them is a grid.
    """

    spans: tuple[int | Shape, ...]
    between: str = "exact"

    def __post_init__(self) -> None:
        object.__setattr__(self, "spans", frozen(self.spans))
        if not isinstance(self.spans, tuple):
            raise BadParameter(
                f"spans={self.spans!r} of a PackedGrid must be a list, such as (12, (5, 4, 6))"
            )
        if self.between not in BETWEEN:
            raise BadParameter(
                f"between={self.between!r} of a PackedGrid must be 'exact' or 'aligned'"
            )
        for span in self.spans:
            if not _is_span(span):
                raise BadParameter(
                    f"span {span!r} of a PackedGrid must be a number of tokens, or a grid"
                    " (num_frames, height, width), all of them at least 1"
                )
        if not self.grids:
            raise BadParameter(
                f"spans={self.spans} of a PackedGrid hold no grid: give one span as"
                " (num_frames, height, width)"
            )

    @cached_property
    def grids(self) -> tuple[TokenGrid, ...]:
        """The grids among the spans, each as a sequence of its own."""
        return tuple(TokenGrid(*span) for span in self.spans if isinstance(span, tuple))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Tokens in each span."""
        return tuple(s if isinstance(s, int) else TokenGrid(*s).num_tokens for s in self.spans)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each span begins in the sequence."""
        return tuple(sum(self.sizes[:i]) for i in range(len(self.sizes)))

    @property
    def num_frames(self) -> int:
        """Frames of the longest grid."""
        return max(grid.num_frames for grid in self.grids)

    @property
    def visual_tokens(self) -> int:
        """Tokens that belong to a grid."""
        return sum(grid.visual_tokens for grid in self.grids)

    @property
    def num_tokens(self) -> int:
        """Length of the whole sequence."""
        return sum(self.sizes)

    def is_text(self, index: torch.Tensor) -> torch.Tensor:
        """Whether tokens, given by their place in the sequence, belong to no grid."""
        out = torch.ones_like(index, dtype=torch.bool)
        for span, start, size in zip(self.spans, self.starts, self.sizes, strict=True):
            if isinstance(span, tuple):
                out &= (index < start) | (index >= start + size)
        return out

    def in_first_frames(self, index: torch.Tensor, frames: int) -> torch.Tensor:
        """Whether tokens belong to one of the first `frames` frames of their grid."""
        out = torch.zeros_like(index, dtype=torch.bool)
        for span, start, size in zip(self.spans, self.starts, self.sizes, strict=True):
            if isinstance(span, tuple):
                end = start + min(size, frames * span[1] * span[2])
                out |= (index >= start) & (index < end)
        return out

    def simplest(self) -> TokenGrid | PackedGrid:
        """The same layout as a `TokenGrid`, if it has one grid only."""
        if len(self.grids) > 1:
            return self
        at = next(i for i, span in enumerate(self.spans) if isinstance(span, tuple))
        return replace(
            self.grids[0], text_before=sum(self.sizes[:at]), text_after=sum(self.sizes[at + 1 :])
        )

    def __str__(self) -> str:
        names = [f"{s} text" if isinstance(s, int) else "×".join(map(str, s)) for s in self.spans]
        return " + ".join(names)


Grid = TokenGrid | PackedGrid


def as_grid(value: Grid | Sequence[int]) -> Grid:
    """A layout as users may write it: three numbers are a `TokenGrid` without text.

    Raises:
        BadParameter: it is neither of these.
    """
    if isinstance(value, TokenGrid | PackedGrid):
        return value
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 3:
        return TokenGrid(*value)
    raise BadParameter(
        f"grid={value!r} must be a TokenGrid, a PackedGrid, or (num_frames, height, width)"
    )


def _is_span(span: Any) -> bool:
    parts = span if isinstance(span, tuple) else (span,)
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in parts)
    return whole and len(parts) in (1, 3) and (len(parts) == 3) == isinstance(span, tuple)
