"""The windows that `larger` lets a query see, against its rule in words, on odd sizes."""

from __future__ import annotations

import math

import pytest

from diffpatch import BadParameter, Larger, Neighborhood, TokenGrid, entropy_scale, make_method
from tests.brute import Position, brute_force, check


def sees(length: int, trained: int, query: int, key: int) -> bool:
    """Whether two tokens of an axis see each other: a window of the trained size, moved inwards."""
    if length <= trained:
        return True
    half = trained // 2
    low, high = query - half, query + half
    inwards = max(0, -low) - max(0, high - (length - 1))
    return length <= 2 * half + 1 or low + inwards <= key <= high + inwards


@pytest.mark.parametrize(
    "grid",
    [TokenGrid(2, 7, 9), TokenGrid(1, 5, 11), TokenGrid(3, 4, 6, text_after=3), TokenGrid(2, 5, 3)],
    ids=str,
)
@pytest.mark.parametrize("trained", [(3, 4), (4, 5), (2, 7), (5, 6)])
def test_windows_are_those_of_the_rule(grid: TokenGrid, trained: tuple[int, int]) -> None:
    method = Larger(trained=trained)

    def rule(q: Position, k: Position) -> bool:
        return all(sees(grid.shape[i], trained[i - 1], q[i], k[i]) for i in (1, 2))

    check(method.pattern(grid, method.variant(0, 0)), brute_force(grid, rule))


def test_it_is_freeswims_window_and_scale() -> None:
    grid, published = TokenGrid(2, 60, 104), Neighborhood.freeswim(30, 52)
    method = Larger(trained=(30, 52))
    assert method.softmax_factor() == published.softmax_factor()
    assert method.softmax_factor() == pytest.approx(math.sqrt(math.log(3120, 1560)))
    assert method.pattern(grid).kept == published.pattern(grid).kept
    # Its paper's figures: kept = 31·53 / (68·120) at 1088×1920 for the 1.3B model.
    kept = method.pattern(TokenGrid(1, 68, 120)).kept
    assert kept == pytest.approx(31 * 53 / (68 * 120), abs=1e-9)
    assert Larger(trained=(4, 4), sharpen=1.25).softmax_factor() == 1.25
    assert entropy_scale(32, 16) == Larger(trained=(4, 4)).softmax_factor()


@pytest.mark.parametrize(("height", "trained", "fewest"), [(9, 4, 3), (8, 4, 2), (13, 4, 4)])
def test_counted_windows_are_k_and_k_plus_1(height: int, trained: int, fewest: int) -> None:
    method, grid = Larger(trained=(trained, 100), shape="count"), TokenGrid(2, height, 3)
    for layer, count in ((0, fewest), (1, fewest + 1), (6, fewest)):
        seen = method.pattern(grid, method.variant(layer, 0)).dense()[0]
        rows = seen.view(2, height, 3, 2, height, 3)[0, :, 0, 1, :, 2]
        windows = {tuple(row.nonzero()[:, 0].tolist()) for row in rows}
        assert len(windows) == count
        assert sorted(row for window in windows for row in window) == list(range(height))
        assert max(map(len, windows)) <= trained


def test_frames_up_to_the_trained_size_stay_whole_and_say_so() -> None:
    for method in (Larger(trained=(6, 8)), Larger(trained=(6, 8), shape="count")):
        for layer in (0, 1):
            grid = TokenGrid(3, 6, 7)
            assert method.pattern(grid, method.variant(layer, 0)).kept == 1
        assert "trained 6×8 tokens holds all 6×7 of a frame" in method.why_whole(grid)
    assert Larger(trained=(6, 8), guide=2).guide_every(TokenGrid(3, 6, 8)) == 0
    assert Larger(trained=(6, 8), guide=2).guide_every(TokenGrid(3, 8, 8)) == 2


def test_what_is_seen_does_not_grow_with_the_frame() -> None:
    sides = (33, 64, 128)
    seen = [Larger(trained=(16, 16)).pattern(TokenGrid(1, n, n)).kept * n**2 for n in sides]
    assert seen == pytest.approx([17**2] * 3)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"trained": (1, 4)}, "trained=.* must be rows and columns"),
        ({"scale": 0.0}, "scale=0.0 must be a positive"),
        ({"guide": -1}, "guide=-1 must be a count"),
        ({"sharpen": -1.0}, "sharpen=-1.0 must be a positive"),
        ({"stride": 0}, "stride=0 must be"),
        ({"shape": "round"}, "shape"),
    ],
)
def test_bad_parameters_are_one_sentence(params: dict[str, object], message: str) -> None:
    with pytest.raises(BadParameter, match=message) as caught:
        make_method("larger", **params)
    assert "\n" not in str(caught.value)


def test_an_unknown_size_is_refused() -> None:
    with pytest.raises(BadParameter, match="which frame size the model was trained at"):
        Larger().pattern(TokenGrid(1, 4, 4))
    with pytest.raises(BadParameter, match="pass trained="):
        Larger().for_model(21, None, cross_attention=True)
    filled = Larger().for_model(21, (30, 52), cross_attention=False)
    assert filled == Larger(trained=(30, 52), guide=0)
    assert Larger(guide=5).for_model(None, (3, 4), cross_attention=True).guide == 5
