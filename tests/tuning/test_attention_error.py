"""Errors of sparse attention calls against dense attention on the same inputs."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import diffpatch
from diffpatch import NotPatched, TokenGrid, Window
from diffpatch.tuning.attention_error import AttentionErrors, Where
from tests.tiny import wan, wan22

LOCAL: dict[str, Any] = {"window": (-1, 1, 2), "shift": "none"}


def test_errors_are_relative_l1_of_the_attention_output(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, expected = wan(), []
    method = Window(**LOCAL)
    mask = method.pattern(TokenGrid(3, 2, 4)).dense()[0]
    attend = diffpatch.Method.attend

    def spy(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Any) -> Any:
        q1, k1, v1 = (x.transpose(1, 2) for x in (q, k, v))
        dense, sparse = (F.scaled_dot_product_attention(q1, k1, v1, m) for m in (None, mask))
        expected.append(float((sparse - dense).abs().sum() / dense.abs().sum()))
        return attend(self, q, k, v, call)

    monkeypatch.setattr(diffpatch.Method, "attend", spy)
    diffpatch.patch(tiny.pipe, method, dense_steps=1)
    with diffpatch.attention_error(tiny.pipe) as errors:
        tiny.run(num_inference_steps=3)
    # 2 sparse steps × 2 branches × 2 layers, in the order they ran
    places = [Where("transformer", la, s, b) for s in (1, 2) for b in (0, 1) for la in (0, 1)]
    found = [errors.per_call[where] for where in places]
    assert found == pytest.approx(expected, rel=1e-4) and len(errors.per_call) == 8
    assert min(found) > 1e-3
    assert errors.mean == pytest.approx(sum(expected) / 8, rel=1e-4)
    assert errors.per_step == pytest.approx({1: sum(found[:4]) / 4, 2: sum(found[4:]) / 4})
    assert set(errors.per_layer) == set(diffpatch.report(tiny.pipe).kept_per_layer)


def test_errors_of_branches_and_what_guidance_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    errors, dense = AttentionErrors(), torch.ones(1, 5, 2, 3)
    for step, (first, second) in enumerate([(0.1, 0.1), (0.2, -0.2)]):
        for branch, wrong in enumerate((first, second)):
            errors.add(Where("transformer", 0, step, branch), dense + wrong, dense)
    assert errors.per_branch == pytest.approx({0: 0.15, 1: 0.15})
    assert errors.difference == pytest.approx(
        (0.0 + 0.4) / 2
    )  # alike in one step, not in the other
    few = AttentionErrors()
    monkeypatch.setattr("diffpatch.tuning.attention_error.MOST_TOKENS", 2)
    few.add(Where("transformer", 0, 0, 1), dense, dense)  # no first branch to compare with
    assert few.difference is None
    for branch, wrong in enumerate((0.3, -0.1)):
        few.add(Where("transformer", 0, 1, branch), dense + wrong, dense)
    assert few.difference == pytest.approx(0.4)
    assert few.to_dict()["per_branch"] == pytest.approx({"0": 0.3, "1": 0.05})
    # Of the tokens 0, 3, 6, … of many; what the others get wrong is in no difference.
    monkeypatch.setattr("diffpatch.tuning.attention_error.MOST_TOKENS", 4)
    many, dense = AttentionErrors(), torch.ones(1, 11, 2, 3)
    off = torch.zeros(1, 11, 1, 1).index_fill(1, torch.tensor([0, 3, 6, 9]), 0.5)
    off[:, 1] = 100.0
    for branch, sign in enumerate((1, -1)):
        many.add(Where("transformer", 0, 0, branch), dense + sign * off, dense)
    assert many.difference == pytest.approx(1.0)


def test_smoothing_is_told_from_noise() -> None:
    dense = torch.randn(2, 400, 2, 8, generator=torch.Generator().manual_seed(0)) + 3
    noise = torch.randn(dense.shape, generator=torch.Generator().manual_seed(1))
    mean = dense.mean(1, keepdim=True)
    smooth, noisy = AttentionErrors(), AttentionErrors()
    smooth.add(Where("transformer", 0, 0, 0), mean + 0.8 * (dense - mean) + 1, dense)
    noisy.add(Where("transformer", 0, 0, 0), dense + 0.5 * noise, dense)
    assert smooth.slope == pytest.approx(0.8) and noisy.slope == pytest.approx(1.0, abs=0.02)
    assert AttentionErrors().slope == 1.0 and smooth.to_dict()["slope"] == smooth.slope
    before = smooth.slope
    flat = torch.ones(1, 4, 2, 8)  # nothing differs from token to token: it says nothing
    smooth.add(Where("transformer", 1, 0, 0), flat, flat)
    assert smooth.slope == before


def test_measuring_changes_nothing_and_ends_with_the_block() -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, "window", dense_steps=0, **LOCAL)
    plain = tiny.run()
    with pytest.raises(KeyError), diffpatch.attention_error(tiny.pipe) as errors:
        assert torch.equal(tiny.run(), plain)
        before = errors.to_dict()
        raise KeyError
    tiny.run(seed=1)
    assert errors.to_dict() == before and len(json.loads(json.dumps(before))["calls"]) == 8
    assert "attention error" in str(errors)


def test_experts_are_told_apart_and_repeats_are_one() -> None:
    tiny = wan22()
    diffpatch.patch(tiny.pipe, "window", dense_steps=0, **LOCAL)
    with diffpatch.attention_error(tiny.pipe) as once:
        tiny.run()
    with diffpatch.attention_error(tiny.pipe) as twice, diffpatch.attention_error(tiny.pipe):
        tiny.run()
        tiny.run()
    assert {where.transformer for where in once.per_call} == {"transformer", "transformer_2"}
    assert twice.per_call == pytest.approx(once.per_call)


def test_experts_patched_one_by_one_are_all_measured_and_counted() -> None:
    tiny = wan22()
    diffpatch.patch(tiny.pipe.transformer, "window", dense_steps=0)
    diffpatch.patch(tiny.pipe.transformer_2, "neighborhood", dense_steps=0)
    with diffpatch.attention_error(tiny.pipe) as errors:
        tiny.run()
    assert {where.transformer for where in errors.per_call} == {"transformer", "transformer_2"}


def test_a_method_that_keeps_everything_has_no_error() -> None:
    tiny = wan()
    with (
        pytest.raises(NotPatched, match="is not patched"),
        diffpatch.attention_error(tiny.pipe),
    ):
        pass
    diffpatch.patch(tiny.pipe, "window+temporal", dense_steps=0, refresh=2, **LOCAL)
    with diffpatch.attention_error(tiny.pipe) as errors:
        tiny.run(num_inference_steps=2)
    assert errors.per_step[0] < 1e-5 < errors.per_step[1]
    empty = AttentionErrors()
    assert empty.mean == 0.0 and "no sparse call" in str(empty)
