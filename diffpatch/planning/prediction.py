"""The seconds a run will take on a device, dense and with a method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffpatch.errors import BadParameter, choices
from diffpatch.kernels.block_sparse.work import Work
from diffpatch.pipelines.shapes.table import ModelShape
from diffpatch.planning.profiles import BYTES, DeviceProfile


@dataclass(frozen=True)
class Prediction:
    """What a run takes on a device. Seconds are means over its steps, of the transformer alone.

    Attributes:
        device: name of the profile.
        calibrated: whether attention in this dtype was measured there; if not, everything runs at
            published peaks, which no kernel reaches: trust the order, not the seconds.
        dtype: "fp32", "bf16" or "fp16".
        call_speedup: of one sparse attention call, against a dense one.
        attention_speedup: of all self-attention of the run, dense steps and layers included.
        step_speedup: of the run's transformer.
        dense_step_seconds: of a dense step, all guidance branches.
        step_seconds: of a step with the method.
    """

    device: str
    calibrated: bool
    dtype: str
    call_speedup: float
    attention_speedup: float
    step_speedup: float
    dense_step_seconds: float
    step_seconds: float

    def __str__(self) -> str:
        how = "calibrated" if self.calibrated else "UNCALIBRATED: published peaks, nothing measured"
        return (
            f"{self.attention_speedup:.2f}× for attention ({self.call_speedup:.2f}× a sparse call),"
            f" {self.step_speedup:.2f}× for the transformer: a step from"
            f" {duration(self.dense_step_seconds)} to {duration(self.step_seconds)}"
            f" on {self.device} in {self.dtype} ({how})"
        )


def predict(
    profile: DeviceProfile,
    shape: ModelShape,
    tokens: int,
    work: Sequence[Work | None],
    *,
    steps: int,
    branches: int,
    dtype: str | None = None,
) -> Prediction:
    """The prediction of a run.

    Args:
        profile: the device.
        shape: the model.
        tokens: length of the self-attention sequence.
        work: of every attention call of one branch, over all steps and layers; None is dense.
        steps: denoising steps.
        branches: forwards of a step.
        dtype: of the model; None takes the usual one of the device.

    Raises:
        BadParameter: the profile does not know the dtype.
    """
    dtype = dtype or profile.usual_dtype
    if dtype not in BYTES or dtype not in profile.peak:
        known = [name for name in profile.peak if name in BYTES]
        raise BadParameter(f"dtype={dtype!r} on {profile.name}: {choices(dtype, known)}")
    size = shape.heads, shape.head_dim, dtype
    dense_call = profile.dense_seconds(tokens, *size)
    seen: dict[Work, float] = {}
    for item in {item for item in work if item is not None}:
        seen[item] = profile.seconds(item, *size)
    sparse = [seen[item] for item in work if item is not None]
    attention = sum(sparse) + (len(work) - len(sparse)) * dense_call
    rest = len(work) * profile.linear_seconds(shape.linear_flops(tokens), dtype)
    dense = len(work) * dense_call
    return Prediction(
        device=profile.name,
        calibrated=profile.calibrated(dtype),
        dtype=dtype,
        call_speedup=dense_call * len(sparse) / sum(sparse) if sparse else 1.0,
        attention_speedup=dense / attention,
        step_speedup=(dense + rest) / (attention + rest),
        dense_step_seconds=(dense + rest) * branches / steps,
        step_seconds=(attention + rest) * branches / steps,
    )


def duration(seconds: float) -> str:
    """Seconds with three digits.

    >>> duration(0.01234), duration(1.5), duration(73.2)
    ('12.3 ms', '1.50 s', '73.2 s')
    """
    value, unit = (seconds * 1e3, "ms") if seconds < 1 else (seconds, "s")
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f} {unit}"
