"""Where no Triton kernel of ours can run, "auto" takes PyTorch and the reason is in words.

GPUs here are pretended: fake tensors say they are on one, and PyTorch says which.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffpatch.kernels.block_sparse.backends import choose_backend
from diffpatch.kernels.block_sparse.operators import ACTIVE_TILES, BLOCK_SPARSE, LINEAR
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.gpu import support as triton_support
from tests.kernels.random_blocks import random_blocks

pytest.importorskip("triton")

import triton

from diffpatch.kernels.block_sparse.gpu import triton_forward as block_sparse_triton
from diffpatch.kernels.compile import check as compile_check
from diffpatch.kernels.compile.cases import CompileCase, cases, configuration
from tests.kernels.compile.test_compile_check import TABLE
from tests.kernels.gpu.pretend_gpu import pretend_gpu

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What is known of a GPU is remembered for the process."""
    triton_support._gpu_reason.cache_clear()
    yield
    triton_support._gpu_reason.cache_clear()


def choices(blocks: BlockIndex, asked: str) -> list[str]:
    """What block-sparse attention, attention to active tiles and the linear kernels (and virtual
    tokens, which ask the same) run on, for bf16 tensors on a pretended GPU."""
    with FakeTensorMode():
        q = torch.empty(1, blocks.num_tokens, 2, 64, dtype=torch.bfloat16, device=GPU)
    return [
        choose_backend(operator, asked, blocks, q, q, q)
        for operator in (BLOCK_SPARSE, ACTIVE_TILES, LINEAR)
    ]


def with_capability(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 8), (10, 1), (11, 0), (13, 0)])
def test_gpus_that_nothing_was_compiled_for(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_capability(monkeypatch, *capability)
    blocks = random_blocks([64, 37])
    with pretend_gpu(90):  # of the driver, which is not to blame
        assert choices(blocks, "auto") == ["torch"] * 3
        found = ".".join(map(str, capability))
        needed = "need 8.0 or above" if capability[0] < 8 else "only compiled for 8.0, 8.6"
        with pytest.raises(RuntimeError, match=f"'triton' cannot run: .*{found}.*{needed}.*auto"):
            choices(blocks, "triton")
    (record,) = caplog.records  # once, not with every call
    assert found in record.getMessage() and "cuda:0" in record.getMessage()


def test_rocm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with_capability(monkeypatch, 9, 4)  # what PyTorch says of gfx942
    monkeypatch.setattr(torch.version, "hip", "6.2.41133")
    blocks = random_blocks([64, 37])
    assert choices(blocks, "auto") == ["torch"] * 3
    with pytest.raises(RuntimeError, match=r"ROCm \(6\.2\.41133\).*NVIDIA GPUs only.*auto"):
        choices(blocks, "triton")


def test_a_triton_that_is_old_or_absent_or_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with_capability(monkeypatch, 9, 0)
    # There is no GPU, which is how a lacking compiler or driver looks as well: Triton raises.
    assert "triton cannot start here: " in str(triton_support.unsupported_reason(GPU))
    triton_support._gpu_reason.cache_clear()
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert "triton 3.5.1 is too old, 3.6 or newer" in str(triton_support.unsupported_reason(GPU))
    triton_support._gpu_reason.cache_clear()
    monkeypatch.delitem(sys.modules, "triton")
    monkeypatch.setattr(triton_support, "find_spec", lambda name: None)
    assert triton_support.unsupported_reason(GPU) == "triton is not installed"


@pytest.mark.parametrize("name", ["xpu", "mps", "meta"])
def test_other_devices(name: str) -> None:
    assert f"NVIDIA GPUs and q is on {name}" in str(
        triton_support.unsupported_reason(torch.device(name))
    )


@pytest.mark.parametrize("arch", triton_support.GPUS)
def test_known_gpus_take_triton_with_what_was_compiled(
    arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_capability(monkeypatch, *divmod(arch, 10))
    with pretend_gpu(arch):
        assert choices(random_blocks([64, 37]), "auto") == ["triton"] * 3
    like, shared = triton_support.GPUS[arch]
    assert triton_support.arch(GPU) == like and like in compile_check.ARCHS
    assert like // 10 == arch // 10
    assert shared <= triton_support.GPUS[90].shared
    in_table = set(cases([like]))
    assert all(replace(case, arch=like) in in_table for case in cases([arch]))
    blocks, dtype = random_blocks([128, 37]), torch.bfloat16
    with FakeTensorMode():
        q = torch.empty(1, blocks.num_tokens, 2, 128, dtype=dtype, device=GPU)
    launched = block_sparse_triton._configured(q, blocks, "auto")
    assert launched == configuration(CompileCase(like, "forward", "bf16", 128, 128, False))


def test_a_gpu_has_the_shared_memory_of_the_configurations_it_takes() -> None:
    """What the table of compiled cases says they use, on the GPUs that are not in it."""
    table = json.loads(TABLE.read_text())
    for arch, gpu in triton_support.GPUS.items():
        used = [row["shared"] for each in table.values() for row in each if row["arch"] == gpu.like]
        assert used and max(used) <= gpu.shared, arch
