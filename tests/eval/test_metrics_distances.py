"""Distances of sets: known values, torchmetrics' formulas, small sets, and who measured what."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffpatch.eval.quality.distances import (
    KID_SUBSET_SIZE,
    KID_SUBSETS,
    FeatureSet,
    compare,
    frechet,
    halves,
    kernel,
    squared_mmd,
)

FEATURES = 8


def rows(count: int, seed: int = 0, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(FEATURES, FEATURES, generator=torch.Generator().manual_seed(99))
    return scale * torch.randn(count, FEATURES, generator=generator) @ mix + shift


def items(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return {f"{number:03d}": row[None] for number, row in enumerate(rows(count, seed))}


def test_frechet_of_known_gaussians() -> None:
    # Standardised to the exact moments; then only the means, or only the spreads, differ.
    values = torch.linalg.qr(rows(64).double() - rows(64).double().mean(0)).Q * 63**0.5
    values = values - values.mean(0)
    assert frechet(values, values + 2) == pytest.approx(4 * FEATURES, rel=1e-6)
    # tr(I + 9 I - 2 · 3 I) = 4 D, up to what centring changed
    assert frechet(values, 3 * values) == pytest.approx(4 * FEATURES, rel=0.05)


@pytest.mark.parametrize("count", [5, 50])
def test_frechet_is_torchmetrics(count: int) -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")
    a, b = rows(count).double(), rows(count + 3, 1, 0.5, 1.5).double()
    moments = [m for x in (a, b) for m in (x.mean(0), torch.cov(x.T))]
    expected = float(fid._compute_fid(*moments))
    assert frechet(a, b) == pytest.approx(expected, rel=1e-4, abs=1e-3)
    assert frechet(b, a) == pytest.approx(frechet(a, b), rel=1e-9)


def test_kernel_distance_is_torchmetrics() -> None:
    kid = pytest.importorskip("torchmetrics.image.kid")
    a, b = rows(20).double(), rows(20, 1, 0.3).double()
    assert squared_mmd(a, b) == pytest.approx(float(kid.poly_mmd(a, b)), rel=1e-9)
    mean, std = kernel(a, b, subsets=3, subset_size=20)
    assert mean == pytest.approx(squared_mmd(a, b), rel=1e-9) and std < 1e-9


def test_equal_sets_have_no_distance_and_corruption_adds_to_it() -> None:
    a = rows(100)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)
    noisy = [frechet(a, a + scale * rows(100, 7)) for scale in (0.1, 0.5, 1.0, 2.0)]
    assert noisy == sorted(noisy) and noisy[0] > 0


def test_small_sets_are_flagged_and_their_bias_is_real() -> None:
    few, many = compare(rows(12), rows(12, 1)), compare(rows(800), rows(800, 1))
    assert few["small_sample"] and not many["small_sample"]
    assert few["fd"] > 20 * many["fd"]  # both truly 0
    assert few["count"] == few["reference_count"] == 12 and few["features"] == FEATURES
    assert compare(rows(2 * FEATURES), rows(99))["small_sample"] is False
    assert compare(rows(2 * FEATURES - 1), rows(99))["small_sample"] is True


def test_the_kernel_distance_is_not_biased_by_few_rows() -> None:
    values = [squared_mmd(rows(12, 2 * s), rows(12, 2 * s + 1)) for s in range(200)]
    found = torch.tensor(values)
    assert float(found.mean().abs()) < 3 * float(found.std()) / 200**0.5


def test_distances_that_a_set_is_too_small_for_are_missing() -> None:
    assert not {"fd", "kd"} & set(compare(rows(1), rows(9)))
    three = compare(rows(3), rows(9))
    assert "fd" in three and "kd" not in three
    assert {"fd", "kd", "kd_std"} <= set(compare(rows(4), rows(9)))
    with pytest.raises(ValueError, match="two rows"):
        frechet(rows(1), rows(9))
    with pytest.raises(ValueError, match="2 to 3 rows, got 1"):
        kernel(rows(3), rows(9))


@pytest.mark.parametrize("wrong", [torch.zeros(3, FEATURES + 1), torch.zeros(FEATURES)])
def test_features_must_fit_each_other(wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="the same D"):
        compare(wrong, rows(5))


def test_broken_features_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        frechet(rows(5).fill_(float("nan")), rows(5))


@pytest.mark.parametrize("parts", [2, 3])
def test_merging_does_not_depend_on_who_measured_what(parts: int) -> None:
    whole = FeatureSet(items(33), "x")  # 33 items: an uneven split
    names = list(whole.rows)
    strided = [FeatureSet({n: whole.rows[n] for n in names[i::parts]}, "x") for i in range(parts)]
    merged = strided[-1].merge(*strided[:-1])
    assert torch.equal(merged.stacked(), whole.stacked())
    other = rows(40, 5)
    assert compare(merged.stacked(), other) == compare(whole.stacked(), other)


def test_items_counted_twice_and_mixed_extractors_are_refused() -> None:
    both = FeatureSet(items(3), "x")
    with pytest.raises(ValueError, match="'000' was measured twice"):
        both.merge(FeatureSet({"000": torch.zeros(1, FEATURES)}, "x"))
    with pytest.raises(ValueError, match="'x' and 'y'"):
        both.merge(FeatureSet({"a": torch.zeros(1, FEATURES)}, "y"))
    with pytest.raises(ValueError, match="no features"):
        FeatureSet({}).stacked()


def test_features_survive_a_file(tmp_path: Path) -> None:
    features = FeatureSet({"a/b.png": rows(2), "c": rows(1, 1)}, "dino")
    features.save(tmp_path / "f.safetensors")
    back = FeatureSet.load(tmp_path / "f.safetensors")
    assert back.extractor == "dino" and torch.equal(back.stacked(), features.stacked())


def test_halves_share_nothing_and_lose_nothing() -> None:
    features = FeatureSet(items(7), "x")
    first, second = halves(features)
    assert (len(first), len(second)) == (4, 3)
    assert {tuple(row) for row in torch.cat([first, second]).tolist()} == {
        tuple(row) for row in features.stacked().tolist()
    }


def test_subsets_are_those_that_are_published() -> None:
    """A hundred of a thousand, as torch-fidelity and torchmetrics have them (arXiv 1801.01401)."""
    assert (KID_SUBSETS, KID_SUBSET_SIZE) == (100, 1000)


def test_without_a_seed_it_is_zero() -> None:
    a, b = rows(40), rows(40, 1)
    assert compare(a, b) == compare(a, b, seed=0)
