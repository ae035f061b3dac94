"""What is said to be kept, against counts by brute force that read nothing but masks and tiles."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import diffpatch
from diffpatch import Dynamic, Linear, TokenGrid
from diffpatch.kernels.active_tiles import api as active_tiles
from diffpatch.kernels.active_tiles.table import tile_table
from diffpatch.methods.base import AttentionCall
from diffpatch.patching.options.schedule import Schedule
from diffpatch.patching.run.run import Run
from diffpatch.patterns.pattern import BlockPattern
from tests.tiny import wan, wan22

GRIDS = [
    TokenGrid(5, 7, 9),
    TokenGrid(4, 6, 11, text_before=5),
    TokenGrid(1, 13, 17, text_after=30),
    TokenGrid(3, 8, 10, text_before=7, text_after=140),
]


def tiles(pattern: BlockPattern) -> list[torch.Tensor]:
    """The tokens of every tile."""
    starts = pattern.blocks.starts.tolist()
    return [pattern.blocks.order[a:b] for a, b in itertools.pairwise(starts)]


@pytest.mark.parametrize("pool", [1, 7, 64])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_linear_counts_exact_pairs_and_a_virtual_token_as_one_key(
    grid: TokenGrid, pool: int
) -> None:
    pattern = Linear(kept=0.2, pool=pool).pattern(grid)
    seen = pattern.dense()[0]
    pairs = int(seen.sum())
    for query, tile in itertools.product(range(grid.num_tokens), tiles(pattern)):
        if not seen[query, tile].any():
            pairs += -(-len(tile) // pool)
    assert int(seen.sum()) < pairs
    assert pattern.kept == pytest.approx(pairs / grid.num_tokens**2, abs=1e-12)


@pytest.mark.parametrize("near", [0, 40, 100])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_linear_counts_a_state_as_one_key(grid: TokenGrid, near: int) -> None:
    pattern = Linear(far="state", near=near).pattern(grid)
    seen = pattern.dense()[0]
    blind = int((~seen).any(1).sum())  # queries that leave something out have a state
    assert 0 < blind == grid.visual_tokens
    assert pattern.kept == pytest.approx((int(seen.sum()) + blind) / grid.num_tokens**2, abs=1e-12)


@pytest.mark.parametrize("near", [40, 100, 200])
def test_text_is_no_part_of_the_tokens_that_are_near(near: int) -> None:
    bare = Linear(far="state", near=near).pattern(TokenGrid(4, 8, 11)).dense()[0]
    grid = TokenGrid(4, 8, 11, text_before=500, text_after=77)
    seen = Linear(far="state", near=near).pattern(grid).dense()[0]
    visual = slice(grid.text_before, grid.text_before + grid.visual_tokens)
    assert torch.equal(seen[visual, visual], bare)
    assert seen[: grid.text_before].all() and seen[:, : grid.text_before].all()
    found = bare.sum(1).double().mean().item()  # whole tiles: about as many as were asked for
    assert near / 2 < found < near * 2


@pytest.mark.parametrize(
    "options",
    [
        {"rest": "drop"},
        {"rest": "virtual", "pool": 8},
        {"rest": "virtual", "pool": 5},
        {"rest": "pyramid", "rule": "psa"},
        {"rest": "virtual", "pool": 8, "keep_frames": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("grid", GRIDS[1:], ids=str)
def test_dynamic_counts_what_it_computes(grid: TokenGrid, options: dict[str, Any]) -> None:
    method = Dynamic(kept=0.4, tile=32, strip=16, **options)
    pattern, state = method.pattern(grid), dict[str, Any]()
    random = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, grid.num_tokens, 4, 8, generator=random).unbind()
    done = method.attend(2 * q, k, v, AttentionCall(pattern, state=state))
    table = tile_table(pattern.blocks, 16)
    shape = (table.num_tiles, len(table.strips))
    maps = active_tiles.unpack(state["bits"], shape[0] * shape[1]).unflatten(3, shape)
    strips = table.strips.first.diff().tolist()
    sizes = [size for size, _ in method.pyramid] if method.rest == "pyramid" else [1]
    pairs = 0
    for b, h in itertools.product(range(2), range(4)):
        for rows, (n, length) in itertools.product(enumerate(tiles(pattern)), enumerate(strips)):
            row, queries = rows
            size = next(
                (size for size, level in zip(sizes, maps[b, h], strict=True) if level[row, n]),
                method.pool if method.rest == "virtual" else None,
            )
            if size is not None:
                pairs += len(queries) * -(-length // size)
            if size == method.pool and method.rest == "virtual":
                pairs += length  # the mean query of the tile looks at the keys too
    assert float(done.kept) == pytest.approx(pairs / (8 * grid.num_tokens**2), abs=1e-9)


def test_prices_belong_to_one_way_to_cut_the_keys() -> None:
    """Two settings over one pattern do not read each other's counts."""
    grid = TokenGrid(4, 8, 12)
    random = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, grid.num_tokens, 2, 8, generator=random).unbind()
    shared = Dynamic(tile=128).pattern(grid)
    for options in ({"pool": 16}, {"pool": 48}, {"pool": 48, "rest": "drop"}):
        method = Dynamic(kept=0.5, tile=128, **options)
        once = [
            float(method.attend(q, k, v, AttentionCall(pattern)).kept)
            for pattern in (shared, method.pattern(grid))
        ]
        assert once[0] == once[1], options


def test_a_report_of_experts_patched_one_by_one_counts_each_call_once() -> None:
    tiny = wan22()
    names = {"transformer": "window", "transformer_2": "neighborhood"}
    for name, method in names.items():
        diffpatch.patch(getattr(tiny.pipe, name), method, dense_steps=0)
    tiny.run()
    whole = diffpatch.report(tiny.pipe)
    parts = {name: diffpatch.report(getattr(tiny.pipe, name)) for name in names}
    calls = {name: part.calls for name, part in parts.items()}
    assert whole.calls == sum(calls.values()) and min(calls.values()) > 0
    expected = sum(part.kept * part.calls for part in parts.values()) / whole.calls
    assert whole.kept == pytest.approx(expected, abs=1e-12) and whole.kept <= 1
    assert parts["transformer"].kept != pytest.approx(parts["transformer_2"].kept, abs=1e-3)
    assert whole.kept_per_step == [pytest.approx(expected, abs=1e-12)]  # bare models have no steps
    assert {name.split(".")[0] for name in whole.kept_per_layer} == set(names)
    for name, part in parts.items():
        kept = [x for layer, x in whole.kept_per_layer.items() if layer.startswith(f"{name}.")]
        assert sum(kept) / len(kept) == pytest.approx(part.kept, abs=1e-12)


def test_a_schedule_is_bound_anew_for_every_run() -> None:
    tiny = wan()
    local: dict[str, Any] = {"window": (-1, 1, 2), "shift": "none"}
    diffpatch.patch(tiny.pipe, "window", dense_steps=0.5, dense_last_steps=1, **local)
    for steps in (8, 4, 6):
        tiny.run(num_inference_steps=steps, output_type="latent")
        kept = diffpatch.report(tiny.pipe).kept_per_step
        dense = [True] * (steps // 2) + [False] * (steps // 2 - 1) + [True]
        assert [x == 1 for x in kept] == dense


def test_a_schedule_is_bound_anew_for_every_window_of_a_run() -> None:
    run, schedule = Run(), Schedule(dense_steps=0.5, dense_layers=1)
    assert [run.bound(schedule, 2, 8, 1).first, run.bound(schedule, 2, 8, 1).first] == [4, 4]
    run.go_on(2)
    assert run.bound(schedule, 2, 4, 1).first == 2
    assert run.bound(schedule, 3, 4, 1).ever_sparse(2, 4)  # another transformer, of more layers
