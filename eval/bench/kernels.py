"""The block-sparse kernels alone, at the shapes of known models, against dense attention.

    diffpatch bench kernels --device cuda --limit-seconds 480 --json kernels.json
    diffpatch bench kernels --layout permuted gather ordered --loads auto pointer --int8 --gluon

Each shape is measured with a window of its own and, on GPUs, with neighborhoods that keep 50, 25,
10 and 5 % of the pairs. Each backend's output is checked first; a wrong one has no speed. Then
everything takes turns: the fastest dense SDPA backend, ours, on GPUs compiled FlexAttention with
the same pairs, NATTEN where it is installed and knows the mask, and, for comparison, what permuting
q, k, v and the output around every call would add. Speedups are medians of the rounds' ratios;
FLOP/s count the pairs of visited tiles, whether an element mask hides them or not; the bound is
what the dense rate would give if nothing but the kept pairs were computed. A timing is of calls in
a row that take 20 ms or more together; the tensors do not fit into the caches of a GPU.

Rows are written as they are measured, what matters most first. A call that fails is named in its
row, one that hangs ends the run, and what there was no time for is written as not measured. For an
H200 we estimate 5 minutes from FLOPs (1 for dense attention, 3 for compiling FlexAttention); the
limit keeps a run in its slot whatever it really takes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from statistics import median
from typing import Any

import torch

from diffpatch.eval.bench.case import Tensors
from diffpatch.eval.bench.row import DeviceLost, dense_times, failure, measure
from diffpatch.eval.bench.shapes import SHAPES, Shape
from diffpatch.eval.bench.variants import Variants
from diffpatch.eval.bench.watch import Watch
from diffpatch.eval.environment import environment
from diffpatch.eval.medians import quartiles
from diffpatch.pipelines.running.loading import DTYPES, choose_device
from diffpatch.planning.fit import fit_kept

REACHED = 1.25  # times the wanted pairs: a window beyond it stands for something else

Result = dict[str, Any]
Say = Callable[[str], None]


@dataclass
class _Bench:
    """What rows share: the dense calls that were tried, the time, and whether the GPU answers.

    Attributes:
        result: what there is so far, ready for JSON.
        row: what is measured now.
        longest: seconds of the longest row.
        lost: why nothing can be measured any more.
        tried: seconds of the dense calls, by shape and dtype.
    """

    device: torch.device
    variants: Variants
    repeats: int
    limit: float | None
    say: Say
    save: Callable[[Result], None]
    result: Result
    row: Result = field(default_factory=dict)
    began: float = field(default_factory=lambda: time.perf_counter())
    longest: float = 0.0
    lost: str | None = None
    tried: dict[tuple[Any, ...], dict[str, list[float]]] = field(default_factory=dict)

    def spent(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self.began

    def add(self, name: str, dtype: str, wanted: float | None) -> None:
        """Measure a row, or say why not, and save what there is."""
        what = "its window" if wanted is None else f"{wanted:.0%} kept"
        self.say(f"{self.spent():.0f} s: {name}, {dtype}, {what}")
        self.row = {"shape": name, "dtype": dtype, "wanted": wanted}
        self._end(self._outcome(SHAPES[name], DTYPES[dtype], wanted))

    def hung(self, reason: str) -> None:
        """End the process, as nothing else ends a kernel that waits for itself."""
        self._end({"failed": f"hangs: {reason}; the rest was not measured"})
        os._exit(1)

    def _end(self, outcome: Result) -> None:
        reason = reason_of(outcome)
        if reason:
            self.say(f"  {reason}")
        self.result["rows"].append(self.row | outcome)
        self.result["seconds"] = self.spent()
        self.save(self.result)

    def _outcome(self, shape: Shape, dtype: torch.dtype, wanted: float | None) -> Result:
        """What was measured of a row, or why nothing was."""
        if self.lost:
            return {"failed": self.lost}
        began = self.spent()
        if self.limit is not None and began + self.longest > self.limit:
            return {"not_measured": f"{began:.0f} of {self.limit:.0f} seconds are over"}
        try:
            outcome = self._attempt(shape, dtype, wanted)
        except DeviceLost as error:
            self.lost = f"the GPU answers no more: {error}"
            return {"failed": self.lost}
        outcome["row_seconds"] = self.spent() - began
        self.longest = max(self.longest, outcome["row_seconds"])
        return outcome

    def _attempt(self, shape: Shape, dtype: torch.dtype, wanted: float | None) -> Result:
        try:
            return self._measured(shape, dtype, wanted)
        except DeviceLost:
            raise
        except Exception as error:  # of any kind: the other rows are worth having
            return {"failed": failure(error, self.device)}

    def _measured(self, shape: Shape, dtype: torch.dtype, wanted: float | None) -> Result:
        method = shape.method
        if wanted is not None:
            method = fit_kept("neighborhood", shape.grid, wanted)
        pattern = method.pattern(shape.grid, method.variant(0, 0))
        if wanted is not None and pattern.kept > REACHED * wanted:
            return {"not_measured": f"no window here keeps less than {pattern.kept:.1%}"}
        watch = Watch(self.device, self.say, self.hung)
        qkv = _tensors(shape, dtype, self.device)
        key = (shape.grid, shape.heads, shape.head_dim, dtype)
        if key not in self.tried:
            with watch("dense"):
                self.tried[key] = dense_times(qkv)
        tried = self.tried[key]
        fastest = min(tried, key=lambda call: median(tried[call]))
        return {
            "method": str(method),
            "grid": str(shape.grid),
            "tokens": shape.grid.num_tokens,
            "heads": shape.heads,
            "head_dim": shape.head_dim,
            "dense": {call: quartiles(times) for call, times in tried.items()},
            **measure(shape, method, pattern, qkv, fastest, self.variants, self.repeats, watch),
        }


def bench_kernels(
    device: str | torch.device | None,
    shapes: Sequence[str],
    *,
    dtypes: Sequence[str] = ("bf16",),
    kept: Sequence[float] = (),
    layouts: Sequence[str] = ("permuted",),
    loads: Sequence[str] = ("auto",),
    int8: bool = False,
    gluon: bool = False,
    repeats: int = 5,
    limit_seconds: float | None = None,
    say: Say = lambda text: None,
    save: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Measure the kernels; the result is ready for JSON.

    Args:
        device: where to run.
        shapes: names from `SHAPES`.
        dtypes: names from `DTYPES`.
        kept: fractions of the pairs to keep, in turn, after the window of the shape itself.
        layouts: names from `LAYOUTS`; the torch backend knows "permuted" and "ordered".
        loads: names from `LOADS`, for the Triton kernel.
        int8: whether to measure 8-bit scores too.
        gluon: whether to measure the kernel that is scheduled by hand for Hopper.
        repeats: rounds, in each of which everything runs once.
        limit_seconds: begin no row that may end later, measured by the longest so far.
        say: told what is being measured.
        save: given the result after every row; the same object that is returned.
    """
    device = choose_device(device)
    variants = Variants(tuple(layouts), tuple(loads), int8, gluon)
    result = {"repeats": repeats, "environment": environment(device), "rows": []}
    bench = _Bench(device, variants, repeats, limit_seconds, say, save, result)
    for row in _plan(shapes, dtypes, kept):
        bench.add(*row)
    return result


def _plan(
    shapes: Sequence[str], dtypes: Sequence[str], kept: Sequence[float]
) -> Iterator[tuple[str, str, float | None]]:
    """Shape, dtype and fraction of every row, what matters most first."""
    first = [name for name in shapes if not SHAPES[name].last]
    for wanted, name, dtype in product((None, *kept), first, dtypes):
        yield name, dtype, wanted
    for name, dtype in product((name for name in shapes if SHAPES[name].last), dtypes):
        yield name, dtype, None


def _tensors(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    """q, k and v of normal noise (1, S, H, D), made where they are needed: it is a gigabyte."""
    random = torch.Generator(device).manual_seed(0)
    size = (1, shape.grid.num_tokens, shape.heads, shape.head_dim)
    q, k, v = (torch.randn(size, generator=random, device=device, dtype=dtype) for _ in range(3))
    return q, k, v


def reason_of(row: Result) -> str:
    """Why a row or an entry of it has no speed, or nothing."""
    if "failed" in row:
        return f"failed: {row['failed']}"
    return f"not measured: {row['not_measured']}" if "not_measured" in row else ""
