"""How close one clip is to another: PSNR, SSIM, relative L1. Frames are (F, C, H, W) in [0, 1].

Papers differ in how they average, and the numbers differ by decibels, so the rule here is fixed: a
score is computed for every frame, and the mean over the frames is reported. Score frames in memory,
never a decoded mp4: h264 alone costs more than a good method does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

PSNR_CAP = 100.0
"""Decibels given to identical frames, whose PSNR is infinite."""

WINDOW, SIGMA = 11, 1.5
LUMINANCE, CONTRAST = 0.01**2, 0.03**2


@dataclass(frozen=True)
class Score:
    """A metric of a clip: the mean over its frames, and the value of every frame."""

    mean: float
    per_frame: list[float]

    @classmethod
    def of(cls, values: torch.Tensor) -> Score:
        """The score made of one value per frame."""
        per_frame = [float(value) for value in values]
        return cls(sum(per_frame) / len(per_frame), per_frame)


def psnr(frames: torch.Tensor, reference: torch.Tensor) -> Score:
    """Peak signal-to-noise ratio in decibels: ``-10 log10(mean((a - b)²))`` per frame, at most 100.

    Args:
        frames: (F, C, H, W) floats in [0, 1].
        reference: The frames to compare with, of the same shape.
    """
    _check_pair(frames, reference)
    error = (frames.double() - reference.double()).square().mean(dim=(1, 2, 3))
    return Score.of((-10 * error.log10()).clamp(max=PSNR_CAP))


def ssim(frames: torch.Tensor, reference: torch.Tensor) -> Score:
    """Structural similarity with a Gaussian window (11×11, σ 1.5), reflected borders, data range 1.

    With local means m, variances v and covariance c under the window, averaged over pixels and
    channels: ``(2 m_a m_b + 0.01²)(2 c + 0.03²) / ((m_a² + m_b² + 0.01²)(v_a + v_b + 0.03²))``.

    Args:
        frames: (F, C, H, W) floats in [0, 1], at least 6 pixels wide and high.
        reference: The frames to compare with, of the same shape.
    """
    _check_pair(frames, reference)
    if min(frames.shape[-2:]) <= WINDOW // 2:
        raise ValueError(f"SSIM needs frames of at least 6×6 pixels, got {tuple(frames.shape)}")
    return Score.of(torch.cat([_ssim(*pair) for pair in zip(frames, reference, strict=True)]))


def relative_l1(values: torch.Tensor, reference: torch.Tensor) -> float:
    """``sum|a - b| / sum|b|`` over all elements; 0 for equal tensors, inf for a zero reference."""
    if values.shape != reference.shape:
        raise ValueError(f"shapes differ: {tuple(values.shape)} and {tuple(reference.shape)}")
    difference = float((values.double() - reference.double()).abs().sum())
    if difference == 0.0:
        return 0.0
    scale = float(reference.double().abs().sum())
    return difference / scale if scale else float("inf")


def _ssim(frame: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """SSIM of one frame (C, H, W) as a tensor of one element."""
    a, b = frame.float(), reference.float()
    moments = torch.stack([a, b, a * a, b * b, a * b])
    mean_a, mean_b, square_a, square_b, product = _blur(moments)
    variance = (square_a - mean_a**2).clamp(min=0) + (square_b - mean_b**2).clamp(min=0)
    covariance = product - mean_a * mean_b
    above = (2 * mean_a * mean_b + LUMINANCE) * (2 * covariance + CONTRAST)
    below = (mean_a**2 + mean_b**2 + LUMINANCE) * (variance + CONTRAST)
    return (above / below).mean().reshape(1)


def _blur(images: torch.Tensor) -> torch.Tensor:
    """The Gaussian window over (N, C, H, W), one axis after the other."""
    offsets = torch.arange(WINDOW, device=images.device) - WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    weights = weights / weights.sum()
    planes = images.flatten(0, 1).unsqueeze(1)  # (N * C, 1, H, W)
    planes = F.pad(planes, (WINDOW // 2,) * 4, mode="reflect")
    planes = F.conv2d(planes, weights.view(1, 1, WINDOW, 1))
    planes = F.conv2d(planes, weights.view(1, 1, 1, WINDOW))
    return planes.view(images.shape)


def _check_pair(frames: torch.Tensor, reference: torch.Tensor) -> None:
    if frames.shape != reference.shape:
        raise ValueError(f"shapes differ: {tuple(frames.shape)} and {tuple(reference.shape)}")
    if frames.ndim != 4 or not (frames.is_floating_point() and reference.is_floating_point()):
        raise ValueError(
            "frames must be floats (F, C, H, W) in [0, 1], "
            f"got {tuple(frames.shape)} of {frames.dtype} and {reference.dtype}"
        )
