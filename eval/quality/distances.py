"""Distances between two sets of features: Fréchet (FID, FVD) and kernel (KID).

A distance is named after its features: FID is Fréchet on Inception, FVD on a video network. The
formulas are the same for all. Both are biased or noisy on small sets, so results carry their
counts, and a flag where the counts are too small to mean much.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """Features by item: what several processes, or several sessions, measure and put together.

    Attributes:
        rows: name of an item -> its features, (n, D) on the CPU; a clip may have a row per frame.
        extractor: what made them; sets of different extractors do not mix.
    """

    rows: Mapping[str, Tensor]
    extractor: str = ""

    def merge(self, *others: FeatureSet) -> FeatureSet:
        """All items together; the result does not depend on who measured which item.

        Raises:
            ValueError: an item is there twice, as padded samplers make it, or extractors differ.
        """
        rows = dict(self.rows)
        for other in others:
            if other.extractor != self.extractor:
                raise ValueError(
                    f"features of {self.extractor!r} and {other.extractor!r} cannot be merged"
                )
            if twice := rows.keys() & other.rows.keys():
                raise ValueError(f"{min(twice)!r} was measured twice; give every item one owner")
            rows |= other.rows
        return FeatureSet(rows, self.extractor)

    def stacked(self) -> Tensor:
        """All rows (N, D), ordered by the names of the items."""
        if not self.rows:
            raise ValueError("there are no features; measure at least one item")
        return torch.cat([self.rows[name] for name in sorted(self.rows)])

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        rows = {name: value.contiguous() for name, value in self.rows.items()}
        save_file(rows, path, metadata={"extractor": self.extractor})

    @classmethod
    def load(cls, path: Path) -> FeatureSet:
        """Read what `save` wrote."""
        with safe_open(path, framework="pt") as file:
            rows = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(rows, (file.metadata() or {}).get("extractor", ""))


def compare(candidate: Tensor, reference: Tensor, *, seed: int = 0) -> dict[str, Any]:
    """Both distances of two sets, with their counts; ready for JSON.

    `small_sample` is set where a set has fewer than two rows per feature: its covariance is then
    mostly noise, and the Fréchet distance of two samples of one source is far above 0. Compare
    with such a floor, or read the kernel distance, which is unbiased for independent sets; two sets
    of the same prompts and noise are not, and may fall below 0. Rows of frames count one by one,
    though frames of one clip are alike: a set of clips is smaller than its rows say.

    Args:
        candidate: (N, D) features.
        reference: (M, D) features.
        seed: of the kernel distance's subsets.

    Returns:
        fd, kd, kd_std, count, reference_count, features, small_sample; a distance is missing where
        a set is too small for it (2 rows for fd, 4 for kd).
    """
    _check(candidate, reference)
    few, features = min(len(candidate), len(reference)), candidate.shape[1]
    result: dict[str, Any] = {}
    if few >= 2:
        result["fd"] = frechet(candidate, reference)
    if few >= 4:
        result["kd"], result["kd_std"] = kernel(candidate, reference, seed=seed)
    return result | {
        "count": len(candidate),
        "reference_count": len(reference),
        "features": features,
        "small_sample": few < 2 * features,
    }


def frechet(first: Tensor, second: Tensor) -> float:
    """Fréchet distance of two sets, each taken as a Gaussian (Heusel et al. 2017).

    ``|m_a - m_b|² + tr A + tr B - 2 tr (A B)^½`` with covariances A and B. The last trace is the
    sum of the singular values of ``R_a R_bᵀ``, where ``A = R_aᵀ R_a``: no root of a matrix, and
    exact for sets smaller than their features.

    Args:
        first: (N, D), N at least 2.
        second: (M, D), M at least 2.
    """
    _check(first, second)
    if min(len(first), len(second)) < 2:
        raise ValueError("a Fréchet distance needs two rows a set; measure more items")
    (mean_a, root_a), (mean_b, root_b) = _gaussian(first), _gaussian(second)
    shift = (mean_a - mean_b).square().sum()
    common = torch.linalg.svdvals(root_a @ root_b.T).sum()
    distance = shift + root_a.square().sum() + root_b.square().sum() - 2 * common
    return max(float(distance), 0.0)  # rounding; the distance of equal sets is 0


def kernel(
    first: Tensor,
    second: Tensor,
    *,
    subsets: int = KID_SUBSETS,
    subset_size: int | None = None,
    seed: int = 0,
) -> tuple[float, float]:
    """Kernel distance, as KID averages it (Bińkowski et al. 2018): mean and std over subsets.

    Args:
        first: (N, D).
        second: (M, D).
        subsets: how many random subsets of each set to compare.
        subset_size: rows in a subset; None is 1000, or half of the smaller set if that is less,
            as subsets that are the whole set would have a std of 0.
        seed: of the subsets.
    """
    _check(first, second)
    few = min(len(first), len(second))
    size = min(KID_SUBSET_SIZE, few // 2) if subset_size is None else subset_size
    if not 2 <= size <= few:
        raise ValueError(
            f"a kernel distance needs subsets of 2 to {few} rows, got {size}; measure more items"
        )
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        picks = [torch.randperm(len(s), generator=generator)[:size] for s in (first, second)]
        values.append(squared_mmd(first[picks[0]], second[picks[1]]))
    found = torch.tensor(values, dtype=torch.float64)
    return float(found.mean()), float(found.std(correction=0))


def squared_mmd(first: Tensor, second: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel ``(x·y / D + 1)³``; can be < 0."""
    x, y = first.double(), second.double()
    (n, width), m = x.shape, len(y)

    def similarity(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / width + 1) ** 3

    within_x, within_y = similarity(x, x), similarity(y, y)
    inside = (within_x.sum() - within_x.trace()) / (n * (n - 1))
    inside = inside + (within_y.sum() - within_y.trace()) / (m * (m - 1))
    return float(inside - 2 * similarity(x, y).mean())


def halves(features: FeatureSet) -> tuple[Tensor, Tensor]:
    """Every other item against the rest: two samples of one source, whose distance is a floor."""
    names: Iterable[str] = sorted(features.rows)
    listed = list(names)
    first, second = (
        FeatureSet({name: features.rows[name] for name in listed[start::2]}, features.extractor)
        for start in (0, 1)
    )
    return first.stacked(), second.stacked()


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and a root R (at most D rows) of the covariance, ``Rᵀ R``."""
    values = features.double()
    mean = values.mean(0)
    centered = (values - mean) / (len(values) - 1) ** 0.5
    if len(centered) > centered.shape[1]:
        centered = torch.linalg.qr(centered, mode="r").R
    return mean, centered


def _check(first: Tensor, second: Tensor) -> None:
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(
            "features must be (N, D) and (M, D) with the same D, "
            f"got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    if not (torch.isfinite(first).all() and torch.isfinite(second).all()):
        raise ValueError("features hold NaN or infinity; check the frames they were made from")
