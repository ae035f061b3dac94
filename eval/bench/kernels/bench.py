"""Everything there is to measure of the kernels on a machine, in one run that ends in time.

    diffpatch bench kernels --device cuda --json kernels.json

First every backend of every operator is compared with the definition. Then each shape is measured
with a window of its own and, on GPUs, with neighborhoods that keep 50, 25, 10 and 5 % of the pairs;
between the two come tiles that are chosen by content and whole steps of models.

A backend whose output is wrong has no speed. Everything takes turns: the fastest dense SDPA
backend, ours, on GPUs compiled FlexAttention with the same pairs, NATTEN where it is installed and
knows the mask, and, for comparison, what permuting q, k, v and the output around every call would
add. Speedups are medians of the rounds' ratios; FLOP/s count the pairs of visited tiles, whether an
element mask hides them or not; the bound is what the dense rate would give if nothing but the kept
pairs were computed. A timing is of calls in a row that take 20 ms or more together; the tensors do
not fit into the caches of a GPU.

Rows are written as they are measured, what matters most first. A call that fails is named in its
row, one that hangs ends the run, and what there was no time for is written as not measured. For an
H200 we estimate 8 minutes from FLOPs (1 for dense attention, 3 for compiling FlexAttention, 2 for
steps of models); the limit keeps a run in its slot whatever it really takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from statistics import median
from typing import Any

import torch

from diffpatch.eval.bench.case import Tensors
from diffpatch.eval.bench.kernels.choices import CHOICES, ChosenCall, measure_choice
from diffpatch.eval.bench.kernels.correctness import check_backends
from diffpatch.eval.bench.kernels.measurements import Measurements, Result, Say
from diffpatch.eval.bench.kernels.row import dense_times, measure
from diffpatch.eval.bench.kernels.shapes import SHAPES, Shape
from diffpatch.eval.bench.kernels.steps import STEPS, add_step
from diffpatch.eval.bench.kernels.variants import Variants
from diffpatch.eval.bench.kernels.watch import Watch
from diffpatch.eval.bench.timing import DENSE
from diffpatch.eval.environment import environment
from diffpatch.eval.medians import quartiles
from diffpatch.pipelines.running.loading import DTYPES, choose_device
from diffpatch.planning.fit import fit_kept

PARTS = ("checks", "kernels", "choices", "steps")
REACHED = 1.25  # times the wanted pairs: a window beyond it stands for something else


@dataclass
class _Bench:
    """What rows of kernels share.

    Attributes:
        tried: seconds of the dense calls, by shape and dtype.
    """

    made: Measurements
    variants: Variants
    repeats: int
    tried: dict[tuple[Any, ...], dict[str, list[float]]] = field(default_factory=dict)

    def add(self, name: str, dtype: str, wanted: float | None) -> None:
        """Measure a window, or a fraction, at a shape."""
        about = {"shape": name, "dtype": dtype, "wanted": wanted}
        self.made.add(
            "rows", about, lambda watch: self.measured(SHAPES[name], DTYPES[dtype], wanted, watch)
        )

    def add_choice(self, name: str, dtype: str) -> None:
        """Measure tiles that are chosen by content."""
        choice = CHOICES[name]

        def measure(watch: Watch) -> Result:
            qkv = _tensors(choice, DTYPES[dtype], self.made.device)
            _, fastest = self.dense(choice, qkv, watch)
            return measure_choice(choice, qkv, fastest, self.repeats, watch)

        self.made.add("choices", {"shape": name, "dtype": dtype}, measure)

    def add_step(self, name: str, dtype: str) -> None:
        """Measure a whole step of a model, against the dense attention that was fastest so far."""
        add_step(self.made, name, STEPS[name], dtype, self._fastest())

    def _fastest(self) -> str | None:
        """Of the largest call with tensors as a model has them; None before any."""
        for key in sorted(self.tried, key=lambda key: -key[0].num_tokens):
            tried = {n: x for n, x in self.tried[key].items() if n in DENSE}
            return min(tried, key=lambda name: median(tried[name]), default=None)
        return None

    def dense(
        self, shape: Shape | ChosenCall, qkv: Tensors, watch: Watch
    ) -> tuple[dict[str, list[float]], str]:
        """Seconds of every dense call on such tensors, and the fastest; timed once."""
        key = (shape.grid, shape.heads, shape.head_dim, qkv[0].dtype)
        if key not in self.tried:
            with watch("dense"):
                self.tried[key] = dense_times(qkv)
        tried = self.tried[key]
        return tried, min(tried, key=lambda call: median(tried[call]))

    def measured(
        self, shape: Shape, dtype: torch.dtype, wanted: float | None, watch: Watch
    ) -> Result:
        """A pattern at a shape, or why it is not measured."""
        method = shape.method
        if wanted is not None:
            method = fit_kept("neighborhood", shape.grid, wanted)
        pattern = method.pattern(shape.grid, method.variant(0, 0))
        if wanted is not None and pattern.kept > REACHED * wanted:
            return {"not_measured": f"no window here keeps less than {pattern.kept:.1%}"}
        qkv = _tensors(shape, dtype, self.made.device)
        tried, fastest = self.dense(shape, qkv, watch)
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
    parts: Sequence[str] = ("kernels",),
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
        int8: whether to measure 8-bit scores too, alone and with 8-bit floats for the values.
        gluon: whether to measure the kernel that is scheduled by hand for Hopper.
        parts: of `PARTS`: what to do at all, in their order, the windows of known models first and
            other fractions and windows last.
        repeats: rounds, in each of which everything runs once.
        limit_seconds: begin no row that may end later, measured by the longest so far.
        say: told what is being measured.
        save: given the result after every row; the same object that is returned.
    """
    device = choose_device(device)
    variants = Variants(tuple(layouts), tuple(loads), int8, gluon)
    result = {"repeats": repeats, "environment": environment(device), "rows": []}
    made = Measurements(device, limit_seconds, say, save, result)
    bench = _Bench(made, variants, repeats)
    rows = list(_plan(shapes, dtypes, kept)) if "kernels" in parts else []
    windows = sum(wanted is None and not SHAPES[name].last for name, _, wanted in rows)
    if "checks" in parts:
        check_backends(made, dtypes)
    for row in rows[:windows]:
        bench.add(*row)
    if "choices" in parts:
        for name in CHOICES:
            bench.add_choice(name, dtypes[0])
    if "steps" in parts:
        for name in STEPS:
            bench.add_step(name, dtypes[0])
    for row in rows[windows:]:
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


def _tensors(shape: Shape | ChosenCall, dtype: torch.dtype, device: torch.device) -> Tensors:
    """q, k and v of normal noise (1, S, H, D), made where they are needed: it is a gigabyte."""
    random = torch.Generator(device).manual_seed(0)
    size = (1, shape.grid.num_tokens, shape.heads, shape.head_dim)
    q, k, v = (torch.randn(size, generator=random, device=device, dtype=dtype) for _ in range(3))
    return q, k, v
