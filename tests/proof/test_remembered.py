"""What is remembered from call to call, and which sums errors and choices are made from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import diffpatch
from diffpatch import Dense, Dynamic, Method, Temporal, TokenGrid, Window
from diffpatch.methods.base import AttentionCall
from diffpatch.tuning.attention_error import AttentionErrors, Where
from diffpatch.tuning.calibration import THRESHOLDS, _loosest
from diffpatch.tuning.trial import Trial
from tests.tiny import wan

WIDE, HIGH = TokenGrid(1, 8, 16, text_before=3), TokenGrid(1, 16, 8, text_before=3)
LOCAL = Window(window=(-1, 2, 2), shift="none")


@pytest.mark.parametrize(
    "method",
    [
        Temporal(over=LOCAL, mode="tail", refresh=4),
        Temporal(over=LOCAL, mode="mask", refresh=4, kept=0.5),
        Temporal(over=Dense(tile=16), mode="skip", refresh=4, threshold=-0.5),
        Dynamic(kept=0.4, tile=16, strip=4, pool=4, refresh=4),
    ],
    ids=lambda m: f"{m.name} {getattr(m, 'mode', '')}",
)
def test_what_was_remembered_of_one_grid_is_not_used_on_another_of_equal_length(
    method: Method,
) -> None:
    random = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 3, 1, WIDE.num_tokens, 2, 8, generator=random).unbind()
    state: dict[str, Any] = {}
    patterns = [method.pattern(grid, method.variant(0, 0)) for grid in (WIDE, HIGH)]
    q, k, v = 3 * first
    method.attend(q, k, v, AttentionCall(patterns[0], state=state))
    q, k, v = 3 * second
    found = method.attend(q, k, v, AttentionCall(patterns[1], step=1, state=state))
    fresh = method.attend(q, k, v, AttentionCall(patterns[1], step=1, state={}))
    assert torch.equal(found.out, fresh.out)
    assert float(found.kept) == float(fresh.kept)


def test_errors_at_one_place_are_a_ratio_of_sums() -> None:
    errors, place = AttentionErrors(), Where("transformer", 0, 0, 0)
    small, large = torch.full((1, 2, 1, 2), 1.0), torch.full((1, 2, 1, 2), 10.0)
    errors.add(place, small * 1.5, small)  # off by half
    errors.add(place, large * 1.01, large)  # off by a hundredth
    expected = (4 * 0.5 + 4 * 0.1) / (4 * 1 + 4 * 10)
    assert errors.per_call[place] == pytest.approx(expected, rel=1e-5)
    assert errors.mean == pytest.approx(expected, rel=1e-5)
    other = Where("transformer", 1, 2, 0)
    errors.add(other, large * 2, large)  # another place counts as much as this one
    assert errors.mean == pytest.approx((expected + 1) / 2, rel=1e-5)
    assert errors.per_layer == pytest.approx({"transformer.0": expected, "transformer.1": 1.0})
    assert errors.per_step == pytest.approx({0: expected, 2: 1.0})
    assert "transformer.1: 100.00%" in str(errors) and "mean of 2 calls" in str(errors)


def test_errors_are_summed_in_more_than_16_bits() -> None:
    errors, place = AttentionErrors(), Where("transformer", 0, 0, 0)
    dense = torch.full((1, 4096, 2, 64), 100.0, dtype=torch.float16)  # sums to 5e7
    errors.add(place, dense + 1, dense)
    assert errors.mean == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize(
    ("errors", "bound", "index"),
    [
        ([0.01, 0.2, 0.05], 0.1, 0),
        ([0.01, 0.02, 0.03, 0.5, 0.04], 0.1, 2),
        ([0.01, 0.1, 0.11], 0.1, 1),
        ([], 0.1, 0),
    ],
)
def test_a_threshold_beyond_one_that_is_off_by_too_much_is_not_chosen(
    errors: list[float], bound: float, index: int
) -> None:
    trial = Trial(Temporal(over=Dense(tile=16), mode="skip"), THRESHOLDS)
    for number, error in enumerate(errors):  # two calls whose mean it is
        apart = torch.tensor([0.5, 1.5]).double() * error
        trial.errors[1, number] = list(apart)
    assert _loosest(trial, 1, bound) == index


def test_the_seed_of_a_calibration_is_that_of_its_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, seeds = wan(), []
    call = type(tiny.pipe).__call__

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        seeds.append(kwargs["generator"].initial_seed())
        return call(self, *args, **kwargs)

    monkeypatch.setattr(type(tiny.pipe), "__call__", spy)
    arguments = {k: v for k, v in tiny.call.items() if k != "prompt"}
    for seed in (3, 4):
        seeds.clear()
        diffpatch.calibrate(
            tiny.pipe, Temporal(over=Dense(tile=16), mode="skip"), prompt="a cat", seed=seed,
            call=arguments | {"output_type": "latent"}, max_error=0.9, spread=0.0, dense_steps=0,
        )  # fmt: skip
        assert seeds == [seed, seed]
