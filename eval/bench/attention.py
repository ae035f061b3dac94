"""One attention call: methods against the fastest dense attention that torch offers here.

Every result is checked before its speed counts: against a masked fp64 softmax on some rows. Times
are paired: dense and all methods take turns, and the speedup is the median of the rounds' ratios.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

import diffpatch
from diffpatch.checking import refuse_dense
from diffpatch.eval.bench.case import AttentionCase, Tensors
from diffpatch.eval.bench.checking import TOLERANCE, WrongResult, error_on_rows
from diffpatch.eval.bench.timing import dense_call, dense_times, interleaved
from diffpatch.eval.environment import environment
from diffpatch.eval.medians import quartiles
from diffpatch.eval.quality.metrics import relative_l1
from diffpatch.pipelines.running.loading import choose_device


def bench_attention(
    case: AttentionCase,
    methods: Mapping[str, diffpatch.Method],
    *,
    repeats: int = 5,
    backend: str = "auto",
) -> dict[str, Any]:
    """Measure methods on one case; the result is ready for JSON.

    Raises:
        WrongResult: an output is wrong, so that no speed is reported at all.
        BadParameter: a method is called "dense", as what all are compared with is.
    """
    refuse_dense(methods)
    device = choose_device(case.device)
    qkv = case.tensors()
    tried = dense_times(case, qkv)
    fastest = min(tried, key=lambda name: tried[name])
    calls: dict[str, Callable[[], Any]] = {"dense": dense_call(fastest, qkv)}
    entries: list[dict[str, Any]] = []
    for name, method in methods.items():
        start = time.perf_counter()
        pattern = method.pattern(case.grid, method.variant(0, 0))
        plan_seconds = time.perf_counter() - start
        calls[name] = _method_call(qkv, case.grid, method, backend)
        entries.append({
            "name": name,
            "method": str(method),
            "kept": pattern.kept,
            "error": check(name, method, case, qkv, pattern, backend),
            "plan_seconds": plan_seconds,
        })  # fmt: skip
    times = interleaved(calls, repeats, device)
    for entry in entries:
        own = times[entry["name"]]
        ratios = [d / m for d, m in zip(times["dense"], own, strict=True)]
        entry |= {"seconds": quartiles(own), "speedup": quartiles(ratios)}
    shape = {"grid": str(case.grid), "tokens": case.grid.num_tokens, "dtype": str(case.dtype)}
    return {
        "case": {**asdict(case), **shape},
        "repeats": repeats,
        "dense": {"backend": fastest, "tried": tried, "seconds": quartiles(times["dense"])},
        "methods": entries,
        "environment": environment(device),
    }


def check(
    name: str,
    method: diffpatch.Method,
    case: AttentionCase,
    qkv: Tensors,
    pattern: diffpatch.BlockPattern,
    backend: str,
) -> float:
    """The relative L1 error of a method, by the test that fits it.

    Raises:
        WrongResult: the error is above what the dtype explains.
        BadParameter: the method cannot be measured in a single call.
    """
    state: dict[str, Any] = {}
    out = diffpatch.attention(*qkv, case.grid, method, backend=backend, state=state)
    if state:
        raise diffpatch.BadParameter(
            f"{name} costs more in some steps than in others, which one call cannot show; "
            "use `diffpatch bench render`"
        )
    if method.only_skips:
        error = error_on_rows(out, qkv, pattern)
    else:
        # No mask says what it should give, so its own definition in fp64 does, on the first head.
        q, k, v = (x[:1, :, :1].cpu().double() for x in qkv)
        expected = diffpatch.attention(q, k, v, case.grid, method, backend="reference")
        error = relative_l1(out[:1, :, :1].cpu(), expected)
    if not error <= TOLERANCE[case.dtype]:  # also true for NaN
        raise WrongResult(
            f"{name} is wrong: relative error {error:.2g}, expected at most "
            f"{TOLERANCE[case.dtype]:.0e}; no speed is reported"
        )
    return error


def _method_call(
    qkv: Tensors, grid: diffpatch.TokenGrid, method: diffpatch.Method, backend: str
) -> Callable[[], torch.Tensor]:
    return lambda: diffpatch.attention(*qkv, grid, method, backend=backend)
