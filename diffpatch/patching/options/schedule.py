"""Which denoising steps and which layers stay dense. Published quality rests on this."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated

from diffpatch.checking import check
from diffpatch.errors import BadParameter

BARE = "a bare transformer has no scheduler: patch the pipeline, or pass dense_steps=0"
# An int counts, a float in (0, 1] is a fraction of the total.
Amount = Annotated[int | float, "a count ≥ 0 or a fraction between 0.0 and 1.0"]
Layers = Annotated[
    int | float | tuple[int, ...], "a count ≥ 0, a fraction between 0.0 and 1.0, or layer numbers"
]


@dataclass(frozen=True)
class Schedule:
    """The dense part of a run.

    Attributes:
        dense_steps: first denoising steps that stay dense; int = count, float = fraction of the
            run, at least one step if above 0.
        dense_last_steps: the same for the last steps.
        dense_layers: first attention layers that stay dense (count or fraction), or the layer
            numbers themselves.
    """

    dense_steps: Amount = 0
    dense_last_steps: Amount = 0
    dense_layers: Amount | Collection[int] = 0

    def __post_init__(self) -> None:
        if isinstance(self.dense_layers, Collection) and not isinstance(self.dense_layers, str):
            object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        for name, kind in (
            ("dense_steps", Amount), ("dense_last_steps", Amount), ("dense_layers", Layers)
        ):  # fmt: skip
            object.__setattr__(self, name, check("", name, getattr(self, name), kind))
        _check("dense_steps", self.dense_steps)
        _check("dense_last_steps", self.dense_last_steps)
        if isinstance(self.dense_layers, int | float):
            _check("dense_layers", self.dense_layers)
        elif any(i < 0 for i in self.dense_layers):
            raise BadParameter(f"dense_layers={self.dense_layers!r} must hold layer numbers from 0")

    def layers(self, num_layers: int) -> frozenset[int]:
        """The dense layers of a transformer with that many patched layers.

        Raises:
            BadParameter: the schedule names more layers than there are.
        """
        layers = self.dense_layers
        if isinstance(layers, int | float):
            return frozenset(range(_count("dense_layers", layers, num_layers, "layers")))
        if layers and max(layers) >= num_layers:
            raise BadParameter(
                f"dense_layers={sorted(layers)} names a layer beyond the last, {num_layers - 1}"
            )
        return frozenset(layers)

    def bind(
        self,
        total_steps: int | None,
        num_layers: int,
        evaluations: int = 1,
        untold: str | None = None,
    ) -> BoundSchedule:
        """The schedule of one run.

        Args:
            total_steps: model evaluations in the run, None where nothing tells.
            num_layers: patched attention layers of the transformer.
            evaluations: model evaluations per denoising step, 2 for Heun-like solvers; counts given
                by the user are denoising steps.
            untold: why nothing tells the steps, if another reason than a bare transformer.

        Raises:
            BadParameter: more dense steps or layers than there are, or steps that cannot be known.
        """
        chosen = self.layers(num_layers)
        if not self.dense_steps and not self.dense_last_steps:
            return BoundSchedule(0, None, chosen)
        if total_steps is None:
            raise BadParameter(
                f"dense_steps={self.dense_steps} needs to know the denoising steps, but"
                f" {untold or BARE}"
            )
        # Two-stage solvers evaluate the model once in the last step and `evaluations` times in
        # every other one.
        steps = -(-total_steps // evaluations)
        first = _count("dense_steps", self.dense_steps, steps, "steps")
        last = _count("dense_last_steps", self.dense_last_steps, steps, "steps")
        first = min(first * evaluations, total_steps)
        last = max(last * evaluations - (evaluations - 1), 0)
        return BoundSchedule(first, total_steps - last if last else None, chosen)


@dataclass(frozen=True)
class BoundSchedule:
    """A schedule in whole steps and layers.

    Attributes:
        first: steps below this are dense.
        last: steps from this on are dense, or None.
        layers: dense layers.
    """

    first: int
    last: int | None
    layers: frozenset[int]

    def ever_sparse(self, layer: int, total: int | None) -> bool:
        """Whether any of `total` steps, None where they are not known, is sparse in this layer."""
        end = total if self.last is None else self.last
        return layer not in self.layers and (end is None or self.first < end)

    def reason(self, step: int, layer: int) -> str | None:
        """Why this call is dense, or None if it is not."""
        if step < self.first:
            return "dense first steps"
        if self.last is not None and step >= self.last:
            return "dense last steps"
        return "dense layers" if layer in self.layers else None


ALL_SPARSE = BoundSchedule(0, None, frozenset())


def _check(name: str, amount: Amount) -> None:
    if amount < 0 or (isinstance(amount, float) and amount > 1):
        raise BadParameter(f"{name}={amount} must be a count ≥ 0 or a fraction between 0.0 and 1.0")


def _count(name: str, amount: Amount, total: int, unit: str) -> int:
    if isinstance(amount, float):
        least = min(total, 1) if amount > 0 and unit == "steps" else 0
        return max(round(amount * total), least)
    if amount > total:
        raise BadParameter(
            f"{name}={amount} but the run has only {total} {unit};"
            f" lower it or give a fraction such as {name}=0.25"
        )
    return amount
