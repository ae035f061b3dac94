"""Measure what attention costs on this machine, and fit a device profile to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

import diffpatch
from diffpatch.eval.bench_attention import Case, dense_call, fastest_dense, interleaved
from diffpatch.eval.environment import environment
from diffpatch.kernels.block_sparse_work import KINDS, Work, dense_work
from diffpatch.pipelines.loading import DTYPES, choose_device
from diffpatch.profiles import DeviceProfile

Row = dict[str, Any]

# What a profile is fitted to: windows that many queries share, lists of each tile's own, masks of
# elements, and virtual tokens, at sizes that take seconds.
GRIDS = ((8, 16, 16), (16, 16, 16), (21, 16, 20), (16, 24, 24))
METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("radial", {}),
    ("radial", {"decay": 0.4}),
    ("neighborhood", {}),
    ("neighborhood", {"window": 0.45}),
    ("neighborhood", {"window": (5, 9, 9), "stride": 1}),
    ("window", {}),
    ("window", {"window": (0.5, 0.5, 0.5)}),
    ("linear", {}),
    ("linear", {"density": 0.25}),
)


def measure(
    device: str,
    dtype: str,
    head_dim: int,
    *,
    grids: Iterable[tuple[int, int, int]] = GRIDS,
    methods: Sequence[tuple[str, dict[str, Any]]] = METHODS,
    heads: int = 4,
    repeats: int = 5,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Seconds of dense attention and of methods on some grids; the fastest of the rounds."""
    rows: list[Row] = []
    dense = ""
    for shape in grids:
        grid = diffpatch.TokenGrid(*shape)
        say(f"{dtype}, heads of {head_dim}: {grid}")
        case = Case(grid, heads, head_dim, dtype=DTYPES[dtype], device=device)
        dense = dense or fastest_dense(case, case.tensors())
        rows += measure_case(case, methods, repeats, dense)
    return [{"dtype": dtype, "head_dim": head_dim, "heads": heads, **row} for row in rows]


def measure_case(
    case: Case, methods: Sequence[tuple[str, dict[str, Any]]], repeats: int, dense: str
) -> list[Row]:
    """One row for dense attention and one for each method on a grid."""
    qkv = case.tensors()
    calls: dict[str, Callable[[], Any]] = {"dense": lambda: dense_call(dense, *qkv)}
    rows: list[Row] = [{"method": "dense", "params": {}}]
    for name, params in methods:
        method = diffpatch.make_method(name, **params)
        calls[str(method)] = lambda m=method: diffpatch.attention(*qkv, case.grid, m)
        rows.append({"method": name, "params": params})
    times = interleaved(calls, repeats, qkv[0].device)
    for row, name in zip(rows, calls, strict=True):
        row |= {"grid": list(case.grid.shape), "seconds": min(times[name])}
    return rows


def work(row: Row, backend: str) -> Work:
    """What the call of a row does."""
    grid = diffpatch.TokenGrid(*row["grid"])
    if row["method"] == "dense":
        return dense_work(grid.num_tokens)
    params = {k: tuple(v) if isinstance(v, list) else v for k, v in row["params"].items()}
    method = diffpatch.make_method(row["method"], **params)
    done = method.work(method.pattern(grid, method.variant(0, 0)), 1, backend)
    if done is None:
        raise diffpatch.BadParameter(f"{row['method']} has no cost model to fit")
    return done


def fit(rows: Sequence[Row], backend: str) -> dict[str, dict[str, float]]:
    """Coefficients by "dtype/head size" that make relative errors small, none of them negative."""
    found = {}
    for dtype, head_dim in sorted({(row["dtype"], row["head_dim"]) for row in rows}):
        own = [row for row in rows if (row["dtype"], row["head_dim"]) == (dtype, head_dim)]
        sparse = [row for row in own if row["method"] != "dense"]
        dense = [
            row["seconds"] / (row["heads"] * work(row, backend).pairs)
            for row in own
            if row["method"] == "dense"
        ]
        counts = np.array([_per_call(row, backend) for row in sparse])
        seconds = np.array([row["seconds"] for row in sparse])
        costs = _non_negative(counts / seconds[:, None], np.ones(len(sparse)))
        pair = costs[KINDS.index("pairs")] or float(np.median(dense))
        for kind in ("pairs", "pairs_of_many", "pairs_of_few"):  # none of them is free
            costs[KINDS.index(kind)] = costs[KINDS.index(kind)] or pair
        named = {kind: float(cost) for kind, cost in zip(KINDS, costs, strict=True)}
        found[f"{dtype}/{head_dim}"] = named | {"dense": float(np.median(dense))}
    return found


def _per_call(row: Row, backend: str) -> list[float]:
    counts = zip(KINDS, work(row, backend).counts(), strict=True)
    return [count * (1 if kind == "calls" else row["heads"]) for kind, count in counts]


def _non_negative(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least squares without negative coefficients (dropped one by one, the most negative first)."""
    scale = np.abs(matrix).max(0)
    used = [i for i in range(matrix.shape[1]) if scale[i] > 0]
    out = np.zeros(matrix.shape[1])
    while used:
        solution = np.linalg.lstsq(matrix[:, used] / scale[used], target, rcond=None)[0]
        if solution.min() >= 0:
            out[used] = solution / scale[used]
            break
        used.pop(int(solution.argmin()))
    return out


def profile(
    device: str | None = None,
    *,
    dtypes: Sequence[str] = ("fp32", "bf16"),
    head_dims: Sequence[int] = (64, 128),
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure this machine: a profile and the measurements behind it, ready for JSON."""
    place = choose_device(device)
    backend = "torch" if place.type == "cpu" else "triton"
    rows = [
        row
        for dtype in dtypes
        for head_dim in head_dims
        for row in measure(str(place), dtype, head_dim, say=say)
    ]
    return assemble(rows, place, backend, peak={d: peak(place, DTYPES[d]) for d in dtypes})


def assemble(
    rows: Sequence[Row], device: torch.device, backend: str, peak: dict[str, float]
) -> dict[str, Any]:
    """The profile fitted to some rows, with the rows."""
    around = environment(device)
    made = DeviceProfile(
        name=around["device"],
        backend=backend,
        peak=peak,
        bandwidth=bandwidth(device),
        coefficients=fit(rows, backend),
        source=f"measured, torch {around['versions']['torch']}, {around['threads']} threads",
    )
    return {"profile": asdict(made), "environment": around, "rows": list(rows)}


def peak(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of a matrix product."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = min(interleaved({"product": lambda: a @ b}, 5, device)["product"])
    return 2.0 * size**3 / seconds


def bandwidth(device: torch.device, size: int = 1 << 26) -> float:
    """Bytes a second read and written by a copy."""
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    seconds = min(interleaved({"copy": lambda: target.copy_(source)}, 5, device)["copy"])
    return 2.0 * size / seconds
