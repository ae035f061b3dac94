"""Measure what attention costs on this machine, and fit a device profile to it.

Some grids are measured but not fitted to: how well the profile predicts those is its test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

import diffpatch
from diffpatch.eval.bench.case import AttentionCase, Tensors
from diffpatch.eval.bench.timing import dense_call, fastest_dense, interleaved
from diffpatch.eval.environment import environment, threads
from diffpatch.kernels.block_sparse.backends import compare_again
from diffpatch.kernels.block_sparse.chooser import Ranking
from diffpatch.kernels.block_sparse.torch_plan.grouping import (
    CALL_COST,
    KEY_COST,
    MASK_COST,
    ROW_COSTS,
)
from diffpatch.kernels.block_sparse.work import KINDS, Work, dense_work
from diffpatch.pipelines.running.loading import DTYPES, choose_device
from diffpatch.planning.profiles import DeviceProfile

PAIRS = ("pairs", "pairs_of_many", "pairs_of_few")

Row = dict[str, Any]
Methods = tuple[tuple[str, dict[str, Any]], ...]
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Sizes:
    """What is measured on a kind of device: sizes that take seconds there.

    Attributes:
        grids: what the profile is fitted to.
        held_out: and what it is only checked on.
        heads: of every call.
    """

    grids: tuple[Shape, ...]
    held_out: tuple[Shape, ...]
    heads: int


ON_CPU = Sizes(
    ((8, 16, 16), (16, 16, 16), (21, 16, 20), (17, 22, 26)), ((33, 16, 16), (13, 30, 26)), 3
)
ELSEWHERE = Sizes(
    ((8, 32, 32), (16, 32, 48), (21, 30, 52), (21, 45, 80)), ((13, 44, 78), (30, 48, 64)), 12
)

# Windows that many queries share, lists of each tile's own, masks of elements, virtual tokens.
METHODS: Methods = (
    ("radial", {}),
    ("radial", {"decay": 0.4}),
    ("neighborhood", {}),
    ("neighborhood", {"window": 0.45}),
    ("neighborhood", {"window": (5, 9, 9), "stride": 1}),
    ("window", {}),
    ("window", {"window": (0.5, 0.5, 0.5)}),
    ("linear", {}),
    ("linear", {"kept": 0.25}),
    ("linear", {"pool": 24}),
)
CHECKED: Methods = tuple(
    (name, {}) for name in ("radial", "neighborhood", "window", "linear", "sliding_tile")
)

# What things cost in pairs of dense attention, by the torch backend's own model where it has one.
USUAL = {
    "calls": CALL_COST,
    "keys": KEY_COST,
    "rows": 50.0,
    **{kind: cost for kind, (_, cost) in zip(PAIRS, ROW_COSTS, strict=True)},
    "masked": MASK_COST - 1,
    "virtual": 3.0,
    "pooled": 200.0,
}
PULL = 1e-3  # of the usual costs: being off by all of one counts as much as being off by 3 %


def profile(
    device: str | None = None,
    *,
    dtypes: Sequence[str] = ("fp32", "bf16"),
    head_dims: Sequence[int] = (64, 128),
    sizes: Sizes | None = None,
    repeats: int = 4,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure a device: a profile and the measurements behind it, ready for JSON.

    On a GPU the backends that "auto" chooses from are compared anew before anything is timed.

    Args:
        device: as in torch; None takes the accelerator, if there is one.
        dtypes: "fp32", "bf16" or "fp16".
        head_dims: sizes of a head.
        sizes: what to measure; None takes what suits the device.
        repeats: rounds; the fastest counts.
        say: is told about the progress.
    """
    place = choose_device(device)
    sizes = sizes or (ON_CPU if place.type == "cpu" else ELSEWHERE)
    rows: list[Row] = []
    for dtype in dtypes:
        for head_dim in head_dims:
            compared = compare_again(place, DTYPES[dtype], head_dim)
            if compared is not None:
                say(f"{dtype}, heads of {head_dim}: auto takes {_order(compared)}")
            rows += measure(str(place), dtype, head_dim, sizes, repeats=repeats, say=say)
    return assemble(rows, place, {dtype: peak(place, DTYPES[dtype]) for dtype in dtypes})


def _order(ranking: Ranking) -> str:
    """Backends from fastest to slowest, and those that are not taken."""
    times = [f"{name} ({1e3 * seconds:.2g} ms)" for name, seconds in ranking.seconds.items()]
    return ", ".join([*times, *(f"not {name}: {why}" for name, why in ranking.refused.items())])


def measure(
    device: str,
    dtype: str,
    head_dim: int,
    sizes: Sizes,
    *,
    repeats: int = 4,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Seconds of dense attention and of methods, one row each: the fastest of the rounds."""
    rows: list[Row] = []
    dense = ""
    for shape in (*sizes.grids, *sizes.held_out):
        held_out = shape in sizes.held_out
        case = AttentionCase(
            diffpatch.TokenGrid(*shape), sizes.heads, head_dim, dtype=DTYPES[dtype], device=device
        )
        say(f"{dtype}, heads of {head_dim}: {case.grid}")
        dense = dense or fastest_dense(case, case.tensors())
        about = {"dtype": dtype, "head_dim": head_dim, "heads": sizes.heads, "held_out": held_out}
        found = _measure_case(case, CHECKED if held_out else METHODS, repeats, dense)
        rows += [about | row for row in found]
    return rows


def _measure_case(case: AttentionCase, methods: Methods, repeats: int, dense: str) -> list[Row]:
    """One row for dense attention and one for each method on a grid."""
    qkv = case.tensors()
    calls: dict[str, Callable[[], Any]] = {"dense": dense_call(dense, qkv)}
    rows: list[Row] = [{"method": "dense", "params": {}}]
    for name, params in methods:
        calls[f"{name} {params}"] = _call(qkv, case.grid, diffpatch.make_method(name, **params))
        rows.append({"method": name, "params": params})
    times = interleaved(calls, repeats, qkv[0].device)
    for row, name in zip(rows, calls, strict=True):
        row |= {"grid": list(case.grid.shape), "seconds": min(times[name])}
    return rows


def _call(qkv: Tensors, grid: diffpatch.TokenGrid, method: diffpatch.Method) -> Callable[[], Any]:
    return lambda: diffpatch.attention(*qkv, grid, method)


def assemble(rows: Sequence[Row], device: torch.device, peaks: dict[str, float]) -> dict[str, Any]:
    """The profile fitted to some rows, how it predicts the others, and the rows themselves."""
    around = environment(device)
    backend = "torch" if device.type == "cpu" else "triton"
    made = DeviceProfile(
        name=around["device"],
        backend=backend,
        peak=peaks,
        bandwidth=bandwidth(device),
        coefficients=fit([row for row in rows if not row["held_out"]], backend),
        source=f"measured, torch {around['versions']['torch']}, {threads(around)}",
    )
    return {"profile": asdict(made), "environment": around, "rows": list(rows)}


def work(row: Row, backend: str) -> Work:
    """What the call of a row does.

    Raises:
        BadParameter: no model tells what the method does.
    """
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
    """Coefficients by "dtype/head size" that make relative errors small, none of them negative.

    Counts that grow together in all measurements cannot be told apart, so each coefficient is also
    drawn, weakly, to what is usual (`USUAL`).
    """
    found = {}
    counted = [(row, work(row, backend)) for row in rows]
    for dtype, head_dim in sorted({(row["dtype"], row["head_dim"]) for row in rows}):
        own = [(r, w) for r, w in counted if (r["dtype"], r["head_dim"]) == (dtype, head_dim)]
        dense = [r["seconds"] / (r["heads"] * w.pairs) for r, w in own if r["method"] == "dense"]
        pair = float(np.median(dense))
        sparse = [(r, w) for r, w in own if r["method"] != "dense"]
        counts = np.array([_per_call(r, w) for r, w in sparse])
        seconds = np.array([r["seconds"] for r, _ in sparse])
        usual = pair * np.array([USUAL[kind] for kind in KINDS])
        drawn = np.diag((PULL * len(sparse)) ** 0.5 / usual)
        matrix = np.concatenate([counts / seconds[:, None], drawn])
        target = np.concatenate([np.ones(len(sparse)), drawn @ usual])
        costs = _non_negative(matrix, target)
        named = {kind: float(cost) for kind, cost in zip(KINDS, costs, strict=True)}
        found[f"{dtype}/{head_dim}"] = named | {"dense": pair}
    return found


def predictions(rows: Sequence[Row], profile: DeviceProfile) -> list[Row]:
    """Speedups of the methods of some rows: each row with `measured` and `predicted`."""

    def key(row: Row) -> tuple[Any, ...]:
        return row["dtype"], row["head_dim"], *row["grid"]

    dense = {key(row): row["seconds"] for row in rows if row["method"] == "dense"}
    found = []
    for row in rows:
        if row["method"] == "dense":
            continue
        size = row["heads"], row["head_dim"], row["dtype"]
        tokens = diffpatch.TokenGrid(*row["grid"]).num_tokens
        seconds = profile.seconds(work(row, profile.backend), *size)
        gains = {
            "measured": dense[key(row)] / row["seconds"],
            "predicted": profile.dense_seconds(tokens, *size) / seconds,
        }
        found.append(row | gains)
    return found


def check(result: dict[str, Any]) -> list[Row]:
    """`predictions` of the rows that the profile of a result was not fitted to."""
    rows = [row for row in result["rows"] if row["held_out"]]
    return predictions(rows, DeviceProfile(**result["profile"]))


def _per_call(row: Row, done: Work) -> list[float]:
    counts = zip(KINDS, done.counts(), strict=True)
    return [count * (1 if kind == "calls" else row["heads"]) for kind, count in counts]


def _non_negative(matrix: np.ndarray[Any, Any], target: np.ndarray[Any, Any]) -> Any:
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
