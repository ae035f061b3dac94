"""The strictly linear forms: their formulas in fp64, and that cost grows with tokens only."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import diffpatch
from diffpatch import BadParameter, Linear, TokenGrid
from diffpatch.kernels.linear import api as linear_attention
from diffpatch.kernels.linear import reference as linear_attention_reference
from diffpatch.kernels.linear.groups import groups
from diffpatch.methods.base import AttentionCall
from tests.kernels.random_blocks import random_blocks, random_qkv, with_outliers
from tests.tiny import wan

GRIDS = [TokenGrid(5, 7, 9), TokenGrid(4, 6, 11, text_before=5), TokenGrid(1, 13, 17, text_after=3)]
STATE = Linear(far="state", near=60)
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(grid: TokenGrid, heads: int = 4, key_heads: int = 2) -> Tensors:
    """q, k, v in fp64, batch 2, grouped queries, keys and values away from zero."""
    q, k, v = random_qkv(2, grid.num_tokens, heads, 16, torch.float64, key_heads=key_heads)
    return q, k + 1, v - 2


def a_key_mask(grid: TokenGrid) -> torch.Tensor:
    return torch.rand(2, grid.num_tokens, generator=torch.Generator().manual_seed(0)) < 0.7


def by_definition(
    qkv: Tensors, grid: TokenGrid, method: Linear, mask: torch.Tensor | None
) -> torch.Tensor:
    """Exact scores of the visited keys and the mass of the rest in one softmax, query by query."""
    q, k, v = qkv
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    pattern, scale = method.pattern(grid), q.shape[-1] ** -0.5
    keep = pattern.dense()[0].expand(2, 1, -1, -1)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if mask is not None:
        keep = keep & mask[:, None, None]
    exact = scores.masked_fill(~keep, -math.inf)
    far, lse = linear_attention_reference.attend_cumulants(q, k, v, pattern.blocks, scale, mask)
    weights = torch.cat([exact, lse.transpose(1, 2)[..., None]], -1).softmax(-1)
    near = torch.einsum("bhqk,bkhd->bqhd", weights[..., :-1], v)
    return near + weights[..., -1].transpose(1, 2)[..., None] * far


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_window_and_a_state_are_their_formula(grid: TokenGrid, masked: bool) -> None:
    qkv, mask = inputs(grid), a_key_mask(grid) if masked else None
    expected = by_definition(qkv, grid, STATE, mask)
    call = AttentionCall(STATE.pattern(grid), key_mask=mask, backend="torch")
    assert (STATE.attend(*qkv, call).out - expected).abs().max() < 1e-10
    q, k, v = (x.float() for x in qkv)
    assert (STATE.attend(q, k, v, call).out - expected).abs().max() < 1e-5


def test_masked_keys_are_not_in_the_state() -> None:
    grid = GRIDS[1]
    (q, k, v), mask = inputs(grid), a_key_mask(grid)
    call = AttentionCall(STATE.pattern(grid), key_mask=mask)
    out = STATE.attend(q, k, v, call).out
    hidden = ~mask[:, :, None, None]
    poisoned = STATE.attend(q, k.masked_fill(hidden, 1e6), v.masked_fill(hidden, 1e6), call).out
    assert torch.equal(out, poisoned)


def test_few_keys_far_away_are_not_lost_in_the_subtraction() -> None:
    grid = TokenGrid(2, 16, 16)
    q, k, v = (x.float() for x in inputs(grid))
    k, v = k + 30, v - 30  # far from zero, and only a seventh of the keys is not near
    blocks = random_blocks([64] * 8, kept=0.85, partial=0, seed=2)
    out, lse = linear_attention.attend_cumulants(q, k, v, blocks, 0.25)
    expected, expected_lse = linear_attention_reference.attend_cumulants(
        q.double(), k.double(), v.double(), blocks, 0.25
    )
    seen = ~expected_lse.isinf()
    assert seen.any() and (out - expected).abs().max() < 1e-3
    assert (lse - expected_lse)[seen].abs().max() < 1e-3


def test_outlier_channels_stay_bounded() -> None:
    grid = GRIDS[0]
    q, k, v = (x.float() for x in inputs(grid))
    q, k = with_outliers(q, factor=300), with_outliers(k, factor=300)
    out = diffpatch.attention(q, k, v, grid, STATE)
    reach = v.std() * math.sqrt(2 * math.log(grid.num_tokens)) * 2
    assert torch.isfinite(out).all() and (out - v.mean()).abs().max() < reach + v.abs().max()


def test_queries_that_see_everything_have_nothing_far() -> None:
    grid = GRIDS[1]
    q, k, v = inputs(grid)
    out, lse = linear_attention.attend_cumulants(q, k, v, STATE.pattern(grid).blocks, 0.25)
    text = slice(0, grid.text_before)
    assert not out[:, text].any() and lse[:, text].isinf().all()
    assert not lse[:, grid.text_before :].isinf().any()


def test_queries_that_no_key_answers_get_the_mean_and_finite_gradients() -> None:
    """Nothing is divided by their weights, which are 0, not even where it is thrown away."""
    grid = GRIDS[0]
    q, k, v = (x.requires_grad_() for x in inputs(grid))
    blocks, half = STATE.pattern(grid).blocks, torch.arange(grid.num_tokens) % 2 == 0
    for backend in ("torch", "reference"):
        asked = torch.where(half[:, None, None], -q.abs(), q)
        out = linear_attention.attend_features(asked, k, v, blocks, "relu", backend=backend)
        gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
        assert all(torch.isfinite(x).all() for x in (out, *gradients)), backend
        assert gradients[2].abs().sum() > 0 and not gradients[0][:, half].any()


def test_as_many_groups_at_once_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, batch, key_heads = STATE.pattern(GRIDS[1]).blocks, 5, 2
    shape = (batch, blocks.num_tokens, key_heads)
    left, right = (torch.randn(*shape, size, dtype=torch.float64) for size in (3, 4))
    # Keys, values and queries of a group, and its sums twice, in fp64.
    held = {
        one.rows.shape[1]: 8 * batch * key_heads
        * ((one.near.shape[1] + one.rows.shape[1]) * (3 + 4) + 2 * 3 * 4)
        for one in groups(blocks).batches
    }  # fmt: skip
    whole = list(linear_attention._far_sums(left, right, blocks))
    limit = 2 * max(held.values())
    monkeypatch.setattr(linear_attention, "HELD_BYTES", {"cpu": limit})
    pieces = list(linear_attention._far_sums(left, right, blocks))
    for rows, *_ in pieces:
        assert len(rows) * held[rows.shape[1]] <= limit
    assert len(pieces) == len(whole) + 1 and any(len(rows) == 2 for rows, *_ in pieces)
    total, again = (sum(float(one[2].square().sum()) for one in made) for made in (whole, pieces))
    assert again == pytest.approx(total)


def test_a_group_is_the_tiles_that_visit_the_same() -> None:
    plan = groups(STATE.pattern(GRIDS[1]).blocks)
    rows = torch.cat([b.rows[b.rows_ok] for b in plan.batches])
    assert sorted(rows.tolist()) == list(range(5, 269))  # every token but the text, once
    dense = linear_attention_reference.left_out(STATE.pattern(GRIDS[1]).blocks)
    for batch in plan.batches:
        for row, near, ok in zip(batch.rows[:, 0], batch.near, batch.near_ok, strict=True):
            far = set(plan.pool.tolist()) - set(near[ok].tolist())
            assert far == set(dense[row].nonzero().flatten().tolist())
    with pytest.raises(ValueError, match="2 patterns"):
        groups(random_blocks([8, 8], heads=[0, 1]))


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


def cost(frames: int, method: Linear) -> tuple[int, int]:
    """Floating-point operations and the largest tensor of a call over frames×8×8 tokens."""
    grid = TokenGrid(frames, 8, 8)
    q, k, v = random_qkv(1, grid.num_tokens, 1, 16)
    call = AttentionCall(method.pattern(grid))
    method.attend(q, k, v, call)  # plans are made once

    def flash(query: Any, key: Any, *_: Any, **__: Any) -> int:
        return int(4 * math.prod(query[:-1]) * key[-2] * key[-1])

    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    flops = FlopCounterMode(display=False, custom_mapping={operator: flash})
    with flops, Largest() as largest:
        method.attend(q, k, v, call)
    return flops.get_total_flops(), largest.bytes


def test_cost_and_memory_grow_as_the_tokens() -> None:
    method = Linear(far="state", near=128)
    small, large = cost(48, method), cost(192, method)
    assert large[0] < 5 * small[0]  # windows are whole tiles, so not quite 4
    assert large[1] < 4.4 * small[1]
    assert cost(192, Linear())[0] > 10 * cost(48, Linear())[0]  # the default is not linear


def test_the_window_keeps_its_size() -> None:
    for grid in (TokenGrid(21, 30, 52), TokenGrid(21, 45, 80), TokenGrid(41, 60, 104)):
        seen = Linear(far="state", near=2048).pattern(grid).kept * grid.num_tokens
        assert 1024 < seen < 4096


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"far": "moon"}, "one of pool, state, elu"),
        ({"near": -1}, "near=-1"),
        ({"near": 0.5}, "near=0.5"),
    ],
)
def test_bad_parameters(params: dict[str, Any], message: str) -> None:
    with pytest.raises(BadParameter, match=message):
        diffpatch.make_method("linear", **params)


def test_virtual_tokens_of_one_key_leave_a_level_of_quality_no_choice() -> None:
    with pytest.raises(BadParameter, match="pool=1"):
        diffpatch.patch(wan().pipe, "linear", pool=1, quality="high")


def test_a_pipeline_runs_with_a_state() -> None:
    tiny = wan()
    before = tiny.run()
    with diffpatch.patched(tiny.pipe, "linear", far="state", near=6, dense_steps=0):
        changed = tiny.run()
        report = diffpatch.report(tiny.pipe)
    assert report.kept < 0.7 and report.dense_calls == 0
    assert torch.isfinite(changed).all() and not torch.equal(changed, before)
    assert torch.equal(tiny.run(), before)
