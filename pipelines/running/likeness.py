"""How alike two clips are, frame by frame."""

from __future__ import annotations

import torch

BEST_PSNR = 100.0  # dB, of equal pictures, whose PSNR is infinite


def psnr_by_frame(frames: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in decibels, at most `BEST_PSNR`: ``-10 log10(mean((a - b)²))``.

    Args:
        frames: (F, C, H, W) floats in [0, 1].
        reference: the frames to compare with, of the same shape.

    Returns:
        (F,) in fp64.
    """
    error = (frames.double() - reference.double()).square().mean(dim=(1, 2, 3))
    return (-10 * error.log10()).clamp(max=BEST_PSNR)
