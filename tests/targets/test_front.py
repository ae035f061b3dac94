"""The front of quality against time, and what is chosen from it."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import replace
from typing import Any

import pytest

from diffpatch import BadParameter
from diffpatch.targets.choice import chosen_for
from diffpatch.targets.front import (
    BETWEEN,
    FINEST,
    FOUR_OF_FIVE,
    USUAL_SPREAD,
    USUAL_WEIGHT,
    Applied,
    FrontPoint,
    best_within,
    fastest,
    measured_points,
    pareto,
    time_at,
    with_between,
)
from diffpatch.targets.settings import Measured
from tests.targets.test_choice import settings

# (sparse, cache) -> time, PSNR: at 30 dB the pair of both beats each alone.
RUNS = {
    (1.0, 0.1): (0.6, 35.0), (1.0, 0.2): (0.45, 28.0), (0.5, None): (0.8, 36.0),
    (0.25, None): (0.6, 31.0), (0.5, 0.1): (0.48, 33.0), (0.25, 0.1): (0.4, 30.5),
}  # fmt: skip
LEVELS = {"easy": 2.0, "hard": -2.0}


def runs(**levels: float) -> list[Measured]:
    return [
        Measured(
            prompt=prompt, sparse=sparse, dense_steps=0.2 if sparse < 1 else 0.0, cache=cache,
            kept=sparse, calls=1.0 if cache is None else 0.5, psnr=psnr + level,
            seconds=20 * time, dense_seconds=20.0,
        )
        for prompt, level in (levels or LEVELS).items()
        for (sparse, cache), (time, psnr) in RUNS.items()
    ]  # fmt: skip


def test_points_are_means_and_their_spread_is_that_of_another_prompt() -> None:
    points = {point.applied.label: point for point in measured_points(runs())}
    assert set(points) == {
        "cache 0.1", "cache 0.2", "attention 50% after 20%", "attention 25% after 20%",
        "attention 50% after 20% + cache 0.1", "attention 25% after 20% + cache 0.1",
    }  # fmt: skip
    both = points["attention 25% after 20% + cache 0.1"]
    assert both.psnr == pytest.approx(30.5) and both.time == pytest.approx(0.4)
    seen = statistics.variance(LEVELS.values())
    usual = (USUAL_WEIGHT * USUAL_SPREAD**2 + seen) / (USUAL_WEIGHT + 1)
    spread = (usual * (1 + 1 / 2)) ** 0.5
    assert both.spread == pytest.approx(spread)
    assert both.low == pytest.approx(30.5 - FOUR_OF_FIVE * spread)


def test_one_prompt_tells_no_spread_so_the_usual_one_is_taken() -> None:
    for point in measured_points(runs(only=0.0)):
        assert point.spread == pytest.approx(USUAL_SPREAD * 2**0.5)
    many = measured_points(runs(**{str(n): 4.0 * (n % 2) for n in range(40)}))
    assert many[0].spread == pytest.approx(2.0, abs=0.2), "many prompts speak for themselves"


def test_a_cache_or_held_steps_leave_steps_out() -> None:
    skips = {(cache, hold): Applied(0.5, 0.2, cache, hold).skips
             for cache in (None, 0.1) for hold in (None, 0.01)}  # fmt: skip
    assert [pair for pair, skipping in skips.items() if not skipping] == [(None, None)]


def test_a_half_done_point_is_left_out() -> None:
    assert len(measured_points(runs()[:-1])) == len(RUNS) - 1


def test_what_keeps_more_steps_dense_is_another_point() -> None:
    more = [run.model_copy(update={"dense_steps": 0.5, "psnr": run.psnr + 2}) for run in runs()
            if run.sparse < 1]  # fmt: skip
    points = measured_points([*runs(), *more])
    assert len(points) == len(RUNS) + 4
    found = with_between(points)
    between = [p for p in found if 0.2 < p.applied.dense_steps < 0.5]
    assert between and all(not p.measured and p.applied.sparse in (0.25, 0.5) for p in between)
    ends = {p.applied.dense_steps: p for p in points if p.applied.sparse == 0.25}
    for p in between:
        if p.applied.sparse == 0.25 and p.applied.cache is None:
            assert ends[0.2].psnr <= p.psnr <= ends[0.5].psnr


def test_what_nobody_sees_does_not_count() -> None:
    fine = [run.model_copy(update={"psnr": 100.0 if run.prompt == "easy" else 52.0})
            if run.cache == 0.1 and run.sparse == 1 else run for run in runs()]  # fmt: skip
    points = {point.applied.label: point for point in measured_points(fine)}
    assert points["cache 0.1"].psnr == FINEST
    assert points["cache 0.2"].spread < measured_points(runs())[0].spread


def point(time: float, psnr: float, **applied: Any) -> FrontPoint:
    nothing = {"sparse": 1.0, "dense_steps": 0.0}
    return FrontPoint(Applied(**(nothing | applied)), psnr, 1.5, time, time + 3)


@pytest.mark.parametrize(
    ("name", "low", "high", "beside"),
    [
        ("sparse", 0.1, 0.4, {"dense_steps": 0.2, "cache": 0.1}),
        ("dense_steps", 0.1, 0.5, {"sparse": 0.25, "hold": 0.01}),
        ("cache", 0.05, 0.2, {}),
        ("hold", 0.0025, 0.01, {"sparse": 0.25}),
    ],
)
def test_what_lies_between_two_points_is_in_proportion(
    name: str, low: float, high: float, beside: dict[str, float]
) -> None:
    ends = [point(0.3, 26.0, **beside, **{name: low}), point(0.8, 38.0, **beside, **{name: high})]
    between = [one for one in with_between(ends) if not one.measured]
    assert len(between) == BETWEEN - 1
    for number, one in enumerate(sorted(between, key=lambda one: getattr(one.applied, name)), 1):
        part = number / BETWEEN
        value = low * (high / low) ** part if name != "dense_steps" else low + part * (high - low)
        assert getattr(one.applied, name) == pytest.approx(value, rel=5e-3)
        assert replace(one.applied, **{name: low}) == ends[0].applied
        # Time goes with what is kept, all else with the number of the point.
        linear = (value - low) / (high - low) if name == "sparse" else part
        assert one.psnr == pytest.approx(26 + 12 * part) and one.spread == 1.5
        assert one.time == pytest.approx(0.3 + 0.5 * linear)
        assert one.calls == pytest.approx(one.time + 3)


def test_between_two_kept_fractions_there_are_more_and_none_up_to_dense() -> None:
    points = measured_points(runs(only=0.0))
    measured = {point.applied.cache for point in points}
    between = [point for point in with_between(points) if not point.measured]
    found = [point for point in between if point.applied.cache in measured]
    assert {point.applied.cache for point in found} == {None, 0.1}
    for point in found:
        ends = {p.applied.sparse: p for p in points if p.applied.cache == point.applied.cache}
        low, high = ends[0.25], ends[0.5]
        assert low.applied.sparse < point.applied.sparse < high.applied.sparse
        assert low.psnr < point.psnr < high.psnr and low.time < point.time < high.time
        assert point.applied.dense_steps == low.applied.dense_steps


def test_between_two_thresholds_there_are_more() -> None:
    points = [p for p in measured_points(runs(only=0.0)) if p.applied.sparse == 1]
    found = [point for point in with_between(points) if not point.measured]
    assert found and all(0.1 < (point.applied.cache or 0) < 0.2 for point in found)
    for low, high in itertools.pairwise(found):
        assert low.time < high.time and low.psnr < high.psnr
        assert (low.applied.cache or 0) > (high.applied.cache or 0)
        assert low.applied.sparse == 1 and 28 < low.psnr < 35 and 0.45 < low.time < 0.6


def test_more_to_choose_from_is_never_slower() -> None:
    """A cache alone is on offer beside everything else at each quality."""
    worse = [run.model_copy(update={"psnr": run.psnr - 4}) if run.sparse < 1 else run
             for run in runs()]  # fmt: skip
    everything = measured_points(worse)
    alone = with_between(point for point in everything if point.applied.sparse == 1)
    for level in range(20, 36):
        own, best = time_at(alone, level), time_at(with_between(everything), level)
        assert own is None or (best is not None and best <= own)


def test_a_front_drops_what_a_faster_one_is_as_good_as() -> None:
    points = measured_points(runs(only=0.0))
    front = pareto(points)
    for point in points:
        better = [p for p in points if p is not point and p.time <= point.time
                  and p.psnr >= point.psnr]  # fmt: skip
        assert (point in front) == (not better)


def test_time_at_equal_quality_is_read_off_the_front() -> None:
    alone = [p for p in measured_points(runs(only=0.0)) if p.applied.sparse == 1]
    assert time_at(with_between(alone), 28 + 7 / 2) == pytest.approx((0.45 + 0.6) / 2)
    assert time_at(alone, 28 + 7 / 2) == pytest.approx(0.6)
    assert time_at(alone, 20.0) == pytest.approx(0.45)
    assert time_at(alone, 35.1) is None and time_at([], 30.0) is None


def test_a_quality_is_met_by_the_fastest_that_four_of_five_reach() -> None:
    easy = fastest(runs(only=0.0), 26.9, "26.9 dB")
    assert easy.applied == Applied(0.25, 0.2, 0.1) and easy.low == pytest.approx(26.9, abs=0.1)
    sure = fastest(runs(), 30.0, "30 dB")
    assert sure.low >= 30 and sure.time > 0.4
    with pytest.raises(
        BadParameter, match=r"has 32\.4 dB in four of five .*attention 50% after 20%, 1\.25×"
    ):
        fastest(runs(only=0.0), 40.0, "40 dB")
    slow = [run.model_copy(update={"seconds": 21.0}) for run in runs()]
    with pytest.raises(BadParameter, match="nothing that was measured is faster than dense"):
        fastest(slow, 20.0, "20 dB")


def test_a_speed_is_met_by_the_best_that_is_as_fast() -> None:
    assert best_within(runs(), 0.5, "2x").applied == Applied(0.5, 0.2, 0.1)
    with pytest.raises(BadParameter, match=r"the fastest .* is 2\.50× at 30\.5 dB"):
        best_within(runs(), 0.1, "10x")


def test_a_way_comes_to_budgets_and_a_cache() -> None:
    chosen = chosen_for(settings(), Applied(0.4, 0.1, 0.2))
    mean = statistics.fmean(k for layer in chosen.budgets["transformer"].values() for k in layer)
    assert mean <= 0.4 + 1e-9 and chosen.kept == pytest.approx(0.1 + 0.9 * mean)
    assert chosen.cache == 0.2 and chosen.dense_steps == 0.1
    dense = chosen_for(settings(), Applied(1.0, 0.0, 0.2))
    assert not dense.budgets and dense.method("transformer").name == "dense"
    assert "attention dense" in str(dense) and "cache" in str(dense)


def test_between_two_tolerances_and_nowhere_else_held_steps_are_predicted() -> None:
    def run(hold: float | None, sparse: float, time: float, psnr: float) -> Measured:
        return Measured(
            prompt="a", sparse=sparse, dense_steps=0.0, cache=None, hold=hold, kept=sparse,
            calls=time, psnr=psnr, seconds=time, dense_seconds=1.0,
        )  # fmt: skip

    front = [run(0.01, 1.0, 0.5, 40.0), run(0.04, 1.0, 0.25, 30.0), run(0.01, 0.5, 0.4, 35.0)]
    found = with_between(measured_points(front))
    between = [point for point in found if not point.measured]
    assert {point.applied.sparse for point in between} == {1.0}
    middle = next(point for point in between if point.applied.hold == pytest.approx(0.02))
    assert middle.psnr == pytest.approx(35.0) and middle.time == pytest.approx(0.375)
    assert middle.applied.cache is None and middle.applied.label == "hold 0.02"


def test_labels_say_what_is_applied() -> None:
    assert Applied(1.0, 0.0, None).label == "dense"
    point: dict[str, Any] = {"psnr": 30.0, "spread": 0.0, "time": 0.5}
    assert FrontPoint(Applied(0.125, 0.1, 0.08), **point).applied.label == (
        "attention 12.5% after 10% + cache 0.08"
    )
