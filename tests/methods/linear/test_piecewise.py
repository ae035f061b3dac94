"""Virtual tokens, piecewise attention and the tail cache, against their formulas in fp64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import diffpatch
from diffpatch import BadParameter, Linear, Temporal, TokenGrid, UnknownMethod, Window
from diffpatch.kernels.merge import merge
from diffpatch.methods.base import AttentionCall
from diffpatch.patterns.build import complement
from tests.tiny import wan

GRIDS = [TokenGrid(5, 7, 9), TokenGrid(4, 6, 11, text_before=5), TokenGrid(1, 13, 17, text_after=3)]
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def structured(grid: TokenGrid, dtype: torch.dtype = torch.float64, heads: int = 2) -> Tensors:
    """q, k, v (2, S, H, 16) with smooth content, so that pooling means something."""
    generator = torch.Generator().manual_seed(1)
    place = torch.linspace(0, 6, grid.num_tokens, dtype=torch.float64)
    wave = torch.stack([(place * f).sin() for f in range(1, 17)], -1)
    noise = torch.randn(3, 2, grid.num_tokens, heads, 16, generator=generator, dtype=torch.float64)
    q, k, v = (wave[None, :, None] + 0.3 * noise).to(dtype).unbind()
    return q, k, v


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def by_formula(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: TokenGrid, method: Linear,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The definition, one softmax over the exact keys and the virtual tokens of every query."""
    pattern = method.pattern(grid)
    keep, blocks = pattern.dense()[0], pattern.blocks
    scale = q.shape[-1] ** -0.5
    out = torch.empty_like(q)
    starts, order = blocks.starts.tolist(), blocks.order
    for b in range(q.shape[0]):
        alive = torch.ones(grid.num_tokens, dtype=torch.bool) if key_mask is None else key_mask[b]
        for h in range(q.shape[2]):
            scores = (q[b, :, h] @ k[b, :, h].T * scale).masked_fill(~(keep & alive), -math.inf)
            columns, values = [scores], [v[b, :, h]]
            for start, end in itertools.pairwise(starts):
                parts = -(-(end - start) // method.pool)
                cuts = [start + (end - start) * p // parts for p in range(parts + 1)]
                for first, last in itertools.pairwise(cuts):
                    piece = order[first:last]
                    seen = keep[:, piece].any(1)
                    piece = piece[alive[piece]]
                    if not len(piece):
                        continue
                    mean = k[b, piece, h].mean(0)
                    bias = torch.tensor(math.log(len(piece)), dtype=q.dtype)
                    score = q[b, :, h] @ mean * scale + bias
                    if method.second_order:
                        spread = (k[b, piece, h] - mean).square().mean(0)
                        second = 0.5 * scale**2 * (q[b, :, h].square() @ spread)
                        score = score + second.clamp(max=float(bias))
                    columns.append(score.masked_fill(seen, -math.inf)[:, None])
                    values.append(v[b, piece, h].mean(0)[None])
            out[b, :, h] = torch.cat(columns, 1).softmax(1) @ torch.cat(values)
    return out


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_piecewise_attention_is_its_formula(grid: TokenGrid, second_order: bool) -> None:
    method = Linear(kept=0.2, pool=7, second_order=second_order)
    q, k, v = structured(grid)
    expected = by_formula(q, k, v, grid, method)
    for backend in ("reference", "torch"):
        out = diffpatch.attention(q, k, v, grid, method, backend=backend)
        assert error(out, expected) < 1e-6  # scores of virtual tokens are held in fp32


def test_masked_keys_do_not_enter_the_means() -> None:
    grid, method = GRIDS[0], Linear(kept=0.2, pool=7)
    q, k, v = structured(grid)
    key_mask = torch.rand(2, grid.num_tokens, generator=torch.Generator().manual_seed(0)) < 0.7
    call = AttentionCall(method.pattern(grid), key_mask=key_mask, backend="reference")
    out = method.attend(q, k, v, call).out
    assert error(out, by_formula(q, k, v, grid, method, key_mask)) < 1e-6
    poisoned = v.masked_fill(~key_mask[:, :, None, None], 1e6)
    assert torch.equal(method.attend(q, k, poisoned, call).out, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_a_run_is_dense_attention(dtype: torch.dtype) -> None:
    q, k, v = structured(GRIDS[1], dtype)
    out = diffpatch.attention(q, k, v, GRIDS[1], "linear", kept=0.1, pool=1)
    assert error(out, dense(q.double(), k.double(), v.double())) < (
        1e-6 if dtype.itemsize == 4 else 1e-2
    )


def test_outlier_channels_do_not_blow_up_the_second_order() -> None:
    grid = GRIDS[0]
    q, k, v = structured(grid, torch.float32)
    q[..., 3], k[..., 3] = q[..., 3] * 300, k[..., 3] * 300
    out = diffpatch.attention(q, k, v, grid, "linear", kept=0.1, pool=16)
    assert torch.isfinite(out).all()
    assert out.abs().max() <= v.abs().max() + 1e-4  # a convex combination of values


def test_summarising_beats_dropping_at_the_same_cost() -> None:
    grid = TokenGrid(6, 12, 16)
    q, k, v = structured(grid, torch.float32)
    target = dense(q, k, v)
    linear = Linear(kept=0.12, pool=16)
    dropping = Window(window=(3, 6, 16), shift="none")
    assert linear.pattern(grid).kept <= dropping.pattern(grid).kept
    kept_error = error(diffpatch.attention(q, k, v, grid, linear), target)
    assert kept_error < 0.5 * error(diffpatch.attention(q, k, v, grid, dropping), target)


def test_temporal_is_dense_while_nothing_changes() -> None:
    grid, method = GRIDS[1], Temporal(over=Window(window=(-1, 2, 3)), refresh=3)
    q, k, v = structured(grid)
    target, state = dense(q, k, v), {}  # type: ignore[var-annotated]
    for step in range(5):
        out = diffpatch.attention(q, k, v, grid, method, step=step, state=state)
        assert error(out, target) < 1e-5


def test_temporal_follows_its_formula_and_refreshes() -> None:
    grid, window = GRIDS[0], Window(window=(-1, 2, 3))
    method = Temporal(over=window, refresh=3)
    q, k, v = structured(grid)
    g = torch.Generator().manual_seed(5)
    q2, k2, v2 = (t + 0.2 * torch.randn(t.shape, generator=g, dtype=t.dtype) for t in (q, k, v))
    keep = window.pattern(grid).dense()[0]
    scale = q.shape[-1] ** -0.5

    def parts(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, mask: torch.Tensor) -> Tensors:
        scores = torch.einsum("bqhd,bkhd->bhqk", a, b) * scale
        scores = scores.masked_fill(~mask, -math.inf)
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).nan_to_num(), c)
        return out, scores.logsumexp(-1).transpose(1, 2), scores

    far, far_lse, _ = parts(q, k, v, ~keep)  # what the first step leaves out
    near, near_lse, _ = parts(q2, k2, v2, keep)
    share = (near_lse - far_lse).sigmoid()[..., None]
    state: dict[str, object] = {}
    diffpatch.attention(q, k, v, grid, method, step=0, state=state)
    out = diffpatch.attention(q2, k2, v2, grid, method, step=1, state=state)
    assert error(out, share * near + (1 - share) * far) < 1e-5
    out = diffpatch.attention(q2, k2, v2, grid, method, step=3, state=state)
    assert error(out, dense(q2, k2, v2)) < 1e-5  # refreshed


@pytest.mark.parametrize(
    "method",
    [
        Window(window=(2, 3, 4)),
        diffpatch.Neighborhood(window=(3, 3, 5), stride=1),
        diffpatch.Radial(),
    ],
    ids=lambda m: m.name,
)
def test_a_complement_is_what_is_left_out(method: diffpatch.Method) -> None:
    for grid in (TokenGrid(5, 7, 9, text_before=4), TokenGrid(3, 6, 11, text_after=130)):
        pattern = method.pattern(grid)
        rest = complement(pattern)
        assert torch.equal(rest.dense(), ~pattern.dense())
        assert rest.kept == pytest.approx(1 - pattern.kept, abs=1e-9)


def test_merging_nothing_with_nothing_is_nothing() -> None:
    out, lse = torch.zeros(1, 1, 1, 4), torch.full((1, 1, 1), -math.inf)
    merged, total = merge(out, lse, out, lse)
    assert torch.equal(merged, out) and torch.equal(total, lse)


def test_temporal_state_belongs_to_layer_branch_and_run() -> None:
    tiny = wan()
    options = {"window": (-1, 1, 2), "dense_steps": 0, "refresh": 2}
    with diffpatch.patched(tiny.pipe, "window+temporal", **options):
        first = tiny.run(num_inference_steps=5)
        report = diffpatch.report(tiny.pipe)
        refreshed = [k == 1 for k in report.kept_per_step]
        assert refreshed == [True, False, True, False, True]
        # 2 layers × 2 branches × 24 tokens × 2 heads × (12 values + 1 log-sum-exp) × 4 bytes
        assert report.state_bytes == 2 * 2 * 24 * 2 * 13 * 4
        tiny.run(num_inference_steps=3, prompt="dog!", height=64)  # another shape and prompt
        assert torch.equal(tiny.run(num_inference_steps=5), first)
        diffpatch.reset(tiny.pipe)
        assert diffpatch.report(tiny.pipe).state_bytes == 0


def test_a_state_above_the_budget_is_refused() -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, "window+temporal", budget_gib=1e-6, dense_steps=0)
    with pytest.raises(BadParameter, match="raise budget_gib"):
        tiny.run()


def test_combinations_are_spelled_and_checked() -> None:
    made = diffpatch.make_method("window+temporal", window=(1, 2, 3), refresh=5)
    assert made == Temporal(over=Window(window=(1, 2, 3)), refresh=5)
    with pytest.raises(UnknownMethod, match="one of temporal"):
        diffpatch.make_method("temporal+window")
    with pytest.raises(BadParameter, match="leaves nothing out"):
        diffpatch.make_method("linear+temporal")
    with pytest.raises(BadParameter, match="no parameter 'windw'"):
        diffpatch.make_method("window+temporal", windw=3)
