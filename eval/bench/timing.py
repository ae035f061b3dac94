"""Clocks: calls in turns, so that all see the same machine, and the dense attentions of torch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffpatch.eval.bench.case import AttentionCase, Tensors

DENSE = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
SHORTEST = 0.02  # seconds a timing should last, so that the clock does not matter
MATH_LIMIT = 2**31  # bytes of scores above which the unfused dense attention is not even tried

Call = Callable[[], torch.Tensor]


def interleaved(
    calls: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds a call, `repeats` times each, in turns: all calls see the same machine."""
    counts = {}
    for name, call in calls.items():
        _seconds(call, 1, device)  # warm-up
        counts[name] = max(1, math.ceil(SHORTEST / _seconds(call, 1, device)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(_seconds(call, counts[name], device))
    return times


def dense_call(name: str, qkv: Tensors) -> Call:
    """Dense attention by one of torch's backends, (B, S, H, D) in and (B, H, S, D) out.

    Args:
        name: of `DENSE`; followed by ", by head" for tensors that lie head by head.
        qkv: as a model has them.
    """
    q, k, v = (x.transpose(1, 2) for x in qkv)
    backend, _, by_head = name.partition(", ")
    if by_head:
        q, k, v = (x.contiguous() for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]

    def call() -> torch.Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)

    return call


def fastest_dense(case: AttentionCase, qkv: Tensors) -> str:
    """The dense backend that is fastest on these tensors."""
    times = dense_times(case, qkv)
    return min(times, key=lambda name: times[name])


def dense_times(case: AttentionCase, qkv: Tensors) -> dict[str, float]:
    """Seconds of every dense implementation that accepts these tensors."""
    times: dict[str, float] = {}
    for name in DENSE:
        if name == "MATH" and times and case.score_bytes > MATH_LIMIT:
            continue
        try:
            call = {name: dense_call(name, qkv)}
            times[name] = median(interleaved(call, 3, qkv[0].device)[name])
        except RuntimeError:  # torch has no such kernel for this device, dtype or head size
            continue
    return times


def _seconds(call: Callable[[], Any], count: int, device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    _synchronize(device)
    return (time.perf_counter() - start) / count


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
