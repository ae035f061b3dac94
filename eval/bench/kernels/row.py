"""One row of the kernel benchmark: everything that computes one pattern at one shape, in turns.

What fails or computes something wrong has no speed but a reason, and the rest is measured. Only a
GPU that answers no more ends a row.
"""

from __future__ import annotations

import time
from functools import partial
from statistics import median
from typing import Any

import torch

import diffpatch
from diffpatch.eval.bench.case import Tensors
from diffpatch.eval.bench.checking import TOLERANCE, exact_rows
from diffpatch.eval.bench.kernels.measurements import failure
from diffpatch.eval.bench.kernels.rivals import flex_call, natten_call
from diffpatch.eval.bench.kernels.shapes import Shape
from diffpatch.eval.bench.kernels.variants import Variants, variant_calls
from diffpatch.eval.bench.kernels.watch import Watch
from diffpatch.eval.bench.timing import DENSE, Call, dense_call, interleaved
from diffpatch.eval.medians import quartiles
from diffpatch.eval.quality.metrics import relative_l1
from diffpatch.kernels.block_sparse.api import block_sparse_attention, work_of
from diffpatch.kernels.block_sparse.backends import unsupported_reason
from diffpatch.kernels.blocks import BlockIndex

# On normal noise: of 8-bit scores, and of 8-bit floats besides.
ROUNDED = {"int8": 4e-2, "fp8": 8e-2}
PERMUTING = "permuting"


def measure(
    shape: Shape,
    method: diffpatch.Method,
    pattern: diffpatch.BlockPattern,
    qkv: Tensors,
    dense: str,
    variants: Variants,
    repeats: int,
    watch: Watch,
) -> dict[str, Any]:
    """What there is to say about a pattern at a shape, ready for JSON.

    Args:
        shape: the call.
        method: what made the pattern.
        pattern: the pairs to keep.
        qkv: (B, S, H, D) each.
        dense: the call to beat, a name in `dense_calls`.
        variants: what to measure besides the usual calls.
        repeats: rounds, in each of which everything runs once.
        watch: over every call, so that one knows what a GPU hangs in.

    Raises:
        DeviceLost: after an error of the GPU that does not go away.
    """
    device = qkv[0].device
    blocks = pattern.on(device)
    calls = sparse_calls(qkv, blocks) | variant_calls(qkv, blocks, variants)
    if method == shape.method:  # compiling for every fraction would take most of the time
        calls |= rival_calls(qkv, blocks, shape)
    chosen, expected = exact_rows(qkv, pattern)
    entries: dict[str, dict[str, Any]] = {}
    for name, call in calls.items():
        with watch(name):
            entries[name] = _checked(name, call, blocks, chosen, expected)
    calls = {name: call for name, call in calls.items() if "failed" not in entries[name]}
    everything = {dense: dense_call(dense, qkv), **calls, PERMUTING: permuting(qkv, blocks)}
    with watch("everything in turns"):
        times = interleaved(everything, repeats, device)
    visited = visited_pairs(blocks)
    flops = 4 * shape.heads * shape.head_dim  # a pair
    for name, call in calls.items():
        ratios = [d / s for d, s in zip(times[dense], times[name], strict=True)]
        entries[name] |= {
            "seconds": quartiles(times[name]),
            "host_seconds": host_seconds(call, device),
            "speedup": quartiles(ratios),
            "tflops": flops * visited / median(times[name]) / 1e12,
            "of_bound": median(ratios) * pattern.kept,
        }
    return {
        "kept": pattern.kept,
        "visited": visited / blocks.num_tokens**2,
        "fastest_dense": dense,
        "dense_seconds": quartiles(times[dense]),
        "dense_tflops": flops * blocks.num_tokens**2 / median(times[dense]) / 1e12,
        "permuting": quartiles(times[PERMUTING]),
        "computed": {
            name: work_of(blocks, name).computed / blocks.num_tokens**2
            for name in ("triton", "torch", "flex")
            if name in calls or f"{name} backend" in calls
        },
        "sparse": entries,
        "unsupported": {
            name: unsupported_reason(qkv[0], blocks, name) for name in ("triton", "gluon")
        },
    }


def _checked(
    name: str, call: Call, blocks: BlockIndex, chosen: torch.Tensor, expected: torch.Tensor
) -> dict[str, Any]:
    """The error of a call on some rows; "failed" says why it has no speed."""
    device = blocks.device
    try:
        out = call()
        if name.endswith("ordered"):
            out = out[:, blocks.order.argsort()]
        error = relative_l1(out[0, chosen].to(expected.device), expected)
    except Exception as reason:  # of any kind: of a rival's compiler, of the driver, of memory
        return {"failed": failure(reason, device)}
    allowed = next((ROUNDED[kind] for kind in ROUNDED if kind in name), TOLERANCE[out.dtype])
    if not error <= allowed:  # or NaN
        return {"error": error, "failed": f"wrong: relative error {error:.2g}"}
    return {"error": error}


def host_seconds(call: Call, device: torch.device, repeats: int = 5) -> float | None:
    """Seconds until a call returns, its work still running on the GPU; None on the CPU.

    Where this is what the whole call takes, it is the host that was measured and not the kernel.
    """
    if device.type == "cpu":
        return None
    times = []
    for _ in range(repeats):
        torch.accelerator.synchronize(device)
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)


def visited_pairs(blocks: BlockIndex) -> int:
    """Query-key pairs of the tiles that a block index visits; of the first pattern, if several."""
    sizes, last = blocks.sizes, int(blocks.row_ptr[blocks.num_tiles])
    return int((sizes[blocks.rows[:last]] * sizes[blocks.cols[:last].long()]).sum())


def permuting(qkv: Tensors, blocks: BlockIndex) -> Call:
    """Put q, k and v in tile order and an output of their size back, and nothing else."""
    place = blocks.order.argsort()

    def call() -> torch.Tensor:
        q, _, _ = (x[:, blocks.order] for x in qkv)
        return q[:, place]

    return call


def sparse_calls(qkv: Tensors, blocks: BlockIndex) -> dict[str, Call]:
    """Every block-sparse implementation that a model would call on these tensors."""
    calls: dict[str, Call] = {}
    for name in ("triton", "torch"):
        slower = name == "torch" and calls and qkv[0].device.type == "cuda"
        if unsupported_reason(qkv[0], blocks, name) is None and not slower:
            calls[name] = partial(block_sparse_attention, *qkv, blocks, backend=name)
    if qkv[0].device.type == "cuda" and unsupported_reason(qkv[0], blocks, "flex") is None:
        calls["flex backend"] = partial(block_sparse_attention, *qkv, blocks, backend="flex")
    return calls


def rival_calls(qkv: Tensors, blocks: BlockIndex, shape: Shape) -> dict[str, Call]:
    """On GPUs, what others ship for the same mask."""
    calls: dict[str, Call] = {}
    if qkv[0].device.type == "cuda":
        calls["flex"] = flex_call(qkv, blocks, compiled=True)
        natten = natten_call(qkv, shape.grid, shape.method)
        if natten is not None:
            calls["natten"] = natten
    return calls


def dense_times(qkv: Tensors, repeats: int = 3) -> dict[str, list[float]]:
    """Seconds of every fused SDPA backend that runs on these tensors, or of the unfused one if none
    does: each with the tensors as they are, and with ones that lie head by head, which can be
    faster.

    Raises:
        RuntimeError: not even the unfused one does.
    """
    calls: dict[str, Call] = {}
    for name in DENSE:
        if name == "MATH" and calls:
            continue
        for layout in (name, f"{name}, by head"):
            call = dense_call(layout, qkv)
            try:
                call()
            except RuntimeError:  # torch has no such kernel for this device, dtype or head size
                continue
            calls[layout] = call
    if not calls:
        raise RuntimeError(f"no dense attention of torch runs on {tuple(qkv[0].shape)}")
    return interleaved(calls, repeats, qkv[0].device)
