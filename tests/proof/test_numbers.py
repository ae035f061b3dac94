"""Numbers beyond easy inputs: 16 bits, large scores, frames off the 8-bit lattice."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics.functional.image as tm_image

from diffpatch.eval.media import load_frames, save_frames, to_pixels
from diffpatch.eval.quality.metrics import psnr, ssim
from diffpatch.kernels.block_sparse.api import block_sparse_attention
from diffpatch.kernels.block_sparse.int8.levels import mean_score
from diffpatch.kernels.dense import attend_dense
from diffpatch.kernels.virtual_tokens import api as virtual_tokens
from diffpatch.patterns.tiles import choose_tile, equal_cuts, even_cuts
from tests.kernels.random_blocks import random_blocks, random_qkv

SIZES = [33, 17, 64, 5]


@pytest.mark.parametrize("shift", [-200.0, 0.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_log_sum_exps_are_exact_where_scores_are_large(
    dtype: torch.dtype, shift: float, backend: str
) -> None:
    blocks = random_blocks(SIZES, kept=0.7, seed=4)
    q, k, v = random_qkv(2, sum(SIZES), 4, 16, dtype, key_heads=2, seed=3)
    q[..., 0], k[..., 0] = 16.0, shift / 16.0 / 0.25  # adds `shift` to every score
    out, lse = block_sparse_attention(q, k, v, blocks, scale=0.25, return_lse=True, backend=backend)
    exact = block_sparse_attention(
        q.double(), k.double(), v.double(), blocks, scale=0.25, return_lse=True,
        backend="reference",
    )  # fmt: skip
    assert lse.dtype == torch.float32
    seen = ~exact[1].isinf()
    assert torch.equal(lse.isinf(), ~seen) and seen.any()
    assert abs(float(exact[1][seen].mean()) - shift) < 20
    # One part in 2^20 of a score of 200: a log-sum-exp in 16 bits would be off by more than 0.1.
    torch.testing.assert_close(lse[seen].double(), exact[1][seen], rtol=0, atol=2e-3)
    near = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert (out.double() - exact[0]).norm() < near * exact[0].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_16_bits_are_those_of_fp64(dtype: torch.dtype) -> None:
    blocks = random_blocks(SIZES, kept=0.7, seed=1)
    tensors = random_qkv(1, sum(SIZES), 4, 16, dtype, key_heads=2, seed=2)
    found = []
    for wide in (False, True):
        q, k, v = (x.double() if wide else x.clone() for x in tensors)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        out, lse = block_sparse_attention(
            q, k, v, blocks, scale=0.7, return_lse=True,
            backend="reference" if wide else "torch",
        )  # fmt: skip
        loss = out.double().square().sum() + lse[~lse.isinf()].double().sin().sum()
        found.append(torch.autograd.grad(loss, (q, k, v)))
    for one, exact in zip(*found, strict=True):
        assert one.dtype == dtype and torch.isfinite(one).all()
        assert (one.double() - exact).norm() < 2e-2 * exact.norm()


def test_the_mean_score_of_grouped_queries_is_of_their_own_key_head() -> None:
    q, k, _ = random_qkv(2, 24, 6, 8, torch.float32, key_heads=3, seed=1)
    mean = (k + 5 * torch.arange(3)[:, None]).mean(1)
    found = mean_score(q, mean, 0.25)
    for b, h in itertools.product(range(2), range(6)):
        expected = 0.25 * q[b, :, h] @ mean[b, h // 2]
        torch.testing.assert_close(found[b, :, h], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_dense_attention_of_grouped_queries(scale: float | None, masked: bool) -> None:
    q, k, v = random_qkv(2, 20, 6, 8, torch.float64, key_heads=2, seed=5)
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(0)) < 0.7 if masked else None
    factor = 8**-0.5 if scale is None else scale
    for b, h in itertools.product(range(2), range(6)):
        scores = q[b, :, h] @ k[b, :, h // 3].T * factor
        if mask is not None:
            scores = scores.masked_fill(~mask[b], -math.inf)
        expected = scores.softmax(-1) @ v[b, :, h // 3]
        torch.testing.assert_close(attend_dense(q, k, v, scale, mask)[b, :, h], expected)


def test_the_second_order_of_virtual_tokens_is_capped() -> None:
    """A run of keys that is spread wide counts as its size at most e-fold, not without bound."""
    blocks = random_blocks([32, 32], kept=0.0, partial=0, seed=0)
    q, k, v = random_qkv(1, 64, 1, 8, torch.float32, seed=0)
    q, k = 40 * q, 40 * k
    tokens = virtual_tokens.pool(k, v, blocks, 16)
    nothing = torch.zeros_like(q), torch.full(q.shape[:3], -math.inf)
    out, lse = virtual_tokens.attend_virtual(q, tokens, blocks, 0.3, nothing, "torch")
    means = torch.stack([k[0, run, 0].mean(0) for run in blocks.order.split(16)])
    values = torch.stack([v[0, run, 0].mean(0) for run in blocks.order.split(16)])
    first = 0.3 * q[0, :, 0] @ means.T + math.log(16)
    spread = torch.stack(
        [(k[0, run, 0] - k[0, run, 0].mean(0)).square().mean(0) for run in blocks.order.split(16)]
    )
    second = (0.5 * 0.3**2 * q[0, :, 0].square() @ spread.T).clamp(max=math.log(16))
    assert (second == math.log(16)).any(), "the cap was not met"
    torch.testing.assert_close(
        out[0, :, 0], (first + second).softmax(-1) @ values, atol=1e-3, rtol=0
    )
    torch.testing.assert_close(lse[0, :, 0], (first + second).logsumexp(-1), atol=2e-2, rtol=1e-5)


def test_of_tiles_with_equal_waste_the_most_compact_wins() -> None:
    for shape in ((16, 16, 16), (8, 32, 32), (1, 32, 32), (4, 16, 64)):
        tile = choose_tile(shape, 64)
        assert math.prod(tile) == 64
        sides = [side for side, length in zip(tile, shape, strict=True) if length > 1]
        assert max(sides) / min(sides) <= 2, tile
    assert choose_tile((4, 4, 512), 64) == (4, 4, 4)
    assert choose_tile((5, 7, 9), 128, limits=(2, 3, 9))[:2] <= (2, 3)


@pytest.mark.parametrize("length", [1, 2, 7, 30, 53])
def test_cuts_are_as_equal_as_can_be(length: int) -> None:
    for tile in range(1, length + 3):
        cuts = even_cuts(length, tile)
        sizes = [b - a for a, b in itertools.pairwise(cuts)]
        assert sum(sizes) == length and max(sizes) - min(sizes) <= 1 and max(sizes) <= tile
        assert len(sizes) == math.ceil(length / tile)
        assert cuts == equal_cuts(length, len(sizes))


def frames(seed: int, shape: tuple[int, ...] = (3, 3, 24, 30)) -> torch.Tensor:
    """Smooth frames, no value of which is a multiple of 1/255."""
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.avg_pool2d(noise, 5, stride=1, padding=2)
    return (smooth + 1 / 1021).clamp(0, 1)


def test_metrics_are_those_of_torchmetrics_off_the_lattice() -> None:
    one, two = frames(0), (frames(0) * 0.9 + 0.1 * frames(1)).clamp(0, 1)
    each = [
        float(tm_image.peak_signal_noise_ratio(a[None], b[None], data_range=1.0))
        for a, b in zip(two, one, strict=True)
    ]
    found = psnr(two, one)
    assert found.mean == pytest.approx(sum(each) / 3, abs=1e-3)
    assert len(set(each)) == 3, "frames that are alike tell a mean from nothing"
    likeness = tm_image.structural_similarity_index_measure(
        two, one, data_range=1.0, gaussian_kernel=True, sigma=1.5, kernel_size=11
    )
    assert isinstance(likeness, torch.Tensor)
    assert float(ssim(two, one).mean) == pytest.approx(float(likeness), abs=1e-5)


def test_frames_are_rounded_to_the_nearest_level(tmp_path: Path) -> None:
    values = torch.tensor([0.0, 0.4, 0.6, 1.4, 1.6, 254.4, 254.6, 255.0]) / 255
    picture = values.reshape(1, 1, 2, 4).expand(1, 3, 2, 4)
    expected = np.array([0, 0, 1, 1, 2, 254, 255, 255]).reshape(2, 4)
    assert np.array_equal(to_pixels(picture)[0, :, :, 0], expected)
    path = tmp_path / "frames.npz"
    save_frames(picture, path)
    assert torch.equal(load_frames(path)[0, 0] * 255, torch.from_numpy(expected).float())
