"""Metrics against other implementations and a published value, on photographs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics.functional.image as tm_image
from skimage import data
from skimage import metrics as sk_metrics

from diffpatch.eval.quality.metrics import _BORDER, _similarity, ms_ssim, psnr, relative_l1, ssim

INSIDE = (..., slice(_BORDER, -_BORDER), slice(_BORDER, -_BORDER))  # where no border is reflected
GAUSSIAN = {"gaussian_weights": True, "use_sample_covariance": False, "channel_axis": 0}


def clips(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(distorted, original) float32 (3, 3, size, size), few values multiples of 1/255.

    A photograph, smaller; darker, blurred and with a grating over it, each a frame.
    """
    photograph = torch.from_numpy(data.astronaut()).permute(2, 0, 1).double()[None] / 255
    original = F.adaptive_avg_pool2d(photograph, size)
    blurred = F.avg_pool2d(F.pad(original, (1, 1, 1, 1), mode="replicate"), 3, 1)
    grating = 0.05 * torch.sin(1.7 * torch.arange(size, dtype=torch.float64))
    frames = [original**1.2, blurred, (original + grating).clamp(0, 1)]
    assert ((original * 255).frac().abs() > 1e-3).double().mean() > 0.8
    return torch.cat(frames).float(), original.expand(3, -1, -1, -1).float()


def test_psnr_and_ssim_are_those_of_scikit_image_frame_by_frame() -> None:
    frames, original = clips(128)
    psnrs, ssims = psnr(frames, original), ssim(frames, original)
    assert len({round(x, 1) for x in psnrs.per_frame}) == 3
    for n, (one, other) in enumerate(zip(frames.double(), original.double(), strict=True)):
        a, b = one.numpy(), other.numpy()
        expected = sk_metrics.peak_signal_noise_ratio(b, a, data_range=1.0)
        assert psnrs.per_frame[n] == pytest.approx(expected, abs=1e-3)
        _, whole = sk_metrics.structural_similarity(b, a, data_range=1.0, full=True, **GAUSSIAN)
        found = _similarity(one, other)[0]
        assert np.abs(found.numpy() - whole)[INSIDE].max() < 1e-3
        assert float(found[INSIDE].mean()) == pytest.approx(whole[INSIDE].mean(), abs=1e-5)
        # It reflects borders in another way.
        assert ssims.per_frame[n] == pytest.approx(whole.mean(), abs=3e-3)
        assert ssims.per_frame[n] == pytest.approx(float(found.mean()), abs=1e-6)
    assert ssims.mean == pytest.approx(sum(ssims.per_frame) / 3, abs=1e-9)


def test_psnr_ssim_and_ms_ssim_are_those_of_torchmetrics() -> None:
    frames, original = clips(208)
    for n, (one, other) in enumerate(zip(frames[:, None], original[:, None], strict=True)):
        found = psnr(frames, original).per_frame[n]
        expected = tm_image.peak_signal_noise_ratio(one, other, data_range=1.0)
        assert found == pytest.approx(float(expected), abs=1e-3)
        likeness = tm_image.structural_similarity_index_measure(one, other, data_range=1.0)
        assert isinstance(likeness, torch.Tensor)
        assert ssim(one, other).mean == pytest.approx(float(likeness), abs=1e-5)
        scales = tm_image.multiscale_structural_similarity_index_measure(one, other, data_range=1.0)
        assert ms_ssim(one, other).mean == pytest.approx(float(scales), abs=2e-3)


def test_published_values_of_a_noisy_photograph() -> None:
    """IPOL's `imdiff` (www.ipol.im/pub/art/2011/g_lmii), as scikit-image 0.18 and later tell it."""
    camera = data.camera()
    noise = np.random.RandomState(5).randn(*camera.shape)
    noisy = np.clip(camera + 20.0 * noise, 0, 255).astype(camera.dtype)
    one, other = (torch.from_numpy(x)[None, None].double() / 255 for x in (noisy, camera))
    assert psnr(one, other).mean == pytest.approx(22.4094, abs=1e-4)
    inside = float(_similarity(one[0], other[0])[0][INSIDE].mean())
    assert inside == pytest.approx(0.357959, abs=1e-4)
    assert ssim(one, other).mean == pytest.approx(0.357959, abs=3e-3)  # with the borders


def test_relative_l1_is_its_formula() -> None:
    frames, original = clips(32)
    a, b = frames.double().numpy(), original.double().numpy()
    expected = np.abs(a - b).sum() / np.abs(b).sum()
    assert relative_l1(frames, original) == pytest.approx(expected, rel=1e-9)
    assert relative_l1(original, frames) != pytest.approx(expected, rel=1e-3)
