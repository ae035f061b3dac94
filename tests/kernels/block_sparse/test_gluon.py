"""The Hopper kernel in Gluon: emulated against the definition, under every order of events."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from diffpatch.kernels.block_sparse.gpu import gluon_forward as block_sparse_gluon
from diffpatch.kernels.block_sparse.gpu import gluon_kernel as block_sparse_gluon_kernel
from diffpatch.kernels.block_sparse.gpu.gluon_forward import HopperConfig
from diffpatch.kernels.blocks import BlockIndex
from tests.exactness import Tensors, assert_exact, poisoned
from tests.kernels.gpu.gluon_emulator import KernelError, emulated
from tests.kernels.gpu.pretend_gpu import pretend_gpu
from tests.kernels.random_blocks import HARD_INPUTS, random_blocks, random_qkv

SIZES = [128, 128, 72, 30]


def attend(
    inputs: Tensors,
    blocks: BlockIndex,
    key_mask: torch.Tensor | None = None,
    *,
    seed: int = 0,
    config: HopperConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel, emulated, with outputs that are NaN unless it writes them."""
    scale = inputs[0].shape[-1] ** -0.5
    with emulated(block_sparse_gluon, "attend_kernel", seed), poisoned():
        return block_sparse_gluon.attend_gluon(
            *inputs, blocks, scale, key_mask, True, config=config
        )


def assert_exact_enough(
    inputs: Tensors, blocks: BlockIndex, key_mask: torch.Tensor | None = None, **options: Any
) -> None:
    assert_exact(attend(inputs, blocks, key_mask, **options), inputs, blocks, key_mask)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_n", [64, 128])
def test_head_sizes_and_dtypes(size: int, dtype: torch.dtype, block_n: int) -> None:
    blocks = random_blocks(SIZES, kept=0.7, partial=0.5, seed=1)
    inputs = random_qkv(1, sum(SIZES), 1, size, dtype)
    assert_exact_enough(inputs, blocks, config=HopperConfig(block_n, 2))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("turns", [False, True])
def test_any_order_of_events(seed: int, stages: int, turns: bool) -> None:
    blocks = random_blocks([128] * 7, kept=0.9, partial=0.4, seed=seed)
    inputs = random_qkv(1, 7 * 128, 1, 64, torch.bfloat16, seed=seed)
    assert_exact_enough(inputs, blocks, seed=seed, config=HopperConfig(128, stages, turns))


@pytest.mark.parametrize(
    ("sizes", "edge"),
    [
        ([100, 100, 60], 100),  # no tile fills its sub-blocks
        ([150, 200], 200),  # more than a program holds
        ([1, 3, 2], 65),
        ([77], 128),
    ],
)
def test_tiles_of_any_size(sizes: list[int], edge: int) -> None:
    blocks = random_blocks(sizes, kept=0.8, partial=0.5, edge=edge, seed=2)
    assert_exact_enough(random_qkv(2, sum(sizes), 1, 64, torch.bfloat16), blocks)


@pytest.mark.parametrize("kept", [0.0, 0.15, 1.0])
@pytest.mark.parametrize("partial", [0.0, 1.0])
def test_empty_rows_and_full_ones(kept: float, partial: float) -> None:
    blocks = random_blocks(SIZES, kept=kept, partial=partial, seed=3)
    assert_exact_enough(random_qkv(1, sum(SIZES), 1, 64, torch.bfloat16), blocks)


@pytest.mark.parametrize("hidden", [False, True])
def test_batches_patterns_of_heads_grouped_queries_and_key_masks(hidden: bool) -> None:
    blocks = random_blocks(SIZES, kept=0.4, heads=[1, 0, 0, 2], seed=4)
    key_mask = torch.rand(2, sum(SIZES), generator=torch.Generator().manual_seed(0)) < 0.5
    inputs = random_qkv(2, sum(SIZES), 4, 128, torch.bfloat16, key_heads=2)
    assert_exact_enough(inputs, blocks, key_mask if hidden else None)


def test_strided_tensors() -> None:
    blocks = random_blocks(SIZES, kept=0.6, seed=6)
    ordered = dataclasses.replace(blocks, order=torch.arange(sum(SIZES)))
    fused = torch.cat(random_qkv(2, sum(SIZES), 2, 64, torch.bfloat16), 2)
    q, k, v = fused.split(2, 2)
    assert_exact_enough((q, k, v), ordered)
    assert_exact_enough((q.mT.contiguous().mT, k, v.expand_as(k)), blocks)


@pytest.mark.parametrize("kind", HARD_INPUTS)
def test_no_worse_than_dense_attention(kind: str) -> None:
    """The error against fp64 is at most 1.5 times that of SDPA in the same dtype."""
    sizes = [128] * 4
    blocks = random_blocks(sizes, kept=1.0, partial=0.0, seed=7)
    q, k, v = random_qkv(1, sum(sizes), 2, 128, torch.bfloat16)
    q, k = HARD_INPUTS[kind](q, k)
    q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
    exact = F.scaled_dot_product_attention(q_.double(), k_.double(), v_.double())
    dense = F.scaled_dot_product_attention(q_, k_, v_)
    out, _ = attend((q, k, v), blocks)
    error = (out.transpose(1, 2).double() - exact).norm()
    assert error <= 1.5 * (dense.double() - exact).norm()


@pytest.mark.parametrize("size", [64, 128])
def test_it_launches(size: int) -> None:
    """What the launcher of Triton makes of the arguments compiles and fits."""
    blocks = random_blocks(SIZES, kept=0.5, seed=1)
    inputs = random_qkv(2, sum(SIZES), 2, size, torch.bfloat16)
    configs = [None, *block_sparse_gluon.alternatives(size).values()]
    with pretend_gpu(90) as gpu:
        for config in configs:
            block_sparse_gluon.attend_gluon(*inputs, blocks, 0.1, None, True, config=config)
    assert [launch["grid"] for launch in gpu.launches] == [(4, 4, 1)] * len(configs)


def test_why_it_cannot_run() -> None:
    blocks = random_blocks(SIZES, seed=1)
    q, _, _ = random_qkv(1, sum(SIZES), 1, 64, torch.bfloat16)
    small = random_blocks([64, 64], seed=1)
    with mock.patch.object(block_sparse_gluon, "arch", lambda device: 90):
        reason = block_sparse_gluon.unsupported_reason
        assert reason(q, blocks) is None
        assert "fp16, and q is torch.float32" in str(reason(q.float(), blocks))
        assert "q has 96" in str(reason(q.new_zeros(1, 10, 1, 96), blocks))
        assert "not 64" in str(reason(q, small))
        assert "65535" in str(reason(q[:, :1].expand(70000, 1, 1, 64), blocks))
    with mock.patch.object(block_sparse_gluon, "arch", lambda device: 100):
        assert "this GPU has 10.0" in str(reason(q, blocks))


# That the emulator finds mistakes: the kernel with one thing wrong.

MISTAKES = {
    "values given away before they are read": (
        "            acc = warpgroup_mma_wait(0, deps=(sums, left))[0]\n"
        "            mbarrier.arrive(values_free.index(before), count=1)\n",
        "            mbarrier.arrive(values_free.index(before), count=1)\n"
        "            acc = warpgroup_mma_wait(0, deps=(sums, left))[0]\n",
        "buffer changed",
    ),
    "values not waited for": (
        "            mbarrier.wait(values_ready.index(before), (n - 1) // STAGES & 1)\n",
        "",
        None,
    ),
    "values never given back": (
        "            mbarrier.arrive(values_free.index(before), count=1)\n",
        "",
        "deadlock",
    ),
    "sums used in flight": (
        "            acc = warpgroup_mma_wait(0, deps=(sums, left))[0]\n",
        "            acc = warpgroup_mma_wait(1, deps=(sums, left))[0]\n",
        "not been waited for",
    ),
    "nobody begins": ("((n - 1) & 1) ^ (1 - which)", "(n - 1) & 1", "deadlock"),
    "no fence": ("    fence_async_shared()", "    pass", "without a fence"),
    "the wrong phase": ("mbarrier.wait(keys_free.index(slot), phase ^ 1)", "pass", None),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_emulator_finds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong, words = MISTAKES[name]
    source = Path(block_sparse_gluon_kernel.__file__).read_text()
    assert source.count(right) == 1
    path = tmp_path / "wrong_kernel.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("wrong_kernel", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(block_sparse_gluon, "attend_kernel", module.attend_kernel)
    blocks = random_blocks([128] * 7, kept=1.0, partial=0.4, seed=0)
    inputs = random_qkv(1, 7 * 128, 1, 64, torch.bfloat16)
    with pytest.raises((KernelError, AssertionError), match=words):
        assert_exact_enough(inputs, blocks, config=HopperConfig(128, 2))


def test_a_ring_of_one_hangs() -> None:
    """Which is why `HopperConfig.num_stages` is at least 2."""
    blocks = random_blocks([128] * 4, kept=1.0, seed=0)
    with pytest.raises(KernelError, match="deadlock"):
        attend(random_qkv(1, 512, 1, 64, torch.bfloat16), blocks, config=HopperConfig(128, 1))
