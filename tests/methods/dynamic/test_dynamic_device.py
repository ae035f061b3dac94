"""`dynamic` on a GPU: what it reads back from the device, which is nothing, and its gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffpatch import Dynamic, TokenGrid
from diffpatch.kernels.active_tiles import api as active_tiles
from diffpatch.kernels.active_tiles.table import tile_table
from diffpatch.kernels.gpu import support
from diffpatch.methods.base import Attended, AttentionCall
from tests.kernels.random_blocks import random_qkv
from tests.methods.dynamic.test_dynamic_definition import by_definition

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
GRID = TokenGrid(2, 7, 9, text_before=4, text_after=3)
RESTS = [("virtual", True), ("virtual", False), ("drop", True)]


def method_of(rest: str, correct: bool) -> Dynamic:
    return Dynamic(rest=rest, kept=0.3, tile=16, strip=8, pool=4, correct=correct)


def inputs(dtype: torch.dtype = torch.float64) -> Tensors:
    """Batch 2, grouped heads, to be differentiated."""
    tensors = random_qkv(2, GRID.num_tokens, 4, 8, torch.float64, key_heads=2)
    q, k, v = (x.to(dtype).requires_grad_() for x in tensors)
    return q, k, v


def hidden(method: Dynamic) -> torch.Tensor:
    """bool (2, S): some keys, and a strip as a whole."""
    mask = torch.rand(2, GRID.num_tokens, generator=torch.Generator().manual_seed(2)) < 0.8
    mask[1, method.pattern(GRID).blocks.order[16:24]] = False
    return mask


def gradients(out: torch.Tensor, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(5)
    towards = torch.randn(out.shape, generator=random, dtype=torch.float64).to(out.dtype)
    return torch.autograd.grad(out, tensors, towards)


def chosen(method: Dynamic, state: dict[str, Any]) -> torch.Tensor:
    """bool (B, H, N, n): the strips that are exact."""
    table = tile_table(method.pattern(GRID).blocks, method.strip)
    shape = (table.num_tiles, len(table.strips))
    return active_tiles.unpack(state["bits"], math.prod(shape)).unflatten(3, shape)[:, :, 0]


@pytest.mark.parametrize(("rest", "correct"), RESTS)
def test_gradients_are_those_of_the_definition(rest: str, correct: bool) -> None:
    """Through the chosen strips, through virtual tokens and through what corrects them."""
    method, tensors = method_of(rest, correct), inputs()
    mask, state = hidden(method), dict[str, Any]()
    call = AttentionCall(method.pattern(GRID), key_mask=mask, state=state)
    found = gradients(method.attend(*tensors, call).out, tensors)
    exact = chosen(method, state)
    expected = gradients(by_definition(method, list(tensors), GRID, mask, exact), tensors)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()
        assert other.norm() > 1


@pytest.mark.parametrize(("rest", "correct"), RESTS)
def test_on_a_gpu_kernels_choose_and_pytorch_differentiates(rest: str, correct: bool) -> None:
    pytest.importorskip("triton")
    from diffpatch.kernels.selection import triton_impl
    from tests.kernels.gpu.triton_interpreter import as_on_a_gpu

    method, tensors = method_of(rest, correct), inputs(torch.float32)
    state = dict[str, Any]()
    call = AttentionCall(method.pattern(GRID), state=state)
    with as_on_a_gpu(), mock.patch.object(triton_impl, "choose", wraps=triton_impl.choose) as used:
        done = method.attend(*tensors, call)
        found = gradients(done.out, tensors)
    assert used.call_count == 1 and done.backend == "torch"
    exact = [x.detach().double().requires_grad_() for x in tensors]
    everything = torch.ones(2, GRID.num_tokens, dtype=torch.bool)
    out = by_definition(method, exact, GRID, everything, chosen(method, state))
    for one, other in zip(found, gradients(out, exact), strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()


class Reading(TorchDispatchMode):
    """Refuses what would read a number back from a GPU."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item")
        assert func._schema.name.removeprefix("aten::") not in waits
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("rest", "correct"), RESTS)
def test_between_choosing_and_attending_nothing_waits(rest: str, correct: bool) -> None:
    """The second of two calls, each of which chooses; kernels are launched and do nothing."""
    pytest.importorskip("triton")
    from triton.runtime import jit

    method, names = method_of(rest, correct), list[str]()
    pattern, tensors = method.pattern(GRID), inputs(torch.bfloat16)

    def launch(kernel: Any, *_: Any, **__: Any) -> None:
        names.append(kernel.fn.__name__)

    def attend() -> Attended:
        call = AttentionCall(pattern, state={})
        with torch.no_grad():
            return method.attend(*tensors, call)

    with (
        mock.patch.object(support, "unsupported_reason", lambda *_: None),
        mock.patch.object(jit.JITFunction, "run", launch),
    ):
        attend()
        names.clear()
        refuse = mock.Mock(side_effect=AssertionError("numbers of the host"))
        with (
            Reading(),
            mock.patch.object(torch, "tensor", refuse),  # which is copied, and waited for
            mock.patch.object(torch.Tensor, "tolist", refuse),
        ):
            assert attend().backend == "triton"
    order = [name for name in names if name in ("choose_kernel", "list_kernel")]
    assert order == ["choose_kernel", "list_kernel"]
    assert names[names.index("list_kernel") + 1] == "attend_active_kernel"
