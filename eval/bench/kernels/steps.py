"""Whole steps of models of published size on a GPU, patched and not, with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffpatch.eval.bench.kernels.measurements import Measurements, Result
from diffpatch.eval.bench.kernels.watch import Watch
from diffpatch.eval.bench.model import ModelCase, bench_model
from diffpatch.pipelines.running.loading import DTYPES
from diffpatch.pipelines.shapes.table import shape_of

METHODS: Mapping[str, Mapping[str, Any]] = {"radial": {}, "neighborhood": {}}


@dataclass(frozen=True)
class Step:
    """A step that is timed.

    Attributes:
        model: a name in `pipelines.shapes.table`.
        num_frames: of the clip.
        height: in pixels.
        width: in pixels.
        kept: what every method is fitted to.
        expected: seconds that all of it takes on an H200, by FLOPs, weights included.
        layers: fewer than the model has; None for all.
    """

    model: str
    num_frames: int
    height: int
    width: int
    kept: float
    expected: float
    layers: int | None = None


STEPS = {
    "wan-1.3b 480p": Step("wan-1.3b", 81, 480, 832, 0.2, 25.0),
    "wan-14b 720p": Step("wan-14b", 81, 720, 1280, 0.2, 110.0),
}


def add_step(made: Measurements, name: str, step: Step, dtype: str, dense: str | None) -> None:
    """Add a row to "steps".

    Args:
        made: where to.
        name: of the row.
        step: what to time.
        dtype: of weights and activations, a name in `DTYPES`.
        dense: torch's attention to compare with, known to be the fastest; None tries all.
    """

    def measure(watch: Watch) -> Result:
        case = ModelCase(
            shape_of(step.model), step.num_frames, step.height, step.width, step.layers,
            dtype=DTYPES[dtype], device=made.device,
        )  # fmt: skip
        with watch(f"a step of {step.model}"):
            return bench_model(case, METHODS, kept=step.kept, repeats=1, dense=dense, say=made.say)

    made.add("steps", {"step": name, "dtype": dtype}, measure, step.expected)
