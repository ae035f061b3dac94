"""How close one clip is to another: PSNR, SSIM, MS-SSIM, relative L1. Frames are (F, C, H, W).

Papers differ in how they average, and the numbers differ by decibels, so the rule here is fixed: a
score is computed for every frame, and the mean over the frames is reported. Score frames in memory,
never a decoded mp4: h264 alone costs more than a good method does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from diffpatch.pipelines.running.likeness import psnr_by_frame

WINDOW, SIGMA = 11, 1.5
LUMINANCE, CONTRAST = 0.01**2, 0.03**2
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the five scales of MS-SSIM, from Wang et al. 2003."""

MS_SSIM_SIDE = WINDOW * 2 ** (len(SCALES) - 1)
"""The shortest side that leaves a whole window at the coarsest scale: 176 pixels."""

_BORDER = WINDOW // 2
_TOLERANCE = 1e-3  # how far from [0, 1] rounding may take a decoder that clamps


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
    check_pair(frames, reference)
    return Score.of(psnr_by_frame(frames, reference))


def ssim(frames: torch.Tensor, reference: torch.Tensor) -> Score:
    """Structural similarity with a Gaussian window (11×11, σ 1.5), reflected borders, data range 1.

    With local means m, variances v and covariance c under the window, averaged over pixels and
    channels: ``(2 m_a m_b + 0.01²)(2 c + 0.03²) / ((m_a² + m_b² + 0.01²)(v_a + v_b + 0.03²))``.

    Args:
        frames: (F, C, H, W) floats in [0, 1], at least 6 pixels wide and high.
        reference: The frames to compare with, of the same shape.
    """
    check_pair(frames, reference)
    if min(frames.shape[-2:]) <= _BORDER:
        raise ValueError(f"SSIM needs frames of at least 6×6 pixels, got {tuple(frames.shape)}")
    pairs = zip(frames, reference, strict=True)
    return Score.of(torch.stack([_similarity(*pair)[0].mean() for pair in pairs]))


def ms_ssim(frames: torch.Tensor, reference: torch.Tensor) -> Score:
    """Multi-scale SSIM (Wang et al. 2003): contrast at five scales, SSIM at the coarsest.

    Each scale halves the frames by averaging 2×2 pixels. A negative mean similarity counts as 0,
    as its power would be no real number.

    Args:
        frames: (F, C, H, W) floats in [0, 1], at least 176 pixels wide and high.
        reference: The frames to compare with, of the same shape.
    """
    check_pair(frames, reference)
    if min(frames.shape[-2:]) < MS_SSIM_SIDE:
        raise ValueError(
            f"MS-SSIM needs frames of at least {MS_SSIM_SIDE}×{MS_SSIM_SIDE} pixels, "
            f"got {tuple(frames.shape)}"
        )
    return Score.of(torch.stack([_scales(*p) for p in zip(frames, reference, strict=True)]))


def relative_l1(values: torch.Tensor, reference: torch.Tensor) -> float:
    """``sum|a - b| / sum|b|`` over all elements; 0 for equal tensors, inf for a zero reference."""
    if values.shape != reference.shape:
        raise ValueError(f"shapes differ: {tuple(values.shape)} and {tuple(reference.shape)}")
    difference = float((values.double() - reference.double()).abs().sum())
    if difference == 0.0:
        return 0.0
    scale = float(reference.double().abs().sum())
    return difference / scale if scale else float("inf")


def check_frames(frames: torch.Tensor) -> None:
    """Refuse what is not a clip (F, C, H, W) of floats in [0, 1]; bf16 and fp16 are fine.

    Raises:
        ValueError: integers, another number of axes, no frames, or values outside the range.
    """
    if frames.ndim != 4 or not frames.is_floating_point() or not frames.numel():
        raise ValueError(
            "frames must be floats (F, C, H, W) in [0, 1], "
            f"got {tuple(frames.shape)} of {frames.dtype}; divide uint8 by 255"
        )
    low, high = (float(end) for end in torch.aminmax(frames))
    if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):  # NaN is not inside either
        raise ValueError(f"frames must lie in [0, 1], got values from {low:.3g} to {high:.3g}")


def check_pair(frames: torch.Tensor, reference: torch.Tensor) -> None:
    """Refuse clips that cannot be compared; see `check_frames`."""
    if frames.shape != reference.shape:
        raise ValueError(f"shapes differ: {tuple(frames.shape)} and {tuple(reference.shape)}")
    check_frames(frames)
    check_frames(reference)


def _scales(frame: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """MS-SSIM of one frame (C, H, W)."""
    product = torch.ones((), device=frame.device)
    a, b = frame.float(), reference.float()
    for scale, exponent in enumerate(SCALES):
        whole, contrast = _similarity(a, b)
        inside = contrast[:, _BORDER:-_BORDER, _BORDER:-_BORDER]  # as torchmetrics: no reflections
        value = whole.mean() if scale == len(SCALES) - 1 else inside.mean()
        product = product * value.clamp(min=0) ** exponent
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return product


def _similarity(frame: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """SSIM of one frame (C, H, W) at every pixel, and its contrast and structure part alone."""
    a, b = frame.float(), reference.float()
    moments = torch.stack([a, b, a * a, b * b, a * b])
    mean_a, mean_b, square_a, square_b, product = _blur(moments)
    variance = (square_a - mean_a**2).clamp(min=0) + (square_b - mean_b**2).clamp(min=0)
    covariance = product - mean_a * mean_b
    contrast = (2 * covariance + CONTRAST) / (variance + CONTRAST)
    light = (2 * mean_a * mean_b + LUMINANCE) / (mean_a**2 + mean_b**2 + LUMINANCE)
    return light * contrast, contrast


def _blur(images: torch.Tensor) -> torch.Tensor:
    """The Gaussian window over (N, C, H, W), one axis after the other."""
    offsets = torch.arange(WINDOW, device=images.device) - _BORDER
    weights = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    weights = weights / weights.sum()
    planes = images.flatten(0, 1).unsqueeze(1)  # (N * C, 1, H, W)
    planes = F.pad(planes, (_BORDER,) * 4, mode="reflect")
    planes = F.conv2d(planes, weights.view(1, 1, WINDOW, 1))
    planes = F.conv2d(planes, weights.view(1, 1, 1, WINDOW))
    return planes.view(images.shape)
