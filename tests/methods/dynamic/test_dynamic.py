"""The method `dynamic`: what it keeps, what is always in, how long, and against its definition."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

import diffpatch
from diffpatch import BadParameter, Dynamic, Temporal, TokenGrid
from diffpatch.kernels.active_tiles import api as active_tiles
from diffpatch.kernels.active_tiles.table import tile_table
from diffpatch.kernels.block_sparse.reference import dense_mask
from diffpatch.kernels.selection.rules import RULES
from diffpatch.methods.base import AttentionCall
from diffpatch.methods.packed import pattern_on
from diffpatch.methods.selection import always, shares
from diffpatch.patterns.grid import Grid, PackedGrid
from tests.kernels.random_blocks import random_qkv
from tests.tiny import wan

GRID = TokenGrid(4, 8, 12, text_before=5)
ODD = TokenGrid(5, 7, 11, text_after=6)
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(grid: Grid, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensors:
    q, k, v = random_qkv(2, grid.num_tokens, 4, 16, dtype, key_heads=2, seed=seed)
    return 2 * q, k, v


def chosen(method: Dynamic, tensors: Tensors, grid: TokenGrid, **call: Any) -> torch.Tensor:
    """bool (B, H, L, N, n): the strips of every level."""
    state: dict[str, Any] = {}
    pattern = method.pattern(grid)
    method.attend(*tensors, AttentionCall(pattern, state=state, **call))
    table = tile_table(pattern.blocks, method.keys_of(grid))
    shape = (table.num_tiles, len(table.strips))
    return active_tiles.unpack(state["bits"], shape[0] * shape[1]).unflatten(3, shape)


@pytest.mark.parametrize("rest", ["virtual", "drop", "pyramid"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("grid", [GRID, ODD], ids=str)
def test_every_rule_keeps_what_the_plan_says(rule: str, rest: str, grid: TokenGrid) -> None:
    method = Dynamic(rule=rule, rest=rest, kept=0.4, tile=32, strip=16, pool=8)
    pattern = method.pattern(grid)
    done = method.attend(*inputs(grid), AttentionCall(pattern))
    least, most = method.bounds(pattern, 0.4)
    assert torch.isfinite(done.out).all()
    assert least - 1e-9 <= float(done.kept) <= most + 1e-9
    assert method.kept_at(pattern, 0) == most
    assert method.at_most(pattern) == (most - least > 1e-9)
    text = 1 - (grid.visual_tokens / grid.num_tokens) ** 2
    assert float(done.kept) - text == pytest.approx(0.4 * (1 - text), abs=0.03)


@pytest.mark.parametrize("correct", [False, True])
def test_the_least_and_the_most_are_met_where_tiles_are_alike(correct: bool) -> None:
    method = Dynamic(kept=0.3, tile=32, strip=16, pool=16, correct=correct)
    pattern = method.pattern(TokenGrid(4, 8, 12))
    assert not method.at_most(pattern)
    assert method.kept_at(pattern, 3) == pytest.approx(0.3, abs=4e-3)
    own, far = 1 / 12, 1 / 16 + correct / 32  # the mean of 32 queries is one more
    for kept in (0.125, 0.5, 1.0):
        other = method.with_kept(kept)
        least = own + (1 - own) * far
        assert other.kept_at(pattern, 0) == pytest.approx(max(kept, least), abs=4e-3)


def test_virtual_tokens_and_dropped_tiles_by_their_definition() -> None:
    """One softmax over exact keys and, where nothing is dropped, the means of the others."""
    tensors = inputs(ODD, dtype=torch.float64)
    for rest in ("virtual", "drop"):
        method = Dynamic(rest=rest, kept=0.4, tile=32, strip=16, pool=8)
        pattern = method.pattern(ODD)
        exact = chosen(method, tensors, ODD)[:, :, 0]
        done = method.attend(*tensors, AttentionCall(pattern))
        reference = method.attend(*tensors, AttentionCall(pattern, backend="reference"))
        assert reference.backend == "reference" and done.backend == "torch"
        assert torch.allclose(done.out, reference.out, atol=1e-6)
        if rest == "drop":
            table, index = tile_table(pattern.blocks, 16), pattern.blocks
            query = index.tile_of_place[index.place]
            strip = torch.arange(len(table.strips)).repeat_interleave(
                table.strips.first.diff().long()
            )[index.place]
            seen = exact[:, :, query][..., strip]
            q, k, v = (x.repeat_interleave(4 // x.shape[2], 2).transpose(1, 2) for x in tensors)
            expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen)
            assert torch.allclose(done.out, expected.transpose(1, 2), atol=1e-10)


def test_a_pyramid_reads_worse_tiles_more_coarsely() -> None:
    method = Dynamic(rule="psa", rest="pyramid", kept=0.3, tile=32, strip=16)
    levels = chosen(method, inputs(GRID), GRID)
    first, second, third = levels.unbind(2)
    assert not (first & ~second).any() and not (second & ~third).any()
    counts = [int(x[0, 0, -1].sum()) for x in (first, second, third)]
    assert 0 < counts[0] < counts[1] < counts[2] < levels.shape[-1]
    tensors = inputs(GRID)
    pattern = method.pattern(GRID)
    out = method.attend(*tensors, AttentionCall(pattern)).out
    assert torch.allclose(
        out, method.attend(*tensors, AttentionCall(pattern, backend="reference")).out, atol=1e-4
    )


def test_virtual_or_drop_is_the_smallest_pyramid() -> None:
    tensors = inputs(GRID)
    pyramid = Dynamic(rest="pyramid", pyramid=((1, 1.0),), kept=0.3, tile=32, strip=16)
    drop = dataclasses.replace(pyramid, rest="drop")
    levels = chosen(pyramid, tensors, GRID)
    assert levels.shape[2] == 1
    assert abs(int(levels.sum()) - int(chosen(drop, tensors, GRID).sum())) <= levels[..., 0].numel()


@pytest.mark.parametrize(
    ("kept", "quotas", "rest"),
    [
        (0.3, ((1, 1.0),), None),
        (0.3, ((1, 1.0),), 16),
        (0.4, ((1, 0.1), (2, 0.05), (8, 0.2)), None),
    ],
)
def test_shares_of_levels_compute_what_is_kept(
    kept: float, quotas: tuple[tuple[int, float], ...], rest: int | None
) -> None:
    found = shares(kept, quotas, rest)
    new = [b - a for a, b in zip([0.0, *found], found, strict=False)]
    cost = sum(part / size for part, (size, _) in zip(new, quotas, strict=True))
    assert cost + (1 - found[-1]) / (rest or float("inf")) == pytest.approx(kept, abs=1e-6)


def test_text_own_tile_and_first_frames_are_always_exact() -> None:
    for rule in RULES:
        method = Dynamic(rule=rule, kept=0.1, tile=32, strip=16, pool=16, keep_frames=1)
        exact = chosen(method, inputs(GRID), GRID)[:, :, 0]
        pattern = method.pattern(GRID)
        table = tile_table(pattern.blocks, 16)
        must = table.map(always(pattern.blocks, GRID, 1, 16))[0]
        assert exact[:, :, must].all()
        assert must[0].all() and must[:, 0].all()  # the tile of text
        assert not exact.all()


def test_a_choice_holds_for_some_steps_and_for_its_own_tokens() -> None:
    method = Dynamic(kept=0.3, tile=32, strip=16, pool=16, refresh=2)
    pattern, state = method.pattern(GRID), dict[str, Any]()
    found = []
    for step in range(4):
        method.attend(*inputs(GRID, seed=step), AttentionCall(pattern, step=step, state=state))
        found.append(state["bits"].clone())
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])
    assert not torch.equal(found[0], found[2])
    assert len(state["bits"].flatten()) == 2 * method.state_size(pattern, 4, 16)
    q, k, v = (x[:1] for x in inputs(GRID, seed=9))
    method.attend(q, k, v, AttentionCall(pattern, step=4, state=state))
    assert len(state["bits"]) == 1
    assert not Dynamic(refresh=1).needs_steps and method.needs_steps
    assert [Dynamic().every(n) for n in (None, 8, 29, 30)] == [2, 2, 2, 4]


def test_the_first_branch_of_a_step_chooses_for_all() -> None:
    settings: dict[str, Any] = {"kept": 0.3, "tile": 32, "strip": 16, "pool": 16}
    method, own = Dynamic(**settings), Dynamic(**settings, per_branch=True)
    pattern = method.pattern(GRID)

    def step(method: Dynamic, number: int, shared: dict[str, Any]) -> list[dict[str, Any]]:
        states = []
        for branch in range(2):
            tensors = inputs(GRID, seed=10 * number + branch)
            states.append(dict[str, Any]())
            method.attend(*tensors, AttentionCall(
                pattern, step=number, state=states[-1], branch=branch, shared=shared
            ))  # fmt: skip
        return states

    shared: dict[str, Any] = {}
    assert step(method, 0, shared) == [{}, {}]
    first = shared["bits"].clone()
    assert torch.equal(first, chosen_bits(method, inputs(GRID, seed=0)))
    step(method, 1, shared)
    assert torch.equal(first, shared["bits"])
    step(method, 2, shared)
    assert torch.equal(shared["bits"], chosen_bits(method, inputs(GRID, seed=20)))
    for alone in (own, Dynamic(**settings, refresh=1)):
        unused: dict[str, Any] = {}
        states = step(alone, 0, unused)
        assert not unused and not torch.equal(states[0]["bits"], states[1]["bits"])
    # A branch with tokens of its own chooses for itself and leaves the others their choice.
    state, before = dict[str, Any](), shared["bits"].clone()
    q, k, v = inputs(ODD)
    method.attend(q, k, v, AttentionCall(method.pattern(ODD), state=state, shared=shared))
    assert "bits" in state and torch.equal(shared["bits"], before)


def chosen_bits(method: Dynamic, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    state: dict[str, Any] = {}
    q, k, v = tensors
    method.attend(q, k, v, AttentionCall(method.pattern(GRID), state=state))
    bits: torch.Tensor = state["bits"]
    return bits


def test_branches_of_a_patched_model_share_their_state() -> None:
    held = {}
    for per_branch in (False, True):
        tiny = wan()
        diffpatch.patch(
            tiny.pipe, "dynamic", dense_steps=1, dense_layers=0, kept=0.5, tile=16, strip=8,
            pool=8, per_branch=per_branch,
        )  # fmt: skip
        tiny.run(height=64, num_inference_steps=4)
        held[per_branch] = diffpatch.report(tiny.pipe).state_bytes
    assert held[True] == 2 * held[False] > 0


def test_the_same_tensors_give_the_same_bits() -> None:
    for rule in RULES:
        method = Dynamic(rule=rule, kept=0.3, tile=32, strip=16, pool=16)
        tensors = inputs(GRID)
        assert torch.equal(chosen(method, tensors, GRID), chosen(method, tensors, GRID))
    q, k, v = (torch.ones_like(x) for x in inputs(GRID))
    method = Dynamic(kept=0.3, tile=32, strip=16, pool=16, rest="drop")
    exact = chosen(method, (q, k, v), GRID)[:, :, 0]
    assert torch.equal(exact[0, 0], exact[1, 3])
    free = ~tile_table(method.pattern(GRID).blocks, 16).map(
        always(method.pattern(GRID).blocks, GRID, 0, 16)
    )[0]
    row = exact[0, 0, -1][free[-1]].int()
    assert (row.diff() <= 0).all() and row.any()  # of equal scores the first win


def test_masked_keys_do_not_count() -> None:
    q, k, v = inputs(GRID)
    mask = torch.rand(2, GRID.num_tokens, generator=torch.Generator().manual_seed(1)) < 0.7
    hidden = ~mask[..., None, None]
    method = Dynamic(kept=0.4, tile=32, strip=16, pool=8)
    pattern = method.pattern(GRID)
    out = method.attend(q, k, v, AttentionCall(pattern, key_mask=mask)).out
    other = method.attend(
        q,
        k.masked_fill(hidden, 50.0),
        v.masked_fill(hidden, 1e4),
        AttentionCall(pattern, key_mask=mask),
    ).out
    assert torch.allclose(out, other, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_choose_and_compute_alike(dtype: torch.dtype) -> None:
    tensors = inputs(GRID, dtype=dtype)
    wide = tensors[0].float(), tensors[1].float(), tensors[2].float()
    method = Dynamic(kept=0.4, tile=32, strip=16, pool=8)
    a, b = chosen(method, tensors, GRID), chosen(method, wide, GRID)
    assert (a != b).float().mean() < 0.002
    pattern = method.pattern(GRID)
    low = method.attend(*tensors, AttentionCall(pattern)).out
    high = method.attend(*wide, AttentionCall(pattern)).out
    assert low.dtype == dtype and (low - high).norm() < 0.02 * high.norm()


def test_budgets_belong_to_layers_and_heads() -> None:
    budgets = {1: (0.2, 0.4, 0.6, 1.0)}
    method = Dynamic(kept=0.3, budgets=budgets, tile=32, strip=16, pool=16, rest="drop")
    assert hash(method) == hash(
        Dynamic(**{**_fields(method), "budgets": [(1, [0.2, 0.4, 0.6, 1.0])]})
    )
    grid = TokenGrid(4, 8, 12)
    for layer, wanted in ((0, [0.3] * 4), (1, [0.2, 0.4, 0.6, 1.0])):
        exact = chosen(method, inputs(grid), grid, layer=layer)[:, :, 0]
        assert torch.allclose(exact.float().mean((0, 2, 3)), torch.tensor(wanted), atol=0.01)
    pattern = method.pattern(grid)
    assert method.kept_at(pattern, 0) == pytest.approx(0.55, abs=0.01)
    one = Dynamic(budgets={0: (0.5,)})
    with pytest.raises(BadParameter, match="budgets name 1 heads in layer 0 and the call has 4"):
        one.attend(*inputs(grid), AttentionCall(one.pattern(grid)))


def _fields(method: Dynamic) -> dict[str, Any]:
    return {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}


def test_a_published_threshold_lets_the_data_decide() -> None:
    tensors = inputs(GRID)
    kept = []
    for tau in (0.5, 1.0, 2.0):
        method = Dynamic(rule="sol", threshold=tau, tile=32, strip=16, pool=16)
        pattern = method.pattern(GRID)
        kept.append(float(method.attend(*tensors, AttentionCall(pattern)).kept))
        assert method.at_most(pattern) and method.kept_at(pattern, 0) == 1.0
    assert 1 > kept[0] > kept[1] > kept[2] > 0
    for rule, cut in (("nabla", 0.5), ("sparge", 0.5), ("xattention", 0.5)):
        method = Dynamic(rule=rule, threshold=cut, tile=32, strip=16, pool=16)
        assert 0 < float(method.attend(*tensors, AttentionCall(method.pattern(GRID))).kept) < 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kept": 0.0}, "kept=0.0"),
        ({"rule": "best"}, "rule='best'"),
        ({"rest": "far"}, "rest='far'"),
        ({"pool": 64, "strip": 32}, "pool=64"),
        ({"threshold": 1.0}, "threshold=1.0 must be None but for sol, sparge"),
        ({"refresh": 0}, "refresh=0"),
        ({"pyramid": ((2, 0.5),)}, "pyramid="),
        ({"budgets": {0: (0.0,)}}, "must be in"),
        ({"budgets": 3}, "budgets=3"),
        ({"tile": 7}, "tile=7"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BadParameter, match=words):
        Dynamic(**settings)


def test_a_profile_shows_what_choosing_costs() -> None:
    method = Dynamic(kept=0.3, tile=32, strip=16, pool=16)
    pattern, state = method.pattern(GRID), dict[str, Any]()
    seen = []
    for step in range(2):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            method.attend(*inputs(GRID), AttentionCall(pattern, step=step, state=state))
        names = {event.key for event in profile.key_averages()}
        seen.append({name for name in names if name.startswith("dynamic: ")})
    assert seen[0] - seen[1] == {"dynamic: choose"}
    assert seen[1] == {"dynamic: exact", "dynamic: virtual tokens"}


def test_it_is_not_combined_with_temporal() -> None:
    with pytest.raises(BadParameter, match="dynamic remembers that itself; so combine"):
        Temporal(over=Dynamic())


@pytest.mark.parametrize("between", ["exact", "aligned"])
@pytest.mark.parametrize("rest", ["virtual", "drop"])
def test_a_packed_sequence_has_text_and_grids_of_its_own(between: str, rest: str) -> None:
    grid = PackedGrid((7, (2, 4, 8), 5, (3, 8, 8)), between)
    method = Dynamic(kept=0.4, tile=32, strip=16, pool=8, rest=rest)
    pattern = pattern_on(method, grid, None)
    tensors = inputs(grid)
    state: dict[str, Any] = {}
    done = method.attend(*tensors, AttentionCall(pattern, state=state))
    same = method.attend(*tensors, AttentionCall(pattern, backend="reference"))
    assert torch.allclose(done.out, same.out, atol=1e-4)
    least, most = method.bounds(pattern, 0.4)
    assert least - 1e-9 <= float(done.kept) <= most + 1e-9
    table = tile_table(pattern.blocks, 16)
    flags = active_tiles.unpack(state["bits"], table.num_tiles * len(table.strips))
    exact = flags[:, :, 0].unflatten(2, (table.num_tiles, len(table.strips)))
    text = grid.is_text(pattern.blocks.order)
    borders = pattern.blocks.starts.long()
    of_text = [bool(text[a:b].any()) for a, b in itertools.pairwise(borders.tolist())]
    rows = torch.tensor(of_text)
    assert exact[:, :, rows].all() and not exact[:, :, ~rows].all()


def test_everything_kept_is_dense_attention() -> None:
    q, k, v = inputs(ODD)
    x, y, z = (x.repeat_interleave(4 // x.shape[2], 2).transpose(1, 2) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(x, y, z).transpose(1, 2)
    out = diffpatch.attention(q, k, v, ODD, "dynamic", kept=1.0, tile=32)
    assert torch.allclose(out, expected, atol=1e-5)
    assert bool(dense_mask(Dynamic().pattern(ODD).blocks).all())


def test_a_patched_model_reports_what_the_plan_predicts() -> None:
    tiny = wan()
    settings: dict[str, Any] = {"kept": 0.5, "tile": 16, "strip": 8, "pool": 8}
    before = tiny.run()
    diffpatch.patch(tiny.pipe, "dynamic", dense_steps=1, dense_layers=0, **settings)
    assert not torch.equal(tiny.run(height=64, num_inference_steps=4), before)
    report = diffpatch.report(tiny.pipe)
    method = Dynamic(**settings)
    least, most = method.bounds(method.pattern(TokenGrid(3, 4, 4)), 0.5)
    assert float(report.kept_per_step[0]) == 1.0 and least < 0.8
    for kept in report.kept_per_step[1:]:
        assert least - 1e-6 <= float(kept) <= most + 1e-6
    diffpatch.unpatch(tiny.pipe)
    assert torch.equal(tiny.run(), before)
