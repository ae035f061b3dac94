"""From a target to settings, on curves and pairs that follow known laws."""

from __future__ import annotations

import math
from typing import Any

import pytest

from diffpatch import BadParameter
from diffpatch.targets.choice import choose_for
from diffpatch.targets.picture import fitted, quality_line, time_line
from diffpatch.targets.settings import Settings
from diffpatch.targets.target import Target
from tests.targets.test_settings import made

DENSE = 0.2
SIZES = (0.1, 0.2, 0.4, 0.7)


def error_of(kept: float, hardness: float) -> float:
    return hardness * (1 - kept) ** 2


def pair(kept: float, error: float) -> dict[str, Any]:
    """A rendered pair whose PSNR falls 20 dB a decade of error, and whose time is known."""
    psnr = 10 - 20 * math.log10(error)
    return {"prompt": "p", "kept": kept, "error": error, "psnr": psnr,
            "seconds": 10 * (0.25 + 0.75 * kept), "dense_seconds": 10.0}  # fmt: skip


def settings(pairs: bool = True, **changes: Any) -> Settings:
    """Two layers of three heads, of which later ones are harder, and dropping costs twice."""
    data = made()
    data["measured_on"]["dense_steps"] = DENSE
    data["curves"] = {
        f"transformer.{layer}.{head}": {
            rest: [(k, error_of(k, 0.1 * (1 + 3 * layer + head) * factor)) for k in SIZES]
            for rest, factor in (("virtual", 1.0), ("drop", 2.0))
        }
        for layer in range(2)
        for head in range(3)
    }
    if pairs:
        data["rendered"] = [pair(k, error_of(k, 0.35)) for k in SIZES]
    return Settings.model_validate({**data, **changes})


def test_a_kept_fraction_counts_the_dense_steps() -> None:
    chosen = choose_for(settings(), Target.parse("kept 0.4"))
    heads = chosen.budgets["transformer"]
    sparse = sum(map(sum, heads.values())) / 6
    assert sparse <= (0.4 - DENSE) / (1 - DENSE) + 1e-9
    assert chosen.kept == pytest.approx(DENSE + (1 - DENSE) * sparse)
    assert chosen.dense_steps == DENSE and chosen.rest == "virtual"
    flat = [kept for layer in sorted(heads) for kept in heads[layer]]
    assert flat == sorted(flat), "harder heads keep more"


def test_no_head_starves_unless_less_is_asked_for() -> None:
    for text in ("kept 0.36", "error 20%"):
        heads = choose_for(settings(), Target.parse(text)).budgets["transformer"]
        assert min(map(min, heads.values())) >= 0.12
    little = choose_for(settings(), Target.parse("kept 0.35")).budgets["transformer"]
    assert min(map(min, little.values())) == 0.1


def test_an_error_is_met_by_the_fewest_pairs() -> None:
    loose = choose_for(settings(), Target.parse("error 20%"))
    tight = choose_for(settings(), Target.parse("error 5%"))
    assert tight.error <= 0.05 < loose.error <= 0.2 and loose.kept < tight.kept


def test_decibels_come_from_the_pairs() -> None:
    chosen = choose_for(settings(), Target.parse("30 dB"))
    assert chosen.error <= 0.1 * (1 + 1e-6)  # 10 - 20 log10(0.1) = 30
    assert chosen.psnr is not None and chosen.psnr >= 30 - 1e-6
    assert chosen.spread == pytest.approx(0.0, abs=1e-6)
    assert "dB to dense (predicted)" in str(chosen)


def test_a_target_is_met_by_four_of_five_prompts() -> None:
    """Pairs of an easy and a hard prompt, which lie around the line."""
    pairs = [
        pair(k, error_of(k, 0.35)) | {"psnr": 10 - 20 * math.log10(error_of(k, 0.35)) + level}
        for k in SIZES
        for level in (-3.0, 3.0)
    ]
    chosen = choose_for(settings(rendered=pairs), Target.parse("30 dB"))
    assert chosen.spread is not None and 3 <= chosen.spread <= 4.5 and chosen.low is not None
    assert chosen.psnr is not None and chosen.psnr >= 32 and chosen.low >= 30 - 1e-6
    assert "four of five prompts 30" in str(chosen)


def test_quality_up_to_the_noise_floor_may_be_asked_for() -> None:
    chosen = choose_for(settings(floor=30.0), Target.parse("30 dB"))
    assert chosen == choose_for(settings(), Target.parse("30 dB"))


def test_where_all_steps_are_dense_nothing_less_can_be_kept() -> None:
    whole = settings(pairs=False)
    measured = whole.measured_on.model_copy(update={"dense_steps": 1.0})
    with pytest.raises(BadParameter, match="the first 100% of the steps are dense"):
        choose_for(whole.model_copy(update={"measured_on": measured}), Target.parse("kept 0.5"))


def test_without_dense_steps_a_refusal_does_not_speak_of_them() -> None:
    whole = settings()
    measured = whole.measured_on.model_copy(update={"dense_steps": 0.0})
    with pytest.raises(BadParameter, match=r"the least that was measured keeps 0\.1$"):
        choose_for(whole.model_copy(update={"measured_on": measured}), Target.parse("kept 0.05"))


def test_a_speedup_comes_from_the_pairs() -> None:
    chosen = choose_for(settings(), Target.parse("2x"))
    assert chosen.kept <= 1 / 3 + 1e-9  # 0.25 + 0.75 k = 1/2
    assert chosen.speedup is not None and chosen.speedup >= 2 - 1e-9


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("kept 0.1", {}, "the first 20% of the steps are dense, and they alone keep 0.2"),
        ("kept 0.21", {}, "least that was measured keeps 0.28, the 20% of dense steps included$"),
        ("2.4x", {}, "keeps 0.28, .* included, which is predicted to be 2.17×$"),
        ("2.6x", {}, "they alone keep 0.2, which is predicted to be 2.50×$"),
        ("30 dB", {"rendered": []}, "too few rendered pairs to predict PSNR"),
        ("2x", {"rendered": []}, "too few rendered pairs to predict time"),
        ("80 dB", {"floor": 60.0}, "means nothing: .* by 60.0 dB already"),
        ("9x", {}, "with nothing kept at all a run is predicted to be 4.00×"),
    ],
)
def test_what_cannot_be_had_is_refused_with_what_can(
    text: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadParameter, match=message):
        choose_for(settings(**changes), Target.parse(text))


def test_lines_are_least_squares_and_know_their_spread() -> None:
    line = fitted([0.0, 1.0, 2.0], [1.0, 3.0, 5.0])
    assert line is not None and (line.at_zero, line.slope) == pytest.approx((1.0, 2.0))
    assert line.at(3.0) == pytest.approx(7.0) and line.where(7.0) == pytest.approx(3.0)
    x, y = [0.0, 1.0, 2.0, 3.0, 5.0], [0.1, 1.3, 1.8, 3.3, 4.6]
    found = fitted(x, y)
    left_out = []
    for i in range(len(x)):
        rest = fitted(
            [a for j, a in enumerate(x) if j != i], [b for j, b in enumerate(y) if j != i]
        )
        assert rest is not None
        left_out.append((y[i] - rest.at(x[i])) ** 2)
    assert found is not None
    assert found.spread == pytest.approx(math.sqrt(sum(left_out) / len(x)))


def test_pairs_that_say_nothing_or_the_wrong_thing_give_no_line() -> None:
    assert fitted([1.0, 2.0], [1.0, 2.0]) is None
    assert fitted([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    wrong = settings(
        rendered=[pair(k, 0.1) | {"psnr": 30.0, "seconds": 10 * (2 - k)} for k in SIZES]
    )
    assert quality_line(wrong.rendered) is None and time_line(wrong.rendered) is None
