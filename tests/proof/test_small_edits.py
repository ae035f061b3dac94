"""Small functions at their borders, where a wrong sign, an off-by-one or a swap would hide."""

from __future__ import annotations

import dataclasses
import itertools
import math
from statistics import median
from typing import Any

import pytest
import torch

from diffpatch import (
    BadParameter,
    Dense,
    Disc,
    Dynamic,
    Linear,
    Method,
    Neighborhood,
    Radial,
    SlidingTile,
    Temporal,
    TokenGrid,
    Window,
)
from diffpatch.eval.medians import paired_interval, quartiles
from diffpatch.eval.quality.tally import Tally
from diffpatch.methods.base import Attended, AttentionCall
from diffpatch.methods.linear.distilled import mixed
from diffpatch.methods.selection import shares
from diffpatch.methods.temporal.method import third_of
from diffpatch.patching.options.schedule import Schedule
from diffpatch.patterns.grid import PackedGrid
from diffpatch.planning.run import PlannedRun
from diffpatch.targets.choice import Chosen
from diffpatch.targets.settings import Settings, fingerprint
from diffpatch.tuning.probe import Candidate, Probe, sampled_steps
from tests.brute import gna
from tests.targets.test_settings import made as made_settings

GRID = TokenGrid(2, 8, 12, text_before=3, text_after=2)


def test_every_token_is_text_or_of_one_frame() -> None:
    index = torch.arange(12)
    grid = TokenGrid(2, 2, 2, text_before=3, text_after=1)
    assert grid.is_text(index).tolist() == [True] * 3 + [False] * 8 + [True]
    packed = PackedGrid((3, (2, 2, 2), 1))
    assert torch.equal(packed.is_text(index), grid.is_text(index))
    for frames, last in ((0, 3), (1, 7), (2, 11), (5, 11)):
        expected = (index >= 3) & (index < last)
        assert torch.equal(grid.in_first_frames(index, frames), expected)
        assert torch.equal(packed.in_first_frames(index, frames), expected)
    two = PackedGrid(((1, 2, 2), 2, (2, 1, 3)))
    assert two.starts == (0, 4, 6) and two.sizes == (4, 2, 6) and two.num_frames == 2
    assert (
        two.in_first_frames(index, 1).tolist()
        == [True] * 4 + [False] * 2 + [True] * 3 + [False] * 3
    )


def test_levels_with_a_rest_compute_what_is_kept() -> None:
    quotas = ((1, 0.1), (2, 0.1), (8, 0.2))
    found = shares(0.3, quotas, 16)
    sizes, new = (1, 2, 8), [b - a for a, b in zip([0.0, *found], found, strict=False)]
    cost = sum(part / size for part, size in zip(new, sizes, strict=True)) + (1 - found[-1]) / 16
    assert cost == pytest.approx(0.3, abs=1e-6) and found[-1] < 1
    assert new[0] == pytest.approx(new[1]) and new[2] == pytest.approx(2 * new[1])
    assert shares(1.0, ((1, 1.0),), 1) == [1.0] and shares(0.01, ((1, 1.0),), 32) == [0.0]


def test_thirds_of_a_run_and_sampled_steps() -> None:
    assert [third_of(step, 9) for step in range(9)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [third_of(step, 4) for step in range(4)] == [0, 0, 1, 2]
    assert [third_of(0, 1), third_of(1, 2)] == [0, 1]
    assert sampled_steps(10, 0.25) == {3, 6, 8} and sampled_steps(2, 1.0) == {1}


@pytest.mark.parametrize(
    "method",
    [
        Radial(decay=0.5), Neighborhood(window=0.5), Window(window=(1, 4, 4)), Disc(3),
        SlidingTile(window=0.5, tile=(1, 4, 4)), Linear(kept=0.2, pool=8),
        Linear(kept=0.2, pool=8, second_order=False), Linear(far="state", near=20),
        Dynamic(kept=0.4, tile=16, strip=8, pool=8), Dynamic(kept=0.4, tile=16, rest="drop"),
        Dynamic(kept=0.3, tile=16, strip=8, rule="psa", rest="pyramid"),
        Temporal(over=Window(window=(1, 4, 4)), refresh=2),
        Temporal(over=Dense(tile=16), mode="skip", threshold=-2.0),
        Temporal(over=Dense(tile=16), mode="mask", kept=0.5),
    ],
    ids=str,
)  # fmt: skip
def test_a_scale_is_what_queries_are_multiplied_by(method: Method) -> None:
    """In every step: one that computes, and one that remembers."""
    random = torch.Generator().manual_seed(0)
    steps = torch.randn(2, 3, 1, GRID.num_tokens, 2, 16, generator=random, dtype=torch.float64)
    states: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    pattern = method.pattern(GRID, method.variant(0, 0))
    for step, (q, k, v) in enumerate(steps):
        call = AttentionCall(pattern, step=step, total=6, backend="torch")
        scaled = method.attend(q, k, v, dataclasses.replace(call, scale=1.0, state=states[0])).out
        plain = method.attend(4 * q, k, v, dataclasses.replace(call, state=states[1])).out
        torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-6)
        other = method.attend(q, k, v, dataclasses.replace(call, state={})).out
        assert (scaled - other).norm() > 1e-3 * other.norm()


def test_sharpening_multiplies_the_scale_that_the_model_gives() -> None:
    random = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, GRID.num_tokens, 2, 16, generator=random).unbind()
    for wrap in (lambda m: m, lambda m: Temporal(over=m, refresh=2)):
        for scale in (None, 0.5):
            found = []
            for sharpen in (1.0, 1.5):
                method = wrap(Disc(3, sharpen=sharpen))
                factor = (0.25 if scale is None else scale) * (1.5 if sharpen == 1.0 else 1.0)
                given = factor if sharpen == 1.0 else scale
                call = AttentionCall(method.pattern(GRID), scale=given, backend="torch")
                found.append(method.attend(q, k, v, call).out)
            torch.testing.assert_close(found[0], found[1])


def test_near_and_far_are_mixed_by_the_formula() -> None:
    random = torch.Generator().manual_seed(0)
    near, moments, features = torch.randn(3, 2, 5, 3, 4, generator=random, dtype=torch.float64)
    near_lse, mass = 3 * torch.randn(2, 2, 5, 3, generator=random, dtype=torch.float64)
    near_lse[0, 0], mass[1, 1] = -math.inf, -math.inf
    gate = torch.randn(3, 3, generator=random, dtype=torch.float64)
    out = mixed(near, near_lse, moments, mass, features, {"gate": gate})
    for h, (a, b, c) in enumerate(gate.tolist()):
        blend = 1 / (1 + math.exp(-c))
        far = moments[:, :, h] * (1 - blend) + features[:, :, h] * blend
        alpha = (math.exp(a) * (near_lse - mass)[:, :, h] + b).sigmoid()[..., None]
        expected = alpha * near[:, :, h] + (1 - alpha) * far
        expected[0, 0], expected[1, 1] = far[0, 0], near[1, 1, h]
        torch.testing.assert_close(out[:, :, h], expected)


def test_a_stricter_threshold_checks_again_and_an_equal_one_does_not() -> None:
    random = torch.Generator().manual_seed(0)
    q, k, v = 2 * torch.randn(3, 1, GRID.num_tokens, 2, 16, generator=random)
    state: dict[str, Any] = {}

    def since(step: int, threshold: float) -> int:
        method = Temporal(over=Dense(tile=16), mode="skip", threshold=threshold, refresh=5)
        method.attend(q, k, v, AttentionCall(pattern, step=step, total=20, state=state))
        return int(state["step"])

    pattern = Dense(tile=16).pattern(GRID)
    assert [since(3, -2.0), since(4, -2.0), since(5, -1.0), since(7, -1.0)] == [3, 3, 3, 3]
    assert [since(8, -1.0), since(9, -1.5), since(10, -1.0)] == [8, 9, 9]


def test_a_tail_is_as_old_as_its_refresh() -> None:
    random = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, GRID.num_tokens, 2, 16, generator=random)
    method, state = Temporal(over=Window(window=(1, 4, 4)), refresh=3), dict[str, Any]()
    pattern = method.pattern(GRID, method.variant(0, 0))
    kept = [
        method.attend(q, k, v, AttentionCall(pattern, step=step, state=state)).kept
        for step in (5, 6, 7, 8, 10, 11)
    ]
    assert [x == 1.0 for x in kept] == [True, False, False, True, False, True]
    assert [method.kept_at(pattern, age) == 1.0 for age in range(4)] == [True, False, False, True]


def test_a_mask_keeps_a_fraction_of_each_row_rounded_up() -> None:
    random = torch.Generator().manual_seed(0)
    grid = TokenGrid(1, 8, 14)  # seven tiles of 16
    q, k, v = torch.randn(3, 1, grid.num_tokens, 1, 8, generator=random)
    for kept, tiles in ((0.3, 3), (3 / 7, 3), (0.43, 4), (0.01, 1)):
        method = Temporal(over=Dense(tile=16), mode="mask", kept=kept)
        pattern = method.pattern(grid)
        assert pattern.blocks.num_tiles == 7
        done = method.attend(q, k, v, AttentionCall(pattern))
        assert float(done.kept) == pytest.approx(tiles / 7, abs=1e-6), kept


class Off(Method):
    """Off by a share that the step tells, and keeps as much."""

    name = "off"
    only_skips = False

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall
    ) -> Attended:
        exact = Dense().attend(q, k, v, call).out
        share = {1: 0.1, 3: 0.2, 5: 0.6}[call.step]
        return Attended(exact * (1 + share * torch.tensor([1.0, 2.0])[:, None]), share, "torch")


def test_curves_are_means_over_calls_of_each_head() -> None:
    random = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, GRID.num_tokens, 2, 16, generator=random)
    probe = Probe.of((Candidate("drop", Off()),), 0.0)
    pattern = Dense().pattern(GRID)
    for step in range(6):
        probe.attend(q, k, v, AttentionCall(pattern, step=step, total=6, layer=1))
    found = probe.curves("t")
    for head, factor in enumerate((1, 2)):
        [(kept, error)] = found[f"t.1.{head}"]["drop"]
        assert kept == pytest.approx(0.3) and error == pytest.approx(0.3 * factor, rel=1e-4)


def test_settings_reach_to_half_and_twice_the_tokens_and_no_further() -> None:
    settings = Settings.model_validate(made_settings())  # 5×8×8 tokens and 7 of text
    assert settings.check_grid((5, 8, 8, 7)) is None
    for fits in ((5, 8, 16, 7), (5, 4, 8, 7), (10, 8, 8, 0)):
        assert "carried to" in str(settings.check_grid(fits))
    for beyond in ((5, 8, 17, 7), (2, 8, 9, 7), (1, 16, 20, 7)):
        with pytest.raises(BadParameter, match="tune at this size"):
            settings.check_grid(beyond)


def test_a_fingerprint_knows_weights_by_names_shapes_and_samples() -> None:
    def model(**changes: Any) -> dict[str, torch.nn.Module]:
        torch.manual_seed(0)
        one = torch.nn.Linear(8, changes.get("out", 4), dtype=torch.float32)
        if "at" in changes:
            with torch.no_grad():
                one.weight.view(-1)[changes["at"]] += 1
        return {changes.get("name", "transformer"): one.to(changes.get("dtype", torch.float32))}

    own = fingerprint(model())
    assert own == fingerprint(model()) == fingerprint(model(dtype=torch.bfloat16))
    others = [fingerprint(model(**c)) for c in ({"at": 0}, {"at": 8}, {"at": 24}, {"out": 5},
                                                {"name": "transformer_2"})]  # fmt: skip
    assert len({own, *others}) == 6


def test_means_quartiles_and_intervals_of_unequal_numbers() -> None:
    scores = {"a": {"psnr": 10.0, "caption": 1.0}, "b": {"psnr": 30.0}, "c": {"psnr": 50.0}}
    lacking = {"b": {"caption": "no prompt"}, "c": {"caption": "no prompt"}}
    tally = Tally(scores, missing=lacking)
    assert tally.means() == {"psnr": 30.0, "caption": 1.0}
    assert tally.reasons() == {"caption": "no prompt (2 of 3 clips)"}
    values = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert quartiles(values) == {"median": median(values), "low": 2.0, "high": 8.0}
    assert quartiles([3.0]) == {"median": 3.0, "low": 3.0, "high": 3.0}
    found = paired_interval([0.0, 0.0, 0.0, 4.0])
    assert found["mean"] == 1.0 and found["low"] == 0.0 and found["high"] in (2.0, 3.0)
    assert paired_interval([-2.0, -1.0])["high"] < 0


@pytest.mark.parametrize("size", [-1, 0.6, 0.9, 1.0])
def test_a_dilated_window_is_at_most_what_the_dilation_leaves(size: float) -> None:
    """All keys of the same remainder: a whole axis, or a fraction above what there is."""
    for length in (10, 11):
        grid = TokenGrid(1, length, 1)
        pattern = Neighborhood(window=size, dilation=(1, 3, 1), stride=1).pattern(grid)
        most = length // 3
        expected = [[gna(q, k, length, most, 1, 3, False) for k in range(length)]
                    for q in range(length)]  # fmt: skip
        assert torch.equal(pattern.dense()[0], torch.tensor(expected))


def test_a_planned_run_counts_the_tiles_that_need_a_mask() -> None:
    method = Neighborhood(window=(1, 5, 7), stride=1)
    grid = TokenGrid(2, 20, 24, text_before=9)
    run = PlannedRun(method, grid, Schedule(dense_steps=1).bind(4, 2), 4, 2, "torch")
    pattern = method.pattern(grid)
    whole, visited = 0, 0
    starts, order, seen = pattern.blocks.starts.tolist(), pattern.blocks.order, pattern.dense()[0]
    tiles = [order[a:b] for a, b in itertools.pairwise(starts)]
    for rows, keys in itertools.product(tiles, repeat=2):
        part = seen[rows][:, keys]
        visited, whole = visited + bool(part.any()), whole + bool(part.all())
    assert 0 < whole < visited
    assert run.partial_share() == pytest.approx(1 - whole / visited, abs=1e-6)
    assert run.kept_table()[0].tolist() == [1.0, 1.0]
    assert run.kept_table()[1:].unique().tolist() == [pattern.kept] == [run.kept_sparse()]


def test_a_promise_names_what_was_chosen_and_nothing_else() -> None:
    def promise(**changes: Any) -> str:
        nothing: dict[str, Any] = {"psnr": None, "spread": None, "speedup": None}
        return Chosen("drop", {}, 0.1, 0.25, 0.1, next_kept=0.0, **nothing | changes).promise

    assert promise() == "attention dense"
    assert promise(cache=0.05) == "cache 0.05, attention dense"
    assert promise(psnr=30.0) == "attention dense"
    found = promise(psnr=30.0, spread=1.5, speedup=1.4)
    assert found == "attention dense, 30.0 ± 1.5 dB, 1.40× predicted"
