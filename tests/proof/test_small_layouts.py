"""Cuts, layouts, masks, branches and decisions at places where two rules part."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from diffpatch import Dynamic, Neighborhood, Radial, Temporal, TokenGrid, Window
from diffpatch.kernels.memo import Memo
from diffpatch.kernels.pieces import cut
from diffpatch.methods import axis
from diffpatch.methods.neighborhood import _whole_tiles, entropy_scale
from diffpatch.methods.radial.rules import half_window, published
from diffpatch.patching.attention.decision import Decider, Question
from diffpatch.patching.attention.layout import (
    NO_GRID,
    UNKNOWN,
    call_shape,
    is_own_call,
    layout,
    numbers,
    silent_tokens,
    with_silent,
)
from diffpatch.patching.attention.model_masks import ModelMask
from diffpatch.patching.run.run import Run
from diffpatch.patterns.build import from_axes
from diffpatch.patterns.grid import PackedGrid
from diffpatch.patterns.tiles import Tiling, choose_tile, equal_cuts, raster, step_cuts
from diffpatch.pipelines.families.grids import REST
from tests.kernels.random_blocks import random_blocks


def test_borders_halfway_go_to_the_left_and_offsets_are_taken_modulo_the_step() -> None:
    assert equal_cuts(10, 4) == (0, 2, 5, 7, 10) and equal_cuts(6, 4) == (0, 1, 3, 4, 6)
    assert step_cuts(10, 4, 6) == step_cuts(10, 4, 2) == (0, 2, 6, 10)
    assert step_cuts(10, 4, 4) == step_cuts(10, 4) == (0, 4, 8, 10)


def waste(shape: tuple[int, int, int], tile: tuple[int, int, int], most: int) -> float:
    """What `choose_tile` makes small: 2 % of waste weigh as much as twice the stretch."""
    count = math.prod(-(-n // side) for n, side in zip(shape, tile, strict=True))
    sides = [side for side, n in zip(tile, shape, strict=True) if n > 1] or [1]
    stretch = math.log2(max(sides) / min(sides))
    return count * most / math.prod(shape) * (1 + 0.02 * stretch)


@pytest.mark.parametrize("shape", [(21, 30, 52), (5, 8, 8), (1, 45, 80), (3, 7, 19), (13, 2, 33)])
@pytest.mark.parametrize("most", [32, 128])
def test_no_box_wastes_less_than_the_one_that_is_chosen(
    shape: tuple[int, int, int], most: int
) -> None:
    found = choose_tile(shape, most)
    sides = (range(1, min(n, most) + 1) for n in shape)
    even = [
        (t, h, w)
        for t, h, w in itertools.product(*sides)
        if t * h * w <= most and w == -(-shape[2] // -(-shape[2] // w))
    ]
    assert waste(shape, found, most) <= min(waste(shape, box, most) for box in even) + 1e-9
    limits = tuple(-(-n // 3) for n in shape)
    assert all(
        a <= b for a, b in zip(choose_tile(shape, most, limits)[:2], limits[:2], strict=True)
    )


def test_text_of_a_raster_is_cut_like_its_picture() -> None:
    tiling = raster(TokenGrid(1, 4, 40, text_before=100, text_after=33), block=32)
    assert tiling.text_sizes == ([32, 32, 32, 4], [32, 1])
    assert tiling.visual_sizes.tolist() == [32] * 5


def test_pieces_of_nested_tiles_are_compact_in_every_tile() -> None:
    """Tiles of different sizes, so that a place taken from another tile shows."""
    grid = TokenGrid(3, 5, 7, text_before=2, text_after=3)
    tiling = Tiling(grid, ((0, 1, 3), (0, 2, 5), (0, 3, 7)), nested=True)
    plain = Tiling(grid, tiling.cuts).order().split(tiling.sizes.tolist())
    for one, other in zip(tiling.order().split(tiling.sizes.tolist()), plain, strict=True):
        assert sorted(one.tolist()) == other.tolist()


def test_kept_is_a_mean_over_the_heads_that_follow_each_pattern() -> None:
    grid = TokenGrid(1, 8, 8, text_after=5)
    few, many = torch.eye(8, dtype=torch.bool), torch.ones(8, 8, dtype=torch.bool)
    whole = torch.ones(1, 1, dtype=torch.bool)
    tiling = Tiling.even(grid, (1, 4, 4))
    rules = [(whole, few, many), (whole, many, many)]
    pattern = from_axes(grid, tiling, rules, head_pattern=[0, 0, 1])
    each = pattern.dense().double().mean((1, 2))
    assert pattern.kept == pytest.approx(float(2 * each[0] + each[1]) / 3)
    assert pattern.kept != pytest.approx(float(each.mean()), abs=1e-3)


def test_what_a_reading_leaves_open_is_filled_in_beside_what_it_says() -> None:
    tokens = 2 * 3 * 4 + 10
    for before, after, text in ((REST, 3, (7, 3)), (4, REST, (4, 6)), (REST, 0, (10, 0))):
        found = layout((2, 3, 4, before, after), tokens)
        assert isinstance(found, TokenGrid) and (found.text_before, found.text_after) == text
    assert isinstance(layout((2, 3, 4, REST, 11), tokens), str)


def test_silent_tokens_stand_at_one_end() -> None:
    grid = PackedGrid((5, (1, 2, 2), 7))
    assert (silent_tokens(grid, "before"), silent_tokens(grid, "after")) == (range(5), range(9, 16))
    assert call_shape(numbers(grid), "before") == (11, 16)
    assert call_shape(numbers(grid), "after") == (9, 16)
    assert call_shape(NO_GRID, "before") == call_shape(NO_GRID, "after") == UNKNOWN
    assert is_own_call(UNKNOWN, 3, 5) and not is_own_call(UNKNOWN, 5, 5)
    assert is_own_call((11, 16), 11, 16) and not is_own_call((11, 16), 11, 17)
    assert is_own_call(None, 5, 5) and not is_own_call(None, 3, 5)
    plain = TokenGrid(1, 2, 2, 5, 7)
    assert (silent_tokens(plain, "before"), silent_tokens(plain, "after")) == (
        range(5), range(9, 16)
    )  # fmt: skip
    q = torch.arange(4.0)[None, :, None, None] + 1
    for silent, expected in (
        (range(3), [0, 0, 0, 1, 2, 3, 4]),
        (range(4, 7), [1, 2, 3, 4, 0, 0, 0]),
    ):
        padded, asking = with_silent(q, silent)
        assert padded.flatten().tolist() == expected and torch.equal(padded[:, asking], q)


def test_a_mask_follows_its_tokens_to_another_order() -> None:
    places = torch.tensor([2, 0, 1])
    mask = ModelMask(torch.tensor([[True, False, True]]), torch.tensor([[1.0, 2.0, 3.0]]), "why")
    found = mask.at(places)
    assert found.keys is not None and found.bias is not None and found.reason == "why"
    assert found.keys.tolist() == [[True, True, False]] and found.bias.tolist() == [[3.0, 1.0, 2.0]]
    assert vars(ModelMask().at(places)) == vars(ModelMask())


def decided(method: Any, shape: tuple[int, ...], **changes: Any) -> str | None:
    tokens = math.prod(shape)
    question: dict[str, Any] = {
        "shape": (1, tokens, 2, 8), "dtype": torch.float32, "device": torch.device("cpu"),
        "variant": method.variant(0, 0), "masked": False, "biased": False, "learned": False,
        "rank": 0, "parts": 1, "ranks": 1,
    }  # fmt: skip
    after, where = changes.pop("after", 0), changes.pop("where", "none")
    question["shape"] = (1, tokens + after, 2, 8)
    decider = Decider(method, "auto", where, True)
    return decider.decide((*shape, 0, after), Question(**question | changes), Memo()).dense


def test_a_method_for_videos_runs_on_two_frames_and_learned_weights_where_they_fit() -> None:
    videos = Radial(decay=0.2)
    assert "image" not in videos.kinds
    assert "saves between frames" in str(decided(videos, (1, 32, 32)))
    assert "saves between frames" not in str(decided(videos, (2, 32, 32)))
    local = Window(window=(1, 4, 4))
    assert decided(local, (2, 16, 16)) is None and decided(local, (2, 16, 16), learned=True) is None
    assert "learned weights" in str(decided(local, (2, 16, 16), learned=True, biased=True))
    assert decided(local, (2, 16, 16), biased=True) is None


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("where", ["unknown", "none", "after"])
def test_text_that_stands_nobody_knows_where_is_not_cut(where: str, ranks: int) -> None:
    """Over several processes; a sequence without any is cut as it is."""
    local, shape = Window(window=(1, 4, 4)), (2, 16, 16)
    said = decided(local, shape, ranks=ranks, parts=ranks, where=where, after=4)
    assert (said is not None) == (ranks > 1 and where == "unknown"), said
    assert said is None or said.startswith("how the processes cut the tokens")
    assert decided(local, shape, ranks=ranks, parts=ranks, where=where) is None


def test_branches_are_counted_by_context_within_a_step() -> None:
    run = Run()
    asked = [(0, None), (0, None), (0, "neg"), (0, "neg"), (1, None), (1, None), (1, "neg")]
    found = [run.branch("t", step, context) for step, context in asked]
    assert found == [
        (0, True),
        (1, False),
        (2, False),
        (3, False),
        (0, True),
        (1, False),
        (2, False),
    ]
    assert run.branch("other", 1, "neg") == (0, True)


def test_a_run_forgets_one_transformer_and_remembers_the_most_it_held() -> None:
    run, method = Run(), Temporal(over=Window(window=(1, 4, 4)), budget_gib=1.0)
    for name in ("a", "b"):
        run.state[name, 0, 0, 0]["x"] = torch.zeros(8)
    run.check_state(method)
    run.forget("a")
    assert list(run.state) == [("b", 0, 0, 0)]
    run.check_state(method)
    assert run.record.state_bytes == 64 and run.state_bytes() == 32
    assert [run.place(step) for step in (4, 2)] == [4, 2]
    run.go_on(2)
    assert run.place(0) == 5


def test_windows_are_rounded_to_tiles_where_that_changes_little() -> None:
    assert _whole_tiles(10, 40, 8, 4) == 10 and _whole_tiles(9, 40, 8, 4) == 8
    assert _whole_tiles(17, 40, 8, 4) == 16 and _whole_tiles(39, 40, 8, 4) == 40
    assert _whole_tiles(29, 30, 16, 8) == 30, "never more than there is"
    assert entropy_scale(100, 10) == pytest.approx(2**0.5)
    assert Neighborhood(kept=0.25).pattern(TokenGrid(1, 64, 64)).kept == pytest.approx(0.25)
    assert Neighborhood(kept=0.125).pattern(TokenGrid(16, 16, 16)).kept == pytest.approx(0.125)
    pattern = Neighborhood(window=(-1, 4, 4), dilation=2).pattern(TokenGrid(1, 8, 8))
    assert pattern.kept < 1, "along an axis of one token no dilation matters"


def test_boxes_of_equal_share_are_even() -> None:
    def box(*counts: int) -> tuple[int, ...]:
        return axis.box([{s: s / n for s in range(1, n + 1)} for n in counts], 1 / 8, even=0.2)

    assert box(4, 4, 4) == (2, 2, 2) and box(2, 8, 8) == (1, 4, 4)


def test_bands_of_radial_decay_down_to_a_block() -> None:
    assert half_window(1, 1024, 0.2) == 1023
    assert [half_window(d, 1024, 0.5) for d in (2, 4, 8)] == [256, 128, 128]
    assert [half_window(d, 1024, 0.1) for d in (2, 4)] == [128, 128]
    assert half_window(16, 1024, 1.0) is None or half_window(16, 1024, 1.0) == 128
    assert half_window(2, 129, 4.0) == 128
    keep = published(TokenGrid(3, 16, 20), 0.2, sink=True)
    first = 320 // 128
    assert keep[:, :first].all(), "every block of queries sees the first frame"
    plain = published(TokenGrid(3, 16, 20), 0.2, sink=False)
    assert (keep & ~plain).any() and not (plain & ~keep).any()


def test_what_dynamic_takes_by_itself_depends_on_visual_tokens_and_steps() -> None:
    method = Dynamic()
    for tokens, text, tile in ((4095, 500, 32), (4096, 0, 64), (8191, 500, 64), (8192, 0, 128)):
        assert method.queries_of(TokenGrid(1, 1, tokens, text_before=text)) == tile
    assert [method.every(total) for total in (None, 29, 30, 50)] == [2, 2, 4, 4]
    grid = TokenGrid(1, 64, 64)
    assert Dynamic(pool=64).keys_of(grid) == 64 and Dynamic(pool=16).keys_of(grid) == 32
    assert Dynamic(pool=64, rest="drop").keys_of(grid) == 64 == method.queries_of(grid)
    assert method.shares_state and not Dynamic(refresh=1).shares_state
    assert not Dynamic(per_branch=True).shares_state


def test_a_tail_is_planned_with_its_log_sum_exps() -> None:
    method = Temporal(over=Window(window=(1, 4, 4)))
    pattern = method.pattern(TokenGrid(2, 8, 8), method.variant(0, 0))
    assert method.state_size(pattern, 3, 16) == 128 * 3 * (2 * 16 + 4)


def test_pieces_are_of_about_equal_length_within_each_piece_of_a_coarser_cut() -> None:
    blocks = random_blocks([33, 17, 64, 5], kept=1.0, seed=0)
    assert cut(blocks, 16).first.diff().tolist() == [11, 11, 11, 8, 9, *[16] * 4, 5]
    fine = cut(blocks, 8, 24)
    coarse = cut(blocks, 24)
    assert set(coarse.first.tolist()) <= set(fine.first.tolist())
    assert int(fine.first.diff().max()) <= 8 and len(coarse) == 7
    assert fine.whole.unique_consecutive().tolist() == list(range(len(coarse)))
