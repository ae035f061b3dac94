"""One attention call: methods against the fastest dense attention that torch offers here.

Every result is checked before its speed counts: against a masked fp64 softmax on some rows. Times
are paired: dense and all methods take turns, and the speedup is the median of the rounds' ratios.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import diffpatch
from diffpatch.eval.environment import environment
from diffpatch.eval.quality.metrics import relative_l1
from diffpatch.pipelines.running.loading import choose_device

DENSE = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
CHECKED_ROWS = 64
SHORTEST = 0.02  # seconds a timing should last, so that the clock does not matter
MATH_LIMIT = 2**31  # bytes of scores above which the unfused dense attention is not even tried

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class WrongResult(RuntimeError):
    """A method's output is not what its own pattern says; its speed means nothing."""


@dataclass(frozen=True)
class Case:
    """The call that is measured; q, k and v are normal noise, (batch, tokens, heads, head_dim)."""

    grid: diffpatch.TokenGrid
    heads: int = 3
    head_dim: int = 64
    batch: int = 1
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0

    def tensors(self) -> Tensors:
        """q, k and v; the same on every device."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.batch, self.grid.num_tokens, self.heads, self.head_dim)
        q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
        place: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        return q.to(**place), k.to(**place), v.to(**place)


def bench_attention(
    case: Case,
    methods: Mapping[str, diffpatch.Method],
    *,
    repeats: int = 5,
    backend: str = "auto",
) -> dict[str, Any]:
    """Measure methods on one case; the result is ready for JSON.

    Raises:
        WrongResult: an output is wrong, so that no speed is reported at all.
    """
    device = choose_device(case.device)
    qkv = case.tensors()
    dense_times = _dense_times(case, qkv)
    fastest = min(dense_times, key=lambda name: dense_times[name])
    calls: dict[str, Callable[[], Any]] = {"dense": lambda: dense_call(fastest, *qkv)}
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
        entry |= {"seconds": spread(own), "speedup": spread(ratios)}
    shape = {"grid": str(case.grid), "tokens": case.grid.num_tokens, "dtype": str(case.dtype)}
    return {
        "case": {**asdict(case), **shape},
        "repeats": repeats,
        "dense": {"backend": fastest, "tried": dense_times, "seconds": spread(times["dense"])},
        "methods": entries,
        "environment": environment(device),
    }


def check(
    name: str,
    method: diffpatch.Method,
    case: Case,
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
    if type(method).attend is diffpatch.Method.attend:
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


def error_on_rows(out: torch.Tensor, qkv: Tensors, pattern: diffpatch.BlockPattern) -> float:
    """The relative L1 distance to a masked fp64 softmax, on some query rows of the first batch."""
    q, k, v = (tensor[:1].double().cpu().transpose(1, 2) for tensor in qkv)  # (1, H, S, D)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(q.shape[2], generator=generator)[:CHECKED_ROWS]
    mask = visible(pattern, rows, heads=q.shape[1])
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    expected = F.scaled_dot_product_attention(q[:, :, rows], k, v, attn_mask=mask)
    return relative_l1(out[:1].cpu()[:, rows].transpose(1, 2), expected)


def visible(pattern: diffpatch.BlockPattern, rows: torch.Tensor, heads: int) -> torch.Tensor:
    """bool (H, R, S): the keys that some query rows see, read off the block lists one by one."""
    b = pattern.blocks
    place = torch.empty_like(b.order)
    place[b.order] = torch.arange(len(place))
    starts = b.starts.long()
    seen = torch.zeros(b.num_patterns, len(rows), len(place), dtype=torch.bool)
    for p in range(b.num_patterns):
        for i, where in enumerate(place[rows].tolist()):
            tile = int(torch.searchsorted(starts, where, right=True)) - 1
            line = p * b.num_tiles + tile
            for entry in range(int(b.row_ptr[line]), int(b.row_ptr[line + 1])):
                first, last = starts[b.cols[entry]], starts[b.cols[entry] + 1]
                mask_id = int(b.mask_ids[entry])
                row = b.masks[mask_id, where - starts[tile]] if mask_id >= 0 else None
                keys = b.order[first:last]
                seen[p, i, keys] = True if row is None else row[: last - first]
    choice = torch.zeros(heads, dtype=torch.long) if b.head_pattern is None else b.head_pattern
    return seen[choice.long()]


def interleaved(
    calls: dict[str, Callable[[], Any]], repeats: int, device: torch.device
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


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return {"median": median(values), "low": low, "high": high}


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


def _method_call(
    qkv: Tensors, grid: diffpatch.TokenGrid, method: diffpatch.Method, backend: str
) -> Callable[[], torch.Tensor]:
    return lambda: diffpatch.attention(*qkv, grid, method, backend=backend)


def dense_call(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Dense attention by one of torch's backends, (B, S, H, D) in and (B, H, S, D) out."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    with sdpa_kernel(getattr(SDPBackend, name)):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def fastest_dense(case: Case, qkv: Tensors) -> str:
    """The dense backend that is fastest on these tensors."""
    times = _dense_times(case, qkv)
    return min(times, key=lambda name: times[name])


def _dense_times(case: Case, qkv: Tensors) -> dict[str, float]:
    """Seconds of every dense implementation that accepts these tensors."""
    scores = case.batch * case.heads * case.grid.num_tokens**2 * 4
    times: dict[str, float] = {}
    for name in DENSE:
        if name == "MATH" and times and scores > MATH_LIMIT:
            continue
        try:
            call = functools.partial(dense_call, name, *qkv)
            times[name] = median(interleaved({name: call}, 3, qkv[0].device)[name])
        except RuntimeError:  # torch has no such kernel for this device, dtype or head size
            continue
    return times
