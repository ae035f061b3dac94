"""What a device can do, and the seconds that attention and the rest of a step take on it.

Two kinds: published peaks (`DEVICES`), which know nothing of kernels and are labelled uncalibrated,
and files that `diffpatch bench profile` wrote, which are fitted to measurements.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from diffpatch.checking import checked
from diffpatch.errors import BadParameter, choices
from diffpatch.kernels.block_sparse.work import KINDS, Work

PER_PAIR = {"pairs", "pairs_of_many", "pairs_of_few", "masked", "virtual", "dense"}
DENSE = "dense"  # the coefficient of a pair of dense attention, beside those of `Work`
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class DeviceProfile:
    """A device: its peaks, and, where it was measured, what attention costs on it.

    Attributes:
        name: of the device.
        backend: what runs block-sparse attention there: "torch" or "triton".
        peak: FLOP/s by dtype ("fp32", "bf16", "fp16"), as its maker states them, dense; or
            measured on a large matrix product.
        bandwidth: bytes a second of its memory.
        coefficients: by "dtype/head size", seconds for each count of `Work` (all but `calls` for
            one head) and for a pair of dense attention. Empty where nothing was measured.
        source: where all this comes from.
    """

    name: str
    backend: str
    peak: Mapping[str, float]
    bandwidth: float
    coefficients: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    source: str = ""

    @property
    def usual_dtype(self) -> str:
        """What models run in there, unless one says otherwise."""
        return "fp32" if self.backend == "torch" else "bf16"

    def calibrated(self, dtype: str) -> bool:
        """Whether attention in this dtype was measured, at any head size."""
        return bool(self._sizes(dtype))

    def seconds(self, work: Work, heads: int, head_dim: int, dtype: str) -> float:
        """Seconds of one attention call of some work a head; by the peaks where uncalibrated."""
        if not self.calibrated(dtype):
            moved = (2 * work.keys + work.rows) * heads * head_dim * BYTES[dtype]
            return self._at_peak(4 * work.computed * heads * head_dim, moved, dtype)
        cost = self._costs(head_dim, dtype)
        each = dict(zip(KINDS, work.counts(), strict=True))
        calls = each.pop("calls") * cost["calls"]
        return calls + heads * sum(count * cost[kind] for kind, count in each.items())

    def dense_seconds(self, tokens: int, heads: int, head_dim: int, dtype: str) -> float:
        """Seconds of one call of the fastest dense attention."""
        pairs = heads * float(tokens) ** 2
        if not self.calibrated(dtype):
            moved = 4 * tokens * heads * head_dim * BYTES[dtype]
            return self._at_peak(4 * pairs * head_dim, moved, dtype)
        return pairs * self._costs(head_dim, dtype)[DENSE]

    def linear_seconds(self, flops: float, dtype: str) -> float:
        """Seconds of the matrix products of a layer, which run at the peak."""
        return flops / self.peak_of(dtype)

    def _at_peak(self, flops: float, moved: float, dtype: str) -> float:
        """Roofline: what takes longer, computing or moving that many bytes."""
        return max(flops / self.peak_of(dtype), moved / self.bandwidth)

    def peak_of(self, dtype: str) -> float:
        """FLOP/s in a dtype.

        Raises:
            BadParameter: the profile does not know it.
        """
        if dtype not in self.peak:
            raise BadParameter(f"{self.name}: dtype={dtype!r} {choices(dtype, self.peak)}")
        return self.peak[dtype]

    def _sizes(self, dtype: str) -> list[int]:
        """The head sizes that were measured in a dtype."""
        keys = (key.partition("/") for key in self.coefficients)
        return [int(size) for name, _, size in keys if name == dtype]

    def _costs(self, head_dim: int, dtype: str) -> dict[str, float]:
        """Those of the nearest head size that was measured, per pair in proportion to the size."""
        nearest = min(self._sizes(dtype), key=lambda size: abs(size - head_dim))
        found = self.coefficients[f"{dtype}/{nearest}"]
        return {k: c * (head_dim / nearest if k in PER_PAIR else 1.0) for k, c in found.items()}


def _published(name: str, fp32: float, half: float, bandwidth: float, source: str) -> DeviceProfile:
    peak = {"fp32": fp32 * 1e12, "bf16": half * 1e12, "fp16": half * 1e12}
    return DeviceProfile(name, "triton", peak, bandwidth * 1e12, source=source)


# TFLOP/s without sparsity: fp32 outside of tensor cores, 16 bits in them with fp32 sums; TB/s.
DEVICES: tuple[DeviceProfile, ...] = (
    _published("h100", 66.9, 989.4, 3.35, "NVIDIA H100 data sheet, SXM5 80 GB"),
    _published("h200", 66.9, 989.4, 4.8, "NVIDIA H200 data sheet, SXM"),
    _published("a100", 19.5, 312.0, 2.04, "NVIDIA A100 data sheet, SXM4 80 GB"),
    _published("4090", 82.6, 165.2, 1.008, "NVIDIA Ada architecture paper, GeForce RTX 4090"),
    _published("l40s", 91.6, 362.0, 0.864, "NVIDIA L40S data sheet"),
)


def profile_names() -> list[str]:
    """The devices that a profile ships for: published peaks, and measured ones."""
    return sorted({device.name for device in DEVICES} | _measured().keys())


@checked()
def load_profile(name: str | Path | DeviceProfile) -> DeviceProfile:
    """A shipped profile by name (a measured one before published peaks), or a file's.

    Args:
        name: of `profile_names()`, in any case; or a file that `diffpatch bench profile` wrote.

    Raises:
        BadParameter: there is no such profile, or the file holds none.
    """
    if isinstance(name, DeviceProfile):
        return name
    measured, wanted = _measured(), str(name).lower()
    if wanted in measured:
        return _parse(measured[wanted].read_text(encoding="utf-8"), str(name))
    published = {device.name: device for device in DEVICES}
    if wanted in published:
        return published[wanted]
    if Path(name).is_file():
        try:
            return _parse(Path(name).read_text(encoding="utf-8"), str(name))
        except UnicodeDecodeError as error:
            raise BadParameter(f"{name} is not a device profile: {error}") from None
    raise BadParameter(
        f"no device profile {str(name)!r}: {choices(wanted, profile_names())}, or a file that"
        " `diffpatch bench profile --json FILE` wrote"
    )


def _parse(text: str, name: str) -> DeviceProfile:
    try:
        found: dict[str, Any] = json.loads(text)["profile"]
        return DeviceProfile(**found)
    except (ValueError, KeyError, TypeError) as error:
        raise BadParameter(f"{name} is not a device profile: {error!r}") from None


def _measured() -> dict[str, Any]:
    """The committed files by the name of their device: results/profile_<name>.json."""
    folder = resources.files("diffpatch.eval") / "results"
    if not folder.is_dir():
        return {}
    files = {file.name: file for file in folder.iterdir()}
    found = {n: f for n, f in files.items() if n.startswith("profile_") and n.endswith(".json")}
    return {n.removeprefix("profile_").removesuffix(".json"): f for n, f in found.items()}
