"""Where every token of a self-attention sequence lives."""

from __future__ import annotations

from dataclasses import dataclass

from diffpatch.errors import BadParameter


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
        for name in ("num_frames", "height", "width"):
            if getattr(self, name) < 1:
                raise BadParameter(
                    f"{name}={getattr(self, name)} of a TokenGrid must be at least 1"
                )
        for name in ("text_before", "text_after"):
            if getattr(self, name) < 0:
                raise BadParameter(
                    f"{name}={getattr(self, name)} of a TokenGrid must not be negative"
                )

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

    def __str__(self) -> str:
        text = self.text_before + self.text_after
        return "×".join(map(str, self.shape)) + (f" + {text} text" if text else "")
