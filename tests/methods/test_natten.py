"""Neighborhood attention is NATTEN's, key for key, on 36 odd cases recorded from NATTEN."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from diffpatch import Neighborhood, TokenGrid
from tests.methods.record_natten import FILE, cases, unpack

RECORD = json.loads(FILE.read_text())


@pytest.mark.parametrize(
    "case", RECORD["cases"], ids=lambda case: "x".join(map(str, case["shape"]))
)
def test_neighborhood_sees_what_natten_sees(case: dict[str, Any]) -> None:
    def axes(values: list[Any], missing: Any) -> tuple[Any, ...]:
        return (*[missing] * (3 - len(values)), *values)

    method = Neighborhood(
        window=axes(case["window"], 1),
        stride=axes(case["stride"], 1),
        dilation=axes(case["dilation"], 1),
        causal=axes(case["causal"], False),
    )
    pattern = method.pattern(TokenGrid(*axes(case["shape"], 1)))
    expected = unpack(case["mask"], math.prod(case["shape"]))
    assert torch.equal(pattern.dense()[0], expected)
    assert pattern.kept == pytest.approx(expected.float().mean().item())


def test_the_record_is_of_these_cases() -> None:
    recorded = [{k: v for k, v in case.items() if k != "mask"} for case in RECORD["cases"]]
    assert recorded == cases() and len(recorded) >= 30
    assert {len(case["shape"]) for case in recorded} == {1, 2, 3}
    for name in ("stride", "dilation"):
        assert sum(max(case[name]) > 1 for case in recorded) >= 10, name
    assert sum(any(case["causal"]) for case in recorded) >= 10
