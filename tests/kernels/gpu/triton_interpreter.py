"""Triton's interpreter, repaired: kernels run on CPU tensors, with bf16 as a GPU computes it.

The stock interpreter multiplies the bit patterns of bf16 numbers, truncates them and 8-bit floats
where a GPU rounds to nearest even, and reads outside of tensors without a word. It must also be
chosen before triton is imported. `interpreted()` repairs the first three, and interprets what is
launched inside it in a process that can compile as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter, jit

from diffpatch.kernels.gpu import support
from tests.exactness import poisoned

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle


@contextmanager
def interpreted() -> Iterator[None]:
    """Every Triton kernel launched inside runs interpreted, with checked addresses."""
    functions: dict[int, Any] = {}

    def function(kernel: Any) -> Any:
        if id(kernel) not in functions:
            functions[id(kernel)] = interpreter.InterpretedFunction(kernel.fn)
        return functions[id(kernel)]

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        with _bounds(args, options), _language_patched_once():
            return function(self).run(*args, grid=grid, warmup=warmup, **options)

    with (
        mock.patch.object(
            jit.JITFunction, "__call__", lambda self, *a, **k: function(self)(*a, **k)
        ),
        mock.patch.object(jit.JITFunction, "run", run),
        mock.patch.multiple(Builder, **_repaired()),
    ):
        yield


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """The backend "triton" runs here, interpreted, and its outputs are NaN unless written."""
    with (
        interpreted(),
        poisoned(),
        mock.patch.object(support, "unsupported_reason", lambda *_: None),
    ):
        yield


@contextmanager
def _language_patched_once() -> Iterator[None]:
    """Patch `triton.language` once a launch, and undo all of it at its end.

    The stock interpreter patches again in every call of a device function and leaves those patches
    behind, so that nothing compiles afterwards.
    """
    patch = interpreter._patch_lang
    outermost: list[Any] = []
    done: set[int] = set()

    def patch_once(kernel: Any) -> Any:
        modules = {id(x) for x in kernel.__globals__.values() if x is tl or x is tl.core}
        if modules <= done:
            return interpreter._LangPatchScope()
        done.update(modules)
        scope = patch(kernel)
        if not outermost:
            outermost.append(scope)
            return scope
        outermost[0]._changes += scope._changes  # undone in reverse, with the launch's own
        return interpreter._LangPatchScope()

    with mock.patch.object(interpreter, "_patch_lang", patch_once):
        yield


def _repaired() -> dict[str, Any]:
    """The builder's methods that mishandle bf16, wrapped."""
    cast, binary, dot = Builder.cast_impl, Builder.binary_op, Builder.create_dot
    convert = Builder.create_fp_to_fp

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if _is_bf16(source.dtype) and not _is_bf16(target):
            return cast(self, _widened(source), target)
        if _is_bf16(target) and not _is_bf16(source.dtype):
            return _narrowed(cast(self, source, tl.float32))
        return cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if _is_bf16(source.dtype) or _is_bf16(target):
            return cast_impl(self, source, target)
        if target.scalar == tl.float8e4nv and source.dtype.scalar == tl.float32:
            return _in_e4m3(source)
        return convert(self, source, target, rounding)

    def binary_op(self: Any, left: Any, right: Any, operation: Any) -> Any:
        bitwise = operation in (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
        if not _is_bf16(left.dtype) or bitwise:
            return binary(self, left, right, operation)
        result = operation(_widened(left).data, _widened(right).data)
        if result.dtype == np.bool_:
            return Handle(result, tl.int1)
        return _narrowed(Handle(result, tl.float32))

    def create_dot(self: Any, a: Any, b: Any, c: Any, *options: Any) -> Any:
        return dot(self, _widened(a), _widened(b), c, *options)

    return {
        "cast_impl": cast_impl,
        "create_fp_to_fp": create_fp_to_fp,
        "binary_op": binary_op,
        "create_dot": create_dot,
    }


def _is_bf16(dtype: Any) -> bool:
    return bool(dtype.scalar == tl.bfloat16)


def _widened(handle: Any) -> Any:
    """A bf16 handle (stored as its bits) as fp32; any other as it is."""
    if not _is_bf16(handle.dtype):
        return handle
    bits = handle.data.astype(np.uint32) << np.uint32(16)
    return Handle(bits.view(np.float32), tl.float32)


def _narrowed(handle: Any) -> Any:
    """An fp32 handle as bf16 bits, rounded to nearest even."""
    bits = np.ascontiguousarray(handle.data, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return Handle(np.where(np.isnan(handle.data), np.uint16(0x7FC0), rounded), tl.bfloat16)


def _in_e4m3(handle: Any) -> Any:
    """An fp32 handle as 8-bit floats, rounded to nearest even, what is too large to the largest."""
    numbers = torch.from_numpy(np.ascontiguousarray(handle.data)).clamp(-448.0, 448.0)
    return Handle(numbers.to(torch.float8_e4m3fn).view(torch.uint8).numpy(), tl.float8e4nv)


@contextmanager
def _bounds(args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[None]:
    """Refuse loads and stores outside of the tensor arguments of a launch."""
    load, store = Builder.create_masked_load, Builder.create_masked_store
    given = [getattr(x, "base", x) for x in (*args, *options.values())]  # of a tensor descriptor
    tensors = [x for x in given if isinstance(x, torch.Tensor) and x.numel()]
    spans = sorted(_span(x) for x in tensors)
    first = np.array([begin for begin, _ in spans], np.uint64)
    # Views of one storage overlap: an address is inside if any span that began before reaches it.
    last = np.maximum.accumulate(np.array([end for _, end in spans], np.uint64))

    def check(self: Any, what: str, pointers: Any, mask: Any) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        at, chosen = np.broadcast_arrays(pointers.data, mask.data)
        at = at[chosen.astype(bool)]
        owner = np.searchsorted(first, at, side="right") - 1
        outside = (owner < 0) | (at + np.uint64(size) > last[np.maximum(owner, 0)])
        if outside.any():
            raise IndexError(
                f"{outside.sum()} of {at.size} addresses of a {what} are out of bounds"
            )

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        check(self, "load", pointers, mask)
        return load(self, pointers, mask, *rest, **named)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(self, "store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with mock.patch.multiple(
        Builder, create_masked_load=checked_load, create_masked_store=checked_store
    ):
        yield


def _span(x: torch.Tensor) -> tuple[int, int]:
    """The first address of a tensor and the one after its last."""
    reach = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (reach + 1) * x.element_size()
