"""Sizes against grids: fractions always fit, and counts that do not fit name the axis."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import diffpatch
from diffpatch import BadParameter, Neighborhood, TokenGrid
from tests.tiny import Tiny, flux, wan

CHOICE = random.Random(0)
GRIDS = [tuple(CHOICE.randint(1, 9) for _ in range(3)) for _ in range(25)]
GRIDS += [(1, 8, 8), (1, 1, 9), (5, 1, 1)]
FRACTIONS = (0.01, 0.2, 1 / 3, 0.5, 0.77, 0.9, 0.95, 0.999, 1.0, -1)


def seen_along(pattern: Any, axis: int) -> list[int]:
    """The most keys that a query sees along one axis, for each of its positions."""
    shape = pattern.grid.shape
    dense = pattern.dense()[0].view(*shape, *shape)
    order = [axis, *(i for i in range(3) if i != axis)]
    pairs = dense.permute(*order, *(i + 3 for i in order))
    return pairs.any(5).any(4).any(2).any(1).sum(1).tolist()


@pytest.mark.parametrize("stride", ["auto", 1])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_every_fraction_fits_every_grid_that_has_room_for_the_dilation(
    dilation: int, stride: Any
) -> None:
    for shape in GRIDS:
        grid = TokenGrid(*shape)
        for size in FRACTIONS:
            method = Neighborhood(window=size, dilation=dilation, stride=stride)
            if any(1 < length < dilation for length in shape):
                with pytest.raises(BadParameter, match=r"dilation=\d along (time|height|width)"):
                    method.pattern(grid)
                continue
            pattern = method.pattern(grid)
            for axis, length in enumerate(shape):
                step = dilation if length > 1 else 1
                fits, seen = length // step, seen_along(pattern, axis)
                wanted = fits if size == -1 else min(max(1, round(size * length)), fits)
                assert min(seen) >= 1
                assert max(seen) <= fits
                if stride == 1 or size == -1:
                    assert set(seen) == {wanted}, (shape, size, axis)


@pytest.mark.parametrize("name", ["neighborhood", "window", "sliding_tile"])
def test_every_fraction_fits_every_grid_for_all_windows(name: str) -> None:
    for shape in GRIDS:
        for size in FRACTIONS:
            pattern = diffpatch.make_method(name, window=size).pattern(
                TokenGrid(*shape), *([0] if name == "window" else [])
            )
            assert bool(pattern.dense()[0].diagonal().all())
            assert size not in (1.0, -1) or pattern.kept == 1


def test_windows_rounded_to_tiles_stay_on_the_grid() -> None:
    grid = TokenGrid(21, 30, 52)  # Wan at 480p
    for size in (0.9, 0.93, 0.95, 0.97, 1.0):
        assert 0.7 < Neighborhood(window=size).pattern(grid).kept <= 1
    assert Neighborhood(window=1.0).pattern(grid).kept == 1
    Neighborhood(window=0.5, dilation=2).pattern(grid)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"window": (3, 3, 9)}, "window along width=9 .*axis length 8"),
        ({"window": (3, 9, 3)}, "window along height=9 .*axis length 6"),
        ({"window": 5, "dilation": (1, 1, 2)}, "window=5 × dilation=2 along width .*at most 4"),
        ({"window": 3, "dilation": (1, 7, 1)}, "dilation=7 along height exceeds the axis length 6"),
        ({"window": (3, 3, 5), "stride": (1, 1, 6)}, "stride=6 along width .*window, 5"),
    ],
)
def test_what_does_not_fit_names_the_parameter_and_the_axis(
    params: dict[str, Any], words: str
) -> None:
    with pytest.raises(BadParameter, match=words):
        Neighborhood(**params).pattern(TokenGrid(5, 6, 8))


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("neighborhood", {"window": 5, "stride": 1}),
        ("neighborhood", {"window": (5, 5, 5), "stride": 3}),
        ("neighborhood", {"window": 0.5, "dilation": 2}),
        ("neighborhood", {"window": 3, "dilation": 2, "stride": 2, "causal": True}),
        ("neighborhood", {"window": (5, 5), "stride": (1, 2), "dilation": (1, 2)}),
        ("window", {"window": 5}),
        ("window", {"window": (5, 5)}),
        ("sliding_tile", {"window": 3, "tile": (6, 2, 2)}),
        ("disc", {"time": 3}),
    ],
)
def test_images_are_not_refused_over_time(name: str, params: dict[str, Any]) -> None:
    method = diffpatch.make_method(name, **params)
    grid = TokenGrid(1, 9, 12, text_before=3)
    assert 0 < method.pattern(grid, method.variant(0, 0)).kept < 1


def test_two_sizes_are_height_and_width() -> None:
    grid = TokenGrid(3, 6, 8)
    settings: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"window": (3, 5)}, {"window": (-1, 3, 5)}),
        ({"window": 3, "stride": (2, 3)}, {"window": 3, "stride": (1, 2, 3)}),
        ({"window": 2, "dilation": (2, 3)}, {"window": 2, "dilation": (1, 2, 3)}),
        ({"window": 3, "causal": (True, False)}, {"window": 3, "causal": (False, True, False)}),
    ]
    for params, same in settings:
        pair, three = Neighborhood(**params).pattern(grid), Neighborhood(**same).pattern(grid)
        assert torch.equal(pair.dense(), three.dense())
    with pytest.raises(BadParameter, match=r"two are .height, width"):
        Neighborhood(window=(1, 2, 3, 4))  # type: ignore[arg-type]


def steps_before_the_error(model: Tiny, message: str, **call: Any) -> int:
    done: list[int] = []

    def step_end(pipe: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        done.append(step)
        return kwargs

    with pytest.raises(BadParameter, match=message):
        model.run(callback_on_step_end=step_end, **call)
    return len(done)


@pytest.mark.parametrize(
    ("method", "params", "message"),
    [
        ("neighborhood", {"window": (5, 3, 3)}, "along time=5"),
        ("neighborhood", {"window": (3, 1, 3), "stride": (1, 2, 1)}, "stride=2 along height"),
        ("neighborhood", {"window": (3, 2, 3), "dilation": (1, 3, 1)}, "dilation=3 along height"),
        ("window", {"window": (3, 2, 9)}, "along width=9"),
        ("sliding_tile", {"window": (1, 1, 9), "tile": (6, 8, 2)}, "along width=9"),
        ("neighborhood+temporal", {"window": (3, 2, 9)}, "along width=9"),
        ("window", {"heads": (0.5, 0.4, 0.3)}, "3 groups of heads do not divide"),
        ("neighborhood", {"layers": (0.5, (5, 3, 3))}, "along time=5"),  # of the second layer
    ],
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_what_cannot_work_says_so_before_the_dense_steps(
    method: str, params: dict[str, Any], message: str, compiled: bool
) -> None:
    model = wan()
    diffpatch.patch(model.pipe, method, dense_steps=3, **params)
    if compiled:
        torch._dynamo.reset()
        model.pipe.transformer = torch.compile(model.pipe.transformer, backend="eager")
    assert steps_before_the_error(model, message, num_inference_steps=4) == 0


def test_settings_that_no_step_uses_are_not_looked_at() -> None:
    cases: list[tuple[Tiny, dict[str, Any]]] = [
        (wan(), {"dense_steps": 1.0}),
        (flux(), {"dense_layers": 1.0}),
    ]
    for model, params in cases:
        plain = model.run()
        diffpatch.patch(model.pipe, "neighborhood", window=(1, 99, 99), **params)
        assert torch.equal(model.run(), plain)
