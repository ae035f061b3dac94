"""What a device can do, and the seconds that attention takes on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from diffpatch.errors import BadParameter, choices
from diffpatch.kernels.block_sparse_work import KINDS, Work

PER_PAIR = {"pairs", "pairs_of_many", "pairs_of_few", "masked", "virtual", "dense"}
DENSE = "dense"  # the coefficient of a pair of dense attention, beside those of `Work`


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

    def calibrated(self, dtype: str) -> bool:
        """Whether attention in this dtype was measured, at any head size."""
        return any(key.partition("/")[0] == dtype for key in self.coefficients)

    def seconds(self, work: Work, heads: int, head_dim: int, dtype: str) -> float:
        """Seconds of one attention call of some work a head; by its peak where uncalibrated."""
        if not self.calibrated(dtype):
            return 4 * work.computed * heads * head_dim / self.peak_of(dtype)
        cost = self._costs(head_dim, dtype)
        each = dict(zip(KINDS, work.counts(), strict=True))
        calls = each.pop("calls") * cost["calls"]
        return calls + heads * sum(count * cost[kind] for kind, count in each.items())

    def dense_seconds(self, tokens: int, heads: int, head_dim: int, dtype: str) -> float:
        """Seconds of one call of the fastest dense attention."""
        pairs = heads * float(tokens) ** 2
        if not self.calibrated(dtype):
            return 4 * pairs * head_dim / self.peak_of(dtype)
        return pairs * self._costs(head_dim, dtype)[DENSE]

    def peak_of(self, dtype: str) -> float:
        """FLOP/s in a dtype.

        Raises:
            BadParameter: the profile does not know it.
        """
        if dtype not in self.peak:
            raise BadParameter(f"{self.name}: dtype={dtype!r} {choices(dtype, self.peak)}")
        return self.peak[dtype]

    def _costs(self, head_dim: int, dtype: str) -> dict[str, float]:
        """Those of the nearest head size that was measured, per pair in proportion to the size."""
        sizes = [int(key.partition("/")[2]) for key in self.coefficients if key.startswith(dtype)]
        nearest = min(sizes, key=lambda size: abs(size - head_dim))
        found = self.coefficients[f"{dtype}/{nearest}"]
        return {k: c * (head_dim / nearest if k in PER_PAIR else 1.0) for k, c in found.items()}


def profile_names() -> list[str]:
    """The devices that a profile ships for."""
    return sorted(f.name.removesuffix(".json") for f in _folder().iterdir() if _is_profile(f.name))


def load_profile(name: str | Path) -> DeviceProfile:
    """A shipped profile by name, or one that `diffpatch bench profile` wrote.

    Raises:
        BadParameter: there is no such profile, or the file holds none.
    """
    if str(name) in profile_names():
        text = (_folder() / f"{name}.json").read_text(encoding="utf-8")
    elif Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8")
    else:
        raise BadParameter(
            f"no profile {str(name)!r}: {choices(str(name), profile_names())}, or a file that"
            " `diffpatch bench profile` wrote"
        )
    try:
        found: dict[str, Any] = json.loads(text)["profile"]
        return DeviceProfile(**found)
    except (ValueError, KeyError, TypeError) as error:
        raise BadParameter(f"{name} is no device profile: {error}") from None


def _folder() -> Any:
    return resources.files("diffpatch.eval") / "profiles"


def _is_profile(file: str) -> bool:
    return file.endswith(".json")
