"""What all adapters share: schedule, patterns and state give what `diffpatch.attention` gives."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import diffpatch
from diffpatch import BadParameter, Neighborhood, PackedGrid, TokenGrid
from diffpatch.adapters.engine import CallPlace, EngineAttention, Told

GRID = TokenGrid(3, 2, 4, text_after=3)
LOCAL = Neighborhood(window=(1, 1, 3), stride=1)
Q, K, V = torch.randn(3, 2, GRID.num_tokens, 2, 16, generator=torch.Generator().manual_seed(0))
EVERYTHING = Told(layers=True, steps=True, totals=True, runs=True)


def dense(q: Any, k: Any, v: Any) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2)


def calls(attend: Callable[[Any, Any, CallPlace], torch.Tensor], run: int) -> list[torch.Tensor]:
    """A stand-in for an engine: three steps, two branches, two layers, each with its tensors."""
    return [
        attend(Q + 0.01 * step + branch + layer, V * (branch + 1) + run, place)
        for step in range(3)
        for branch in range(2)
        for layer in range(2)
        for place in [CallPlace(layer, step, 3, branch, run)]
    ]


@pytest.mark.parametrize("method", ["window", "neighborhood+temporal"])
def test_calls_are_the_functional_api_with_state(method: str) -> None:
    engine = EngineAttention(method, EVERYTHING, dense_steps=1, dense_layers=1)
    states: dict[Any, dict[str, Any]] = {}

    def expected(q: Any, v: Any, place: CallPlace) -> torch.Tensor:
        layer, step = place.layer or 0, place.step or 0
        if step < 1 or layer < 1:
            return dense(q, K, v)
        state = states.setdefault((place.run, place.layer, place.branch), {})
        return diffpatch.attention(
            q, K, v, GRID, method, scale=0.3, layer=layer, step=step, state=state
        )

    def found(q: Any, v: Any, place: CallPlace) -> torch.Tensor:
        return engine.attend(q, K, v, GRID, place, lambda: dense(q, K, v), 0.3)

    for run in range(6):  # more than an adapter remembers
        pairs = zip(calls(found, run), calls(expected, run), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert len(engine._states) == (4 if engine.method.needs_steps else 0)
    engine.forget(5)
    assert 5 not in engine._states
    assert engine.reasons["dense first steps"] == 6 * 4


Call = tuple[Any, Any, TokenGrid, CallPlace]


def one_run(run: int) -> list[Call]:
    """The calls of one run: odd ones are of another size and have one more step."""
    grid = TokenGrid(3, 4, 2, text_after=3) if run % 2 else GRID
    return [
        (Q + 0.01 * step + layer + run, V + run, grid, CallPlace(layer, step, 3 + run % 2, 0, run))
        for step in range(3 + run % 2)
        for layer in range(2)
    ]


@pytest.mark.parametrize("method", ["window", "neighborhood", "neighborhood+temporal"])
@pytest.mark.parametrize("how", ["threads", "turns"])
def test_runs_at_once_over_one_engine_are_what_they_are_alone(method: str, how: str) -> None:
    """What vLLM-Omni, SGLang, xDiT and the node for ComfyUI make of the calls of their engines."""

    def make() -> EngineAttention:
        return EngineAttention(method, EVERYTHING, dense_steps=1)

    def answer(engine: EngineAttention, call: Call) -> torch.Tensor:
        q, v, grid, place = call
        return engine.attend(q, K, v, grid, place, lambda: dense(q, K, v), 0.3)

    runs = [one_run(run) for run in range(4)]
    alone = [[answer(engine, call) for call in calls] for calls in runs for engine in [make()]]
    engine = make()
    found: list[list[torch.Tensor]] = [[] for _ in runs]
    if how == "turns":
        for turn in range(max(map(len, runs))):
            for one, calls in zip(found, runs, strict=True):
                one += [answer(engine, call) for call in calls[turn : turn + 1]]
    else:
        gate = threading.Barrier(len(runs))

        def go(i: int) -> None:
            gate.wait()
            found[i] = [answer(engine, call) for call in runs[i]]

        threads = [threading.Thread(target=go, args=(i,)) for i in range(len(runs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for one, expected in zip(found, alone, strict=True):
        assert len(one) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(one, expected, strict=True))


def test_more_runs_at_once_than_are_remembered_are_said(caplog: pytest.LogCaptureFixture) -> None:
    engine = EngineAttention("neighborhood+temporal", EVERYTHING)

    def step(run: int, number: int) -> None:
        q, v, grid, place = one_run(run)[2 * number]
        engine.attend(q, K, v, grid, place, lambda: dense(q, K, v), 0.3)

    for run in range(5):
        step(run, 0)
    for run in (4, 3):
        step(run, 1)
    assert not caplog.text
    step(0, 1)
    assert "more than 4 runs go on at once" in caplog.text


@pytest.mark.parametrize(
    ("grid", "keys", "words"),
    [
        ("the engine does not tell", 27, "the engine does not tell"),
        (GRID, 5, "27 queries and 5 keys"),
        (TokenGrid(2, 2, 4), 27, "are not the 2×2×4 tokens"),
        (TokenGrid(1, 3, 9), 27, "keeps everything"),
    ],
)
def test_what_does_not_fit_is_dense_and_says_so(grid: Any, keys: int, words: str) -> None:
    method = Neighborhood(window=(1, 3, 9), stride=1) if words == "keeps everything" else LOCAL
    engine = EngineAttention(method, Told())
    out = engine.attend(Q, K[:, :keys], V[:, :keys], grid, CallPlace(), lambda: Q)
    assert out is Q
    assert [words in reason for reason in engine.reasons] == [True]


def test_radial_saves_nothing_in_one_frame() -> None:
    engine = EngineAttention("radial", Told())
    assert engine.attend(Q, K, V, TokenGrid(1, 3, 9), CallPlace(), lambda: Q) is Q
    assert "between frames" in next(iter(engine.reasons))


def test_a_call_that_tells_too_little_is_dense() -> None:
    told = Told(layers=True, steps=True, totals=True)
    cases: list[tuple[dict[str, Any], CallPlace]] = [
        ({"dense_layers": 1}, CallPlace(step=3)),
        ({"dense_steps": 1}, CallPlace(layer=3)),
        ({"dense_steps": 0.2}, CallPlace(layer=3, step=3)),
        ({"dense_last_steps": 1}, CallPlace(layer=3, step=3)),
    ]
    for schedule, place in cases:
        engine = EngineAttention(LOCAL, told, **schedule)
        assert engine.attend(Q, K, V, GRID, place, lambda: Q) is Q
        assert "not told here" in next(iter(engine.reasons))


def test_heads_that_differ_are_not_shared_by_devices() -> None:
    method = Neighborhood(window=(1, 1, 3), stride=1, heads=((1, 1, 3), (1, 2, 2)))
    engine = EngineAttention(method, Told())
    assert engine.attend(Q, K, V, GRID, CallPlace(some_heads=True), lambda: Q) is Q
    assert "which several devices share" in next(iter(engine.reasons))
    assert engine.attend(Q, K, V, GRID, CallPlace(), lambda: Q) is not Q


def test_packed_sequences() -> None:
    grid = PackedGrid((4, (2, 2, 3), 2, (1, 3, 3)))
    engine = EngineAttention(LOCAL, Told())
    out = engine.attend(Q, K, V, grid, CallPlace(), lambda: Q)
    assert torch.equal(out, diffpatch.attention(Q, K, V, grid, LOCAL))


def test_steps_may_be_counted_without_their_number() -> None:
    engine = EngineAttention(LOCAL, Told(steps=True), dense_steps=2)
    out = [engine.attend(Q, K, V, GRID, CallPlace(step=s), lambda: Q) is Q for s in range(4)]
    assert out == [True, True, False, False]


@pytest.mark.parametrize(
    ("method", "told", "schedule", "words"),
    [
        ("window", Told(), {}, "layers"),
        ("neighborhood+temporal", Told(True, True, True), {}, "runs and their branches"),
        (LOCAL, Told(), {"dense_layers": 1}, "layers are not told"),
        ("dynamic", Told(), {"refresh": 1, "budgets": {0: (0.2, 0.3)}}, "layers are not told"),
        (LOCAL, Told(), {"dense_steps": 2}, "steps are not told"),
        (LOCAL, Told(steps=True), {"dense_steps": 0.2}, "how many steps there are"),
        (LOCAL, Told(steps=True), {"dense_last_steps": 1}, "how many steps there are"),
    ],
)
def test_what_needs_more_than_is_told_is_refused(
    method: Any, told: Told, schedule: dict[str, Any], words: str
) -> None:
    with pytest.raises(BadParameter, match=words):
        EngineAttention(method, told, **schedule)
