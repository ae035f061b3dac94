"""The model of what a choice costs counts what it says it counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffpatch.kernels.selection import cost as costs

CARD = costs.Card("plain", memory=1e12, tensor=1e15, integer=1e13)
README = Path(costs.__file__).resolve().parents[1] / "README.md"


def test_each_part_is_its_bytes_and_operations() -> None:
    found = costs.cost(CARD, 1280, 2, 64, 0.25, tile=128, strip=64)
    bytes_read = 3 * 1280 * 2 * 64 * 2
    bytes_made = 2 * 64 * (10 + 20 + 20) * 2 * 4  # heads, channels, pieces, mean and variance, fp32
    assert found.pooling == pytest.approx((bytes_read + bytes_made) / (1e12 * costs.STREAMING))
    pairs = 2 * 10 * 20
    products = 4 * 2 * pairs * 64 / (1e15 / 2 * costs.PRODUCTS)
    assert found.scores == pytest.approx(products + 4 * pairs / (1e12 * costs.STREAMING))
    assert found.attention == pytest.approx(4 * 2 * 64 * 0.25 * 1280**2 / (1e15 * costs.ATTENTION))
    assert found.share == pytest.approx(sum(found[:3]) / found.attention)


def test_a_choice_weighs_less_where_more_is_kept_or_less_is_scored() -> None:
    def share(kept: float, **options: object) -> float:
        return costs.cost(costs.CARDS["H200"], 75600, 40, 128, kept, **options).share  # type: ignore[arg-type]

    assert share(0.25) < share(0.1)
    assert share(0.1) < share(0.1, rest="drop")
    assert share(0.1, strip=128) < share(0.1)
    assert share(0.1) < 0.06


def test_the_page_shows_the_table() -> None:
    assert costs.table() in README.read_text(encoding="utf-8")
    assert costs.main([]) == 0
