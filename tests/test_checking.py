"""One check of types for every door: Python, the command line and YAML say the same."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

import diffpatch
from diffpatch import BadParameter
from diffpatch.checking import Count, Natural, check, expected, field_types
from diffpatch.cli import main
from diffpatch.eval.sweep.spec import check_spec
from diffpatch.methods.base import Method
from diffpatch.methods.registry import ARGUMENTS
from diffpatch.patterns.grid import as_grid
from tests import tiny

# Untyped, so that what no type checker lets pass can be tried.
api: Any = diffpatch
Disc, Linear, Neighborhood, Radial = api.Disc, api.Linear, api.Neighborhood, api.Radial
SlidingTile, Temporal, TokenGrid, Window = api.SlidingTile, api.Temporal, api.TokenGrid, api.Window

GRID = diffpatch.TokenGrid(2, 4, 4)
NAN = float("nan")


def planned(**changes: Any) -> Any:
    size = {"height": 480, "width": 832, "num_frames": 81} | changes
    return diffpatch.plan("wan-1.3b", "window", **size)


def attended(**changes: Any) -> Any:
    given = dict.fromkeys("qkv", torch.zeros(1, 32, 1, 8)) | changes
    return diffpatch.attention(**given, grid=GRID, method="window")


WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: Radial(sink="no"), "radial: sink='no' must be of type bool (true or false)"),
    (lambda: Radial(decay="0.5"), "radial: decay='0.5' must be of type float (a number)"),
    (lambda: Radial(decay=True), "radial: decay=True must be of type float (a number)"),
    (lambda: Radial(decay=NAN), "radial: decay=nan must be a finite number"),
    (lambda: Radial(kept=float("inf")), "radial: kept=inf must be a finite number"),
    (lambda: Radial(kept="all"), "radial: kept='all' must be a number or none"),
    (lambda: Radial(dekay=1), "radial has no parameter 'dekay': did you mean 'decay'?"),
    (lambda: Neighborhood(causal=(True,)), "neighborhood: causal=(True,) must be true or false"),
    (lambda: Neighborhood(causal=3), "neighborhood: causal=3 must be true or false, for all axes"),
    (lambda: Neighborhood(window=1.5), "neighborhood: window=1.5 must be a count ≥ 1, a fraction"),
    (lambda: Neighborhood(window=(1, 2, 3, 4)), "window=(1, 2, 3, 4) must be one number"),
    (lambda: Neighborhood(window="big"), "window='big' must be one number or three"),
    (lambda: Neighborhood(heads=(0.3, 0)), "heads=(0.3, 0) must be made of windows"),
    (lambda: Neighborhood(heads=0.3), "heads=0.3 must be a list, each one number or three"),
    (lambda: Neighborhood(stride=0), "stride=0 must be 'auto', one positive int or three"),
    (lambda: Neighborhood(stride=1.5), "stride=1.5 must be 'auto', a whole number, two whole"),
    (lambda: Neighborhood(dilation=True), "dilation=True must be a whole number, two whole"),
    (lambda: Window(shift=3), "window: shift=3 must be of type str (text)"),
    (lambda: Window(window=(0, 1, 1)), "window: window=(0, 1, 1) must be a count ≥ 1"),
    (lambda: SlidingTile(tile=(6, 8)), "sliding_tile: tile=(6, 8) must be three whole numbers"),
    (lambda: Disc(time=0), "disc: time=0 must be a count ≥ 1"),
    (lambda: Linear(pool=2.0), "linear: pool=2.0 must be of type int (a whole number)"),
    (lambda: Temporal(budget_gib="x"), "temporal: budget_gib='x' must be of type float (a numbe"),
    (lambda: Temporal(over="radial"), "temporal: over='radial' must be a Method"),
    (lambda: Temporal(threshold=("a", 1, 2)), "must be a number or a list of numbers"),
    (lambda: Temporal(kept=0.5), "temporal: kept=0.5 must be None with mode='tail'"),
    (lambda: TokenGrid(4.5, 8, 8), "TokenGrid: num_frames=4.5 must be of type int"),
    (lambda: TokenGrid(4, 8, True), "TokenGrid: width=True must be of type int"),
    (lambda: TokenGrid(4, 0, 8), "TokenGrid: height=0 must be at least 1"),
    (lambda: planned(branches=0), "plan: branches=0 must be at least 1"),
    (lambda: planned(height="480"), "plan: height='480' must be a whole number"),
    (lambda: planned(text_tokens=-1), "plan: text_tokens=-1 must be at least 0"),
    (lambda: planned(dense_steps="2"), "dense_steps='2' must be a count ≥ 0 or a fraction"),
    (lambda: planned(dense_layers=["a"]), "dense_layers=('a',) must be a count ≥ 0, a fraction"),
    (lambda: planned(quality=3), "plan: quality=3 must be text or none"),
    (lambda: planned(quality="best"), "unknown quality 'best'"),
    (lambda: planned(radius=3), "window has no parameter 'radius'"),
    (lambda: planned(dense_step=3), "did you mean 'dense_steps', an argument of diffpatch.patch?"),
    (lambda: diffpatch.patch(tiny.wan().pipe, dense_steps=True), "dense_steps=True must be a cou"),
    (lambda: diffpatch.patch(tiny.wan().pipe, Radial(), decay=1.0), "give decay=1.0 inside it"),
    (lambda: planned().draw("a.png"), "kind='a.png'"),
    (lambda: Radial().pattern(GRID).draw("a.png"), "draw: size='a.png' must be a whole number"),
    (lambda: Radial().pattern(GRID).draw(pattern=1), "pattern=1 must be below 1"),
    (lambda: Radial().plot(grid=(4, 8)), "grid=(4, 8) must be a TokenGrid"),
    (lambda: attended(step=-1), "attention: step=-1 must be at least 0"),
    (lambda: attended(scale=-1.0), "scale is -1.0, expected a positive number"),
    (lambda: attended(k=torch.zeros(1, 32, 1, 8).bool()), "k is torch.bool on cpu but q is torch"),
    (lambda: as_grid([4, 8]), "grid=[4, 8] must be a TokenGrid, a PackedGrid, or (num_frames, h"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "said"), WRONG, ids=[said[:40] for _, said in WRONG])
def test_what_does_not_fit_is_named_with_what_was_expected(
    wrong: Callable[[], Any], said: str
) -> None:
    with pytest.raises(BadParameter) as caught:
        wrong()
    line = str(caught.value)
    assert said in line, line
    assert "\n" not in line and "[type=" not in line and "pydantic" not in line


@pytest.mark.parametrize("name", sorted(diffpatch.list_methods()))
def test_every_parameter_of_every_method_is_checked(name: str) -> None:
    """Nothing takes an object of no use, and nothing takes what another type would."""
    cls: Any = diffpatch.list_methods()[name].cls
    assert set(field_types(cls)) == {field.name for field in fields(cls)}
    for field in fields(cls):
        for wrong in (object(), {"a": 1}, b"x", 1j):
            with pytest.raises(BadParameter, match=f"{name}: {field.name}="):
                cls(**{field.name: wrong})


# What a function says more about itself, or what may be anything: a pipeline, a transformer, ...
ELSEWHERE = {
    "pipe", "target", "method", "grid", "dense_steps", "dense_layers", "dense_last_steps", "cls",
    "params", "options", "call of enlarge", "strength",
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n in api.__all__ if inspect.isfunction(getattr(api, n))])
def test_every_argument_of_every_function_is_checked(name: str) -> None:
    function = getattr(api, name)
    for parameter in inspect.signature(function).parameters:
        if {parameter, f"{parameter} of {name}"} & ELSEWHERE:
            continue
        for wrong in (object(), 1j, b"x"):
            with pytest.raises(BadParameter, match=f"{name}: {parameter}="):
                function(**{parameter: wrong})


def test_numbers_of_numpy_lists_and_paths_are_what_they_stand_for(tmp_path: Path) -> None:
    assert Radial(decay=1) == Radial(decay=1.0) == Radial(decay=np.float32(1))
    given: Any = [np.int64(1), 0.5, np.float64(0.25)]
    made = Neighborhood(window=given, heads=[[1, 2, 3], 0.5])
    assert made == Neighborhood(window=(1, 0.5, 0.25), heads=((1, 2, 3), 0.5))
    assert hash(made) and {type(size) for size in made.window} == {int, float}
    tile: Any = np.array([6, 8, 8])
    assert SlidingTile(tile=tile) == SlidingTile(tile=[6, 8, 8])
    grid: Any = (np.int32(2), 4, 4)
    assert TokenGrid(*grid) == GRID and type(TokenGrid(*grid).num_frames) is int
    path: Any = tmp_path / "learned.safetensors"
    assert Linear(weights=path).weights == str(path)


def test_every_door_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = "radial: decay=-1.0 must be positive"
    words = ["plan", "-m", "wan-1.3b", "--height", "480", "--width", "832"]
    assert main([*words, "--method", "radial", "--set", "decay=-1.0"]) == 2
    assert said in capsys.readouterr().err
    for door in (
        lambda: Radial(decay=-1.0),
        lambda: diffpatch.make_method("radial", decay=-1.0),
        lambda: diffpatch.plan("wan-1.3b", "radial", decay=-1.0, height=480, width=832),
        lambda: diffpatch.patch(tiny.wan().pipe, "radial", decay=-1.0),
        lambda: api.attention(*torch.zeros(3, 1, 32, 1, 8), GRID, "radial", decay=-1.0),
        lambda: check_spec(
            {"prompts": ["a"], "methods": [{"method": "radial", "set": {"decay": -1.0}}]}, tmp_path
        ),
    ):  # fmt: skip
        with pytest.raises(BadParameter, match=said):
            door()


def test_the_command_line_takes_what_python_takes(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "-m", "wan-1.3b", "--height", "480", "--width", "832", "--num-frames", "81"]
    assert main([*words, "--method", "radial+temporal", "--set", "kept=0.2"]) == 0
    assert "Radial(decay=0.2, rule='tiles', sink=True, kept=0.2)" in capsys.readouterr().out
    assert main([*words, "--method", "neighborhood", "--set", "causal=3"]) == 2
    assert "--set causal=3 must be true or false, for all axes" in capsys.readouterr().err
    assert main([*words, "--method", "radial", "--set", "dekay=3"]) == 2
    assert "radial has no parameter 'dekay': did you mean 'decay'" in capsys.readouterr().err


def test_three_numbers_are_a_grid() -> None:
    q = torch.randn(1, 32, 2, 8)
    expected = diffpatch.attention(q, q, q, GRID, "window", window=0.5)
    assert torch.equal(diffpatch.attention(q, q, q, (2, 4, 4), "window", window=0.5), expected)
    assert as_grid([2, 4, 4]) == GRID


@pytest.mark.parametrize(
    ("value", "hint", "words"),
    [
        ("a", int | None, "a whole number or none"),
        ("c", Literal["a", "b"], "'a' or 'b'"),
        (0, Count, "at least 1"),
        (-2, Natural | None, "at least 0"),
        (1.5, tuple[int, ...], "a list of whole numbers"),
        ((1, "b"), tuple[int, str, int], "a list of 3: a whole number, text, a whole number"),
    ],
)
def test_types_are_told_in_words(value: Any, hint: Any, words: str) -> None:
    with pytest.raises(BadParameter, match=f"^x: y=.* must be {words}$"):
        check("x", "y", value, hint)
    assert words.startswith("at least") or expected(hint) == words


def test_methods_of_your_own_are_checked_without_a_word() -> None:
    @dataclass(frozen=True)
    class Own(Method):
        name = "own"

        size: int = 3
        rates: tuple[float, ...] = ()

        def validate(self) -> None:
            self.check(self.size < 9, "size", "below 9")

    Mine: Any = Own
    assert Mine(rates=[1, 2.5]) == Mine(3, (1, 2.5))
    for params, said in (({"size": 9}, "below 9"), ({"size": "9"}, "of type int")):
        with pytest.raises(BadParameter, match=said):
            Mine(**params)
    with pytest.raises(TypeError, match="call it validate"):
        type("Old", (Method,), {"__post_init__": lambda self: None})


def test_checked_methods_are_copied_and_pickled() -> None:
    for method in (Radial(kept=0.2), Temporal(over=Window(window=(1, 2, 3)), mode="mask")):
        assert copy.deepcopy(method) == pickle.loads(pickle.dumps(method)) == method


def test_what_patch_takes_is_known_where_a_misspelt_argument_arrives() -> None:
    taken = set(inspect.signature(diffpatch.patch).parameters) - {"pipe", "method", "params"}
    assert taken == set(ARGUMENTS)
