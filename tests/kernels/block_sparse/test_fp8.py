"""Weights and values as 8-bit floats: the definition, its error, the emulation and the kernels."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import diffpatch
from diffpatch.kernels.block_sparse import backends
from diffpatch.kernels.block_sparse.api import block_sparse_attention
from diffpatch.kernels.block_sparse.fp8 import levels
from diffpatch.kernels.block_sparse.fp8.reference import attend_torch_fp8
from diffpatch.kernels.block_sparse.int8.levels import mean_key
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.gpu import support
from tests.exactness import exact, poisoned
from tests.kernels.random_blocks import random_blocks, random_qkv
from tests.tiny import wan

SIZES = [64, 150, 40, 64, 17]
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(dtype: torch.dtype = torch.bfloat16, size: int = 64) -> Tensors:
    """q, k, v of four query heads on two key heads, with channels that are large or far from 0."""
    q, k, v = random_qkv(2, sum(SIZES), 4, size, torch.float32, key_heads=2)
    k[..., 5] += 12
    q[..., 5] *= 2
    v[..., 7] *= 8
    v[..., 9] += torch.tensor([20.0, -30.0])
    return q.to(dtype), k.to(dtype), v.to(dtype)


def padding() -> torch.Tensor:
    """A key mask (2, S): the second sequence sees no key at all."""
    seen = torch.rand(2, sum(SIZES), generator=torch.Generator().manual_seed(0)) < 0.7
    seen[1] = False
    return seen


def hiding(tensors: Tensors, key_mask: torch.Tensor | None) -> Tensors:
    """What a mask hides may hold anything."""
    if key_mask is None:
        return tensors
    q, k, v = tensors
    hidden = ~key_mask[:, :, None, None]
    return q, k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.nan)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the outputs that tell tokens apart: their mean over the tokens is not counted."""
    spread = expected - expected.mean(1, keepdim=True)
    return float((found.double() - expected).norm() / spread.norm())


def test_weights_are_rounded_to_the_nearest_eighth_of_their_power_of_two() -> None:
    weights = torch.rand(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.cat([weights**8, torch.tensor([0.0, 1.0])])
    rounded = levels.round_weights(weights)
    scaled = weights * levels.LARGEST
    step = 2.0 ** (scaled.log2().floor().clamp(min=-6) - 3)
    torch.testing.assert_close(rounded * levels.LARGEST, (scaled / step).round() * step)
    assert rounded[-1] == 1 and rounded[-2] == 0


def test_values_are_rounded_channel_by_channel() -> None:
    _, _, v = inputs(torch.float32)
    v[0, :, 0, 3] = 4.0  # a channel without any spread
    mean = mean_key(v)
    values, scales = levels.quantize_values(v, mean)
    assert values.dtype == torch.float8_e4m3fn
    rest = v - mean[:, None]
    largest = rest.abs().amax(1)
    at_least = largest.clamp(min=1e-20)
    torch.testing.assert_close(scales, at_least / 448)
    off = rest - values.float() * scales[:, None]
    assert (off.abs() <= torch.maximum(rest.abs() / 16, scales[:, None] * 2**-10) * 1.001).all()
    assert (values.float().abs().amax(1)[largest > 1e-6] == 448).all()
    hidden, _ = levels.quantize_values(hiding((v, v, v), padding())[2], mean, padding())
    assert not hidden.float()[~padding()].any() and not hidden.float().isnan().any()


def test_smoothing_saves_what_tells_values_apart_far_from_zero() -> None:
    blocks, tensors = random_blocks(SIZES, kept=0.5, seed=2), inputs(torch.float64)
    expected, _ = exact(tensors, blocks)
    found = attend_torch_fp8(*tensors, blocks, 0.125, None, False)[0]
    with mock.patch(
        "diffpatch.kernels.block_sparse.fp8.reference.mean_key",
        lambda x, mask: mean_key(x, mask) * (x is not tensors[2]),
    ):
        plain = attend_torch_fp8(*tensors, blocks, 0.125, None, False)[0]
    channel = (..., slice(9, 10))
    assert error(found[channel], expected[channel]) < 0.1
    assert 5 * error(found[channel], expected[channel]) < error(plain[channel], expected[channel])


@pytest.mark.parametrize("outliers", [False, True])
def test_what_is_said_of_the_error(outliers: bool) -> None:
    """Beside bf16, which rounds weights to 8 bits of mantissa, and scores in 8 bits."""
    blocks = random_blocks([128] * 8, kept=0.7, seed=1)
    q, k, v = random_qkv(1, 1024, 2, 128, torch.bfloat16)
    if outliers:
        k[..., [3, 40]] += 12
        v[..., [7, 90]] *= 8
        v[..., 20] += 6
    expected, _ = exact((q, k, v), blocks)
    errors = {
        name: error(block_sparse_attention(q, k, v, blocks, backend=name), expected)
        for name in ("torch", "torch-int8", "torch-fp8")
    }
    assert 0.001 < errors["torch"] < 0.012
    assert 0.008 < errors["torch-int8"] < 0.02
    assert 0.03 < errors["torch-fp8"] < 0.055
    for name, words in (("fp8", "about 4 %"), ("int8", "about 1 %")):
        assert {words in backends.ROWS[f"{kind}-{name}"].error for kind in ("torch", "triton")} == {
            True
        }


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_emulation_errs_by_the_rounding(dtype: torch.dtype, hidden: bool) -> None:
    blocks = random_blocks(SIZES, kept=0.5, heads=[0, 1, 1, 0], seed=3)
    tensors, key_mask = inputs(dtype), padding() if hidden else None
    expected, expected_lse = exact(tensors, blocks, key_mask)
    (out, lse), (_, of_int8) = (
        block_sparse_attention(
            *hiding(tensors, key_mask), blocks, scale=0.125, key_mask=key_mask, return_lse=True,
            backend=f"torch-{name}",
        )
        for name in ("fp8", "int8")
    )  # fmt: skip
    assert out.dtype == dtype
    blind = expected_lse.isinf()
    assert blind.any() and torch.equal(lse.isinf(), blind) and not out[blind].any()
    assert 0.01 < error(out[:1], expected[:1]) < 0.05
    torch.testing.assert_close(lse, of_int8, rtol=1e-5, atol=1e-5)
    assert (lse.double() - expected_lse)[~blind].abs().max() < 0.1


def test_what_cannot_be_computed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = random_blocks([8, 8])
    q, k, v = random_qkv(1, 16, 1, 32)
    with pytest.raises(RuntimeError, match=r"triton-fp8.*GPU"):
        block_sparse_attention(q, k, v, blocks, backend="triton-fp8")
    with pytest.raises(RuntimeError, match="no gradients"):
        block_sparse_attention(q.requires_grad_(), k, v, blocks, backend="torch-fp8")
    for capability, able in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((10, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        reason = support.fp8_reason(torch.device("cuda", 0))
        assert (reason is None) == able
        number = ".".join(map(str, capability))
        words = f"8.9 or above (Ada, Hopper, Blackwell), and this GPU has {number}"
        assert able or words in str(reason)


def test_auto_never_takes_it() -> None:
    for name in ("triton-fp8", "torch-fp8"):
        row = backends.ROWS[name]
        assert not row.unasked and not row.measured and set(row.operators) == {"block_sparse"}


def test_a_patched_pipeline_says_what_was_rounded() -> None:
    model = wan()
    options = {"window": (-1, 1, 2), "dense_steps": 0}
    with diffpatch.patched(model.pipe, "window", **options, backend="torch"):
        full = model.run()
    with diffpatch.patched(model.pipe, "window", **options, backend="torch-fp8"):
        rounded = model.run()
        report = diffpatch.report(model.pipe)
    assert set(report.backends) == {"torch-fp8"}
    assert report.notes.count(f"backend 'torch-fp8': {backends.FP8_ERROR}") == 1
    assert 0 < (rounded - full).abs().mean() < 0.02


@pytest.mark.parametrize("size", [64, 72])
@pytest.mark.parametrize("hidden", [False, True])
def test_the_kernel_rounds_values_as_defined(size: int, hidden: bool) -> None:
    """And puts them where weights are: channels first, tiles apart, eighths taking turns."""
    pytest.importorskip("triton")
    from diffpatch.kernels.block_sparse.apart import ALIGNED, LONGEST, apart
    from diffpatch.kernels.block_sparse.fp8.triton_values import quantize_values
    from tests.kernels.gpu.triton_interpreter import interpreted

    blocks, (_, _, v) = random_blocks(SIZES, seed=4), inputs(size=size)
    key_mask, places = padding() if hidden else None, apart(blocks)
    assert places.length == sum(-(-n // ALIGNED) * ALIGNED for n in SIZES) + LONGEST
    _, _, v = hiding((v, v, v), key_mask)
    mean = mean_key(v, key_mask)
    expected, expected_scales = levels.quantize_values(v, mean, key_mask)
    with interpreted(), poisoned():
        found, scales = quantize_values(v.mT.contiguous().mT, mean, blocks, places, key_mask)
    torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)
    assert found.shape == (2, 2, size, places.length)
    straight = found.float().unflatten(3, (-1, 4, 2, 2)).transpose(4, 5).flatten(3)  # 16 at a time
    laid = torch.zeros_like(straight)
    starts, begins = blocks.starts.tolist(), places.starts.tolist()
    for tile, (begin, length) in enumerate(zip(begins, SIZES, strict=True)):
        tokens = blocks.order[starts[tile] : starts[tile + 1]]
        laid[..., begin : begin + length] = expected.float()[:, tokens].permute(0, 2, 3, 1)
    torch.testing.assert_close(straight, laid, rtol=0.13, atol=2**-9)  # where one is halfway
    assert (straight != laid).float().mean() < 1e-3


@pytest.mark.parametrize(
    ("arch", "loads", "size", "hidden"),
    [
        (90, "tma", 64, False), (89, "pointer", 72, True), (100, "tma", 128, True),
        (89, "pointer", 64, False), (90, "pointer", 96, False),
    ],
)  # fmt: skip
def test_the_kernel_computes_what_the_emulation_does(
    arch: int, loads: str, size: int, hidden: bool
) -> None:
    pytest.importorskip("triton")
    from diffpatch.kernels.block_sparse.gpu import triton_forward
    from tests.kernels.gpu.triton_interpreter import interpreted

    blocks = random_blocks(SIZES, kept=0.5, heads=[0, 1, 1, 0], seed=5)
    tensors, key_mask, scale = inputs(size=size), padding() if hidden else None, size**-0.5
    expected, expected_lse = exact(tensors, blocks, key_mask)
    tensors = hiding(tensors, key_mask)
    with interpreted(), poisoned(), mock.patch.object(triton_forward, "arch", lambda device: arch):
        out, lse = triton_forward.attend_triton_fp8(
            *tensors, blocks, scale, key_mask, True, loads=loads
        )
    emulated, emulated_lse = attend_torch_fp8(*tensors, blocks, scale, key_mask, True)
    assert emulated_lse is not None
    seen = ~expected_lse.isinf()
    assert torch.equal(~lse.isinf(), seen) and not out[~seen].any()
    torch.testing.assert_close(lse[seen], emulated_lse[seen], rtol=1e-5, atol=1e-4)
    of_kernel, of_emulation = error(out[:1], expected[:1]), error(emulated[:1], expected[:1])
    assert 0.9 * of_emulation < of_kernel < 1.1 * of_emulation < 0.05
    between = (out.double() - emulated.double())[:1].norm() / expected[:1].norm()
    assert between < of_emulation / 2  # weights are rounded by the largest score so far


def test_a_launch_compiles_with_descriptors_of_8_bit_floats() -> None:
    pytest.importorskip("triton")
    from diffpatch.kernels.block_sparse.gpu import triton_forward
    from tests.kernels.gpu.pretend_gpu import pretend_gpu

    blocks: BlockIndex = random_blocks([64, 40], kept=1.0)
    tensors = random_qkv(1, 104, 1, 64, torch.bfloat16)
    with pretend_gpu(90) as gpu, mock.patch.object(triton_forward, "arch", lambda device: 90):
        triton_forward.attend_triton_fp8(*tensors, blocks, 0.125, None, True)
    names = [launch["name"] for launch in gpu.launches]
    assert names == ["quantize_kernel", "values_kernel", "attend_kernel"]
