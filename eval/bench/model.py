"""One step of a transformer of published size with random weights: dense against methods.

Every method is checked before its speed counts, on the queries, keys and values of the model's own
layers. Times are paired: the fastest dense attention and all methods take turns, each after a
forward that does not count, and the speedup is the median of the rounds' ratios.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import diffpatch
from diffpatch.checking import refuse_dense
from diffpatch.errors import BadParameter
from diffpatch.eval.bench.checking import TOLERANCE, WrongResult, error_on_rows
from diffpatch.eval.bench.timing import DENSE, MATH_LIMIT
from diffpatch.eval.environment import environment
from diffpatch.eval.medians import quartiles
from diffpatch.eval.quality.metrics import relative_l1
from diffpatch.methods.base import Attended, AttentionCall
from diffpatch.methods.wrapper import Wrapper
from diffpatch.pipelines.shapes import random_models
from diffpatch.pipelines.shapes.table import ModelShape
from diffpatch.planning.fit import fit_kept

Say = Callable[[str], None]
DEFAULT = "torch's choice"
TURN_SECONDS = 0.3  # a forward that is shorter is timed several times in a turn
OVERHEAD_SECONDS = 20.0  # for all turns, unless the rounds that are asked for take longer


@dataclass(frozen=True)
class ModelCase:
    """The step that is measured.

    Attributes:
        shape: the model.
        num_frames: of the clip; 1 for images.
        height: in pixels.
        width: in pixels.
        layers: fewer of them than the model has; None for all.
        batch: samples in a forward; pipelines with guidance have 2, or two forwards of 1.
        dtype: of weights and activations.
        device: where everything is created and computed.
    """

    shape: ModelShape
    num_frames: int
    height: int
    width: int
    layers: int | None = None
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = torch.device("cpu")

    @property
    def grid(self) -> diffpatch.TokenGrid:
        """Of its self-attention."""
        size = self.shape.grid(self.num_frames, self.height, self.width)
        text = self.shape.text_tokens
        return diffpatch.TokenGrid(*size, *((text, 0) if self.shape.text_before else (0, text)))

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        grid = self.grid
        return {
            "model": self.shape.name,
            "num_frames": self.num_frames,
            "height": self.height,
            "width": self.width,
            "grid": str(grid),
            "tokens": grid.num_tokens,
            "layers": self.layers or self.shape.layers,
            "layers_of_the_model": self.shape.layers,
            "batch": self.batch,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def bench_model(
    case: ModelCase,
    methods: Mapping[str, Mapping[str, Any]],
    *,
    kept: float | None = None,
    backend: str = "auto",
    repeats: int = 5,
    dense: str | None = None,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Measure one forward; the result is ready for JSON.

    Args:
        case: what to measure.
        methods: name -> parameters. All steps and layers are sparse.
        kept: fraction of the pairs that every method is fitted to; None takes the parameters.
        backend: as in `diffpatch.patch`.
        repeats: rounds.
        dense: torch's attention that is known to be the fastest here; None tries all of them.
        say: told what happens.

    Raises:
        WrongResult: a method's output is wrong, so that no speed is reported at all.
        DiffpatchError: a model, size or method cannot work, or the memory does not suffice.
    """
    refuse_dense(methods)
    made = {name: _made(case, name, values, kept) for name, values in methods.items()}
    check_memory(case)
    say(f"creating {case.shape.name}")
    model = random_models.build(
        case.shape, layers=case.layers, dtype=case.dtype, device=case.device
    )
    call = random_models.inputs(
        case.shape,
        num_frames=case.num_frames,
        height=case.height,
        width=case.width,
        batch=case.batch,
        dtype=case.dtype,
        device=case.device,
    )
    stage = _Stage(model, call, case.device, backend)
    entries = {}
    for name, method in made.items():
        say(f"checking {name}")
        entries[name] = {"method": str(method), **stage.check(name, method, case.dtype)}
    tried: dict[str, float] = {}
    if dense is None:
        say("looking for the fastest dense attention")
        tried = stage.dense_times(_score_bytes(case))
    fastest = dense or min(tried, key=lambda name: tried[name])
    times, peaks = stage.rounds(fastest, made, repeats, say)
    say("timing a patch that keeps everything")
    overhead = quartiles(stage.overheads(repeats))
    for name, entry in entries.items():
        ratios = [d / m for d, m in zip(times["dense"], times[name], strict=True)]
        entry |= {"seconds": quartiles(times[name]), "speedup": quartiles(ratios)}
        entry["peak_gib"] = peaks[name]
    return {
        "case": case.to_dict(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "repeats": repeats,
        "dense": {
            "attention": fastest,
            "tried": tried,
            "seconds": quartiles(times["dense"]),
            "peak_gib": peaks["dense"],
        },
        "overhead": overhead,
        "methods": entries,
        "environment": environment(case.device),
    }


def _made(
    case: ModelCase, name: str, values: Mapping[str, Any], kept: float | None
) -> diffpatch.Method:
    """A method that a single forward can show, fitted to a share of the pairs if there is one."""
    method = diffpatch.make_method(name, **values)
    if method.needs_steps:
        raise BadParameter(
            f"{name} carries results from one step to the next, and a single forward has none:"
            " measure it with `diffpatch bench render`"
        )
    return method if kept is None else fit_kept(method, case.grid, kept)


def check_memory(case: ModelCase) -> None:
    """Refuse a model that is larger than the memory that is free.

    Raises:
        BadParameter: says how much is needed, and how many layers would fit.
    """
    weights, rest = needed_bytes(case)
    free = free_bytes(case.device)
    if free is None or weights + rest <= free:
        return
    count = case.layers or case.shape.layers
    fit = int((free - rest) / weights * count)
    fewer = f"fewer layers ({fit} fit)" if fit > 0 else "a smaller size"
    raise BadParameter(
        f"{case.shape.name} with {count} layers needs about {(weights + rest) / 2**30:.1f} GiB for"
        f" {case.grid.num_tokens} tokens in {str(case.dtype).removeprefix('torch.')}, and"
        f" {free / 2**30:.1f} GiB are free: time {fewer}, or in a smaller dtype"
    )


def needed_bytes(case: ModelCase) -> tuple[float, float]:
    """Memory for the weights, exactly, and for one layer's activations, roughly."""
    model = random_models.build(
        case.shape, layers=case.layers, dtype=case.dtype, device=torch.device("meta")
    )
    weights = sum(parameter.numel() for parameter in model.parameters()) * case.dtype.itemsize
    shape, dim = case.shape, case.shape.heads * case.shape.head_dim
    # At its widest a layer holds the feed-forward's inside, or q, k, v and their rotated copies,
    # beside a few versions of its input, of which normalisations keep one in fp32.
    wide = max(2 * shape.ffn, 6 * dim) + 4 * dim
    tokens = case.batch * case.grid.num_tokens
    return float(weights), float(tokens * (wide * case.dtype.itemsize + 4 * dim))


def free_bytes(device: torch.device) -> int | None:
    """Memory that can be had on a device; None where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(found[0]) if found and device.type == "cpu" else None


class _Stage:
    """A model, one call of it, and a clock."""

    def __init__(
        self, model: Any, call: dict[str, Any], device: torch.device, backend: str
    ) -> None:
        self.model, self.call, self.device, self.backend = model, call, device, backend

    @torch.no_grad()
    def seconds(self) -> float:
        """The time of one forward."""
        self._synchronize()
        start = time.perf_counter()
        self.model(**self.call)
        self._synchronize()
        return time.perf_counter() - start

    def check(self, name: str, method: diffpatch.Method, dtype: torch.dtype) -> dict[str, Any]:
        """Run a method once, with its first and last attention call compared to what they must be.

        Raises:
            WrongResult: a call is wrong, or none was sparse.
        """
        spy = _Spy(method)
        with self._patched(spy):
            self.seconds()
            report = diffpatch.report(self.model)
        if not spy.seen:
            raise WrongResult(f"{name} never ran sparsely: {'; '.join(report.reasons)}")
        error = max(seen.error(method) for seen in spy.seen)
        if not error <= TOLERANCE[dtype]:  # also true for NaN
            raise WrongResult(
                f"{name} is wrong: relative error {error:.2g}, expected at most"
                f" {TOLERANCE[dtype]:.0e}; no speed is reported"
            )
        return {
            "kept": report.kept,
            "error": error,
            "dense_calls": report.reasons,
            "backends": report.backends,
        }

    def dense_times(self, scores: float) -> dict[str, float]:
        """Seconds of a forward with every dense attention that runs here."""
        self.seconds()
        times = {DEFAULT: self.seconds()}
        for name in DENSE:
            if name == "MATH" and scores > MATH_LIMIT:
                continue
            try:
                with _dense(name):
                    self.seconds()
                    times[name] = self.seconds()
            except RuntimeError:  # no such kernel for this device, dtype, head size or mask
                continue
        return times

    def overheads(self, repeats: int) -> list[float]:
        """What a patch costs that leaves nothing out: its time by the unpatched model's, in turns.

        On a CPU that is time of the process, which what else runs on the machine disturbs least.
        Short forwards have longer and more turns: one of them varies by more than a patch costs.
        """
        self.seconds()
        once = self._busy(1)
        count = max(1, round(TURN_SECONDS / once))
        ratios = []
        for turn in range(max(repeats, round(OVERHEAD_SECONDS / (2 * count * once)))):
            seconds = {}
            for patched in (False, True) if turn % 2 else (True, False):
                method = diffpatch.make_method("dense")
                with self._patched(method) if patched else contextlib.nullcontext():
                    self.seconds()
                    seconds[patched] = self._busy(count)
            ratios.append(seconds[True] / seconds[False])
        return ratios

    def _busy(self, count: int) -> float:
        """The time of some forwards, that of the process alone on a CPU."""
        cpu = self.device.type == "cpu"
        start = time.process_time()
        seconds = sum(self.seconds() for _ in range(count))
        return time.process_time() - start if cpu else seconds

    def rounds(
        self, fastest: str, methods: Mapping[str, diffpatch.Method], repeats: int, say: Say
    ) -> tuple[dict[str, list[float]], dict[str, float | None]]:
        """Seconds and peak memory of everything, in turns."""
        times: dict[str, list[float]] = {name: [] for name in ("dense", *methods)}
        peaks: dict[str, float | None] = dict.fromkeys(times)
        for number in range(repeats):
            for name in times:
                say(f"round {number + 1} of {repeats}: {name}")
                method = methods.get(name)
                with _dense(fastest) if method is None else self._patched(method):
                    self.seconds()  # builds the pattern; allocations
                    self._reset_peak()
                    times[name].append(self.seconds())
                    peaks[name] = self._peak()
        return times, peaks

    def _patched(self, method: diffpatch.Method) -> contextlib.AbstractContextManager[Any]:
        options: dict[str, Any] = {"dense_steps": 0, "dense_layers": 0, "backend": self.backend}
        return diffpatch.patched(self.model, method, **options)

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _peak(self) -> float | None:
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.device) / 2**30


@contextlib.contextmanager
def _dense(name: str) -> Iterator[None]:
    """Attention by one of torch's implementations."""
    if name == DEFAULT:
        yield
        return
    with sdpa_kernel(getattr(SDPBackend, name)):
        yield


@dataclass(frozen=True, eq=False)
class _Seen:
    """One attention call of a method."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    call: AttentionCall
    out: torch.Tensor

    def error(self, method: diffpatch.Method) -> float:
        """Relative L1 distance to a masked fp64 softmax, on some rows.

        Methods that do more than skip have no such reference; but attention only ever averages
        values, so that values of one must give one.
        """
        if method.only_skips:
            return error_on_rows(self.out, (self.q, self.k, self.v), self.call.pattern)
        ones = torch.ones_like(self.v)
        out = method.attend(self.q, self.k, ones, self.call).out
        return relative_l1(out, torch.ones_like(out))


@dataclass(frozen=True)
class _Spy(Wrapper):
    """A method that keeps the tensors of its first and its latest call, for a look at them."""

    name = "spy"
    only_skips = False

    seen: list[_Seen] = field(default_factory=list, compare=False)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall
    ) -> Attended:
        done = self.over.attend(q, k, v, call)
        self.seen[1:] = [_Seen(q, k, v, call, done.out)]
        return done


def _score_bytes(case: ModelCase) -> float:
    return case.batch * case.shape.heads * float(case.grid.num_tokens) ** 2 * 4
