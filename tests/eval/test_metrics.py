"""Metrics of pairs equal torchmetrics', average over frames, and know their limits."""

from __future__ import annotations

import pytest
import torch

from diffpatch.eval.quality.metrics import MS_SSIM_SIDE, ms_ssim, psnr, relative_l1, ssim
from diffpatch.pipelines.running.likeness import BEST_PSNR


def clips(noise: float = 0.05, shape: tuple[int, ...] = (3, 3, 24, 37)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(shape, generator=generator)
    noisy = reference + noise * torch.randn(shape, generator=generator)
    return [noisy.clamp(0, 1), reference]


@pytest.mark.parametrize("noise", [0.001, 0.05, 0.5])
def test_psnr_is_torchmetrics_per_frame(noise: float) -> None:
    image = pytest.importorskip("torchmetrics.functional.image")
    frames, reference = clips(noise)
    score = psnr(frames, reference)
    expected = [
        float(image.peak_signal_noise_ratio(a, b, data_range=1.0))
        for a, b in zip(frames, reference, strict=True)
    ]
    assert score.per_frame == pytest.approx(expected, rel=1e-5)
    assert score.mean == pytest.approx(sum(expected) / len(expected), rel=1e-5)


@pytest.mark.parametrize("noise", [0.001, 0.05, 0.5])
@pytest.mark.parametrize("shape", [(3, 3, 24, 37), (2, 1, 6, 64)])
def test_ssim_is_torchmetrics(noise: float, shape: tuple[int, ...]) -> None:
    image = pytest.importorskip("torchmetrics.functional.image")
    frames, reference = clips(noise, shape)
    expected = image.structural_similarity_index_measure(
        frames, reference, data_range=1.0, sigma=1.5, reduction="none"
    )
    assert ssim(frames, reference).per_frame == pytest.approx(expected.tolist(), abs=2e-5)


@pytest.mark.parametrize("noise", [0.02, 0.3])
@pytest.mark.parametrize("shape", [(2, 3, 176, 203), (1, 1, 231, 177)])
def test_ms_ssim_is_torchmetrics(noise: float, shape: tuple[int, ...]) -> None:
    image = pytest.importorskip("torchmetrics.functional.image")
    frames, reference = (torch.nn.functional.avg_pool2d(c, 5, 1, 2) for c in clips(noise, shape))
    expected = image.multiscale_structural_similarity_index_measure(
        frames, reference, data_range=1.0, reduction="none", normalize="relu"
    )
    assert ms_ssim(frames, reference).per_frame == pytest.approx(expected.tolist(), abs=1e-4)


def test_ssim_has_a_gaussian_window_and_not_a_box() -> None:
    image = pytest.importorskip("torchmetrics.functional.image")
    frames, reference = (torch.nn.functional.avg_pool2d(c, 7, 1, 3) for c in clips(0.2))
    box = image.structural_similarity_index_measure(
        frames, reference, data_range=1.0, gaussian_kernel=False, kernel_size=11
    )
    assert abs(ssim(frames, reference).mean - float(box)) > 0.005


def test_identical_clips_score_the_best_value() -> None:
    frames, _ = clips()
    assert psnr(frames, frames).mean == BEST_PSNR
    assert ssim(frames, frames).mean == 1.0
    assert relative_l1(frames, frames) == 0.0
    large = torch.rand(1, 3, MS_SSIM_SIDE, MS_SSIM_SIDE)
    assert ms_ssim(large, large).mean == pytest.approx(1.0, abs=1e-6)


def test_psnr_averages_decibels_and_not_errors() -> None:
    reference = torch.zeros(2, 3, 8, 8)
    frames = torch.stack([torch.full((3, 8, 8), 0.1), torch.full((3, 8, 8), 0.01)])
    assert psnr(frames, reference).per_frame == pytest.approx([20.0, 40.0], abs=1e-4)
    assert psnr(frames, reference).mean == pytest.approx(30.0, abs=1e-4)


def test_relative_l1_is_relative_to_the_second_argument() -> None:
    assert relative_l1(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])) == 0.5
    assert relative_l1(torch.ones(2), torch.zeros(2)) == float("inf")
    assert relative_l1(torch.zeros(2), torch.zeros(2)) == 0.0


def test_a_score_gets_worse_with_noise() -> None:
    quiet, loud = (clips(noise) for noise in (0.01, 0.2))
    assert psnr(*quiet).mean > psnr(*loud).mean
    assert ssim(*quiet).mean > ssim(*loud).mean


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_is_measured_in_full_precision(dtype: torch.dtype) -> None:
    frames, reference = (clip.to(dtype) for clip in clips())
    assert psnr(frames, reference) == psnr(frames.double(), reference.double())
    found, expected = ssim(frames, reference), ssim(frames.float(), reference.float())
    assert found.per_frame == pytest.approx(expected.per_frame, abs=1e-6)


@pytest.mark.parametrize("value", [-0.5, 1.5, float("nan")])
def test_values_outside_the_range_are_refused(value: float) -> None:
    frames, reference = clips()
    frames[1, 2, 3, 4] = value
    with pytest.raises(ValueError, match=r"in \[0, 1\], got values"):
        psnr(frames, reference)
    with pytest.raises(ValueError, match=r"in \[0, 1\], got values"):
        ssim(reference, frames)


@pytest.mark.parametrize("metric", [psnr, ssim, ms_ssim, relative_l1])
def test_shapes_must_match(metric: object) -> None:
    assert callable(metric)
    with pytest.raises(ValueError, match="shapes differ"):
        metric(torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 8, 8))


def test_frames_must_be_floats_and_large_enough() -> None:
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"floats.*uint8"):
        psnr(pixels, pixels)
    small = torch.zeros(1, 3, 5, 8)
    with pytest.raises(ValueError, match="6×6"):
        ssim(small, small)
    with pytest.raises(ValueError, match="176×176"):
        ms_ssim(torch.zeros(1, 3, 175, 200), torch.zeros(1, 3, 175, 200))
