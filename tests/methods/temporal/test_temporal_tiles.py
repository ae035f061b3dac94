"""The temporal modes that remember decisions, against their rules by brute force."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffpatch import BadParameter, Dense, Method, Neighborhood, Temporal, TokenGrid, Window
from diffpatch.kernels.active_tiles import api as active_tiles
from diffpatch.kernels.active_tiles import reference as active_tiles_reference
from diffpatch.kernels.active_tiles.api import tile_table
from diffpatch.kernels.block_sparse import reference as block_sparse_reference
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.selection.api import tile_scores
from diffpatch.methods.base import AttentionCall
from diffpatch.methods.selection import always
from diffpatch.methods.temporal import mask as temporal_mask
from tests.kernels.random_blocks import random_blocks

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def drifting(grid: TokenGrid, steps: int, seed: int, sharp: float = 4.0) -> list[Tensors]:
    """fp64 q, k, v of a few steps, (2, S, 4 or 2, 8), each a little off the one before."""
    random = torch.Generator().manual_seed(seed)

    def noise(heads: int) -> torch.Tensor:
        return torch.randn(2, grid.num_tokens, heads, 8, generator=random, dtype=torch.float64)

    now = [sharp * noise(4), noise(2), noise(2)]
    out = []
    for _ in range(steps):
        out.append((now[0], now[1], now[2]))
        now = [x + 0.2 * noise(x.shape[2]) for x in now]
    return out


def tiles_of(blocks: BlockIndex) -> list[torch.Tensor]:
    """The tokens of every tile."""
    return [blocks.order[a:b] for a, b in itertools.pairwise(blocks.starts.tolist())]


class LiteAttention:
    """The rule of arXiv 2511.11062 over scores: skip[b, h, i, j] for query tile i and key tile j.

    Args:
        seen: bool (4, S, S), the mask of the wrapped method, for each head.
        frames: first frames whose keys no rule leaves out.
    """

    def __init__(
        self, grid: TokenGrid, blocks: BlockIndex, seen: torch.Tensor, frames: int
    ) -> None:
        self.tiles, self.seen = tiles_of(blocks), seen
        count = len(self.tiles)
        self.skip = torch.zeros(2, 4, count, count, dtype=torch.bool)
        self.fixed = torch.eye(count, dtype=torch.bool)
        end = grid.text_before + grid.visual_tokens
        for i, tile in enumerate(self.tiles):
            if bool(((tile < grid.text_before) | (tile >= end)).any()):
                self.fixed[i] = self.fixed[:, i] = True
            if frames and bool((tile < grid.text_before + frames * grid.frame_tokens).any()):
                self.fixed[:, i] = True

    def __call__(
        self, tensors: Tensors, threshold: float, reverse: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The output, and the pairs of tokens that were computed, bool (B, H, S, S)."""
        q, k, v = (x.repeat_interleave(4 // x.shape[2], 2) for x in tensors)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~self.seen, -math.inf)
        computed = torch.zeros_like(scores, dtype=torch.bool)
        order = list(range(len(self.tiles)))
        for i, rows in enumerate(self.tiles):
            top = torch.full((2, 4, len(rows)), -math.inf, dtype=q.dtype)
            for j in reversed(order) if reverse else order:
                keys = self.tiles[j]
                visits = ~self.skip[:, :, i, j] & self.seen[:, rows][:, :, keys].any((1, 2))
                computed[:, :, rows[:, None], keys] = visits[..., None, None]
                largest = scores[:, :, rows][..., keys].amax(-1)
                low = (largest == -math.inf) | ((largest - top) / math.log(2) <= threshold)
                if not self.fixed[i, j]:
                    self.skip[:, :, i, j] |= visits & low.all(-1)
                top = torch.maximum(top, largest.where(visits[..., None], -math.inf))
        computed &= self.seen
        weights = scores.masked_fill(~computed, -math.inf).softmax(-1).nan_to_num()
        return torch.einsum("bhqk,bkhd->bqhd", weights, v), computed


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(2, 6)),
    before=st.integers(0, 5),
    after=st.integers(0, 3),
    threshold=st.sampled_from([-6.0, -1.0, 0.0, (-9.0, -2.0, 0.0), (0.0, -3.0, -9.0)]),
    order=st.sampled_from(["forward", "reverse", "alternate"]),
    over=st.sampled_from([Dense(tile=16), Window.cross(0.5), Neighborhood(window=0.6)]),
    frames=st.integers(0, 1),
    seed=st.integers(0, 99),
)
def test_skip_is_the_rule_of_liteattention(
    shape: tuple[int, int, int], before: int, after: int,
    threshold: float | tuple[float, ...], order: str, over: Method, frames: int, seed: int,
) -> None:  # fmt: skip
    grid = TokenGrid(*shape, before, after)
    method = Temporal(
        over=over, mode="skip", threshold=threshold, refresh=3, order=order, keep_frames=frames
    )
    pattern = method.pattern(grid, method.variant(0, 0)).for_heads(4)
    blocks, table = pattern.blocks, tile_table(pattern.blocks)
    of_head = table.pattern.expand(4)
    seen = pattern.dense()[of_head]
    place = of_head[:, None], torch.arange(table.length)
    state: dict[str, Any] = {}
    since, thresholds = 0, threshold if isinstance(threshold, tuple) else (threshold,) * 3
    for step, tensors in enumerate(drifting(grid, 5, seed)):
        now, last = thresholds[step * 3 // 5], thresholds[max(step - 1, 0) * 3 // 5]
        if step - since in (0, 3) or now < last:
            rule, since = LiteAttention(grid, blocks, seen, frames), step
        reverse = order == "reverse" or (order == "alternate" and step % 2 == 1)
        expected, computed = rule(tensors, now, reverse)
        done = method.attend(*tensors, AttentionCall(pattern, step=step, total=5, state=state))
        assert torch.allclose(done.out, expected, atol=1e-12)
        assert float(done.kept) == pytest.approx(computed.double().mean().item(), abs=1e-7)
        if step == since:
            assert torch.equal(computed, seen.expand_as(computed))
        bits = active_tiles.unpack(state["bits"], table.length)
        skipped = rule.skip[:, torch.arange(4)[:, None], table.query[place], table.key[place]]
        assert torch.equal(bits, ~skipped & table.valid())


def test_skip_leaves_out_more_and_more_until_the_recheck() -> None:
    grid = TokenGrid(4, 6, 6, text_before=3)
    method = Temporal(over=Dense(tile=16), mode="skip", threshold=-1.0, refresh=3)
    pattern, state = method.pattern(grid), dict[str, Any]()
    kept = [
        float(method.attend(*tensors, AttentionCall(pattern, step=step, state=state)).kept)
        for step, tensors in enumerate(drifting(grid, 4, seed=1))
    ]
    assert kept[0] == kept[3] == 1.0 > kept[1] > kept[2] > 0.1
    assert method.at_most(pattern) and method.kept_at(pattern, 1) == 1.0
    with pytest.raises(BadParameter, match="give only one"):
        Temporal(over=Dense(), mode="skip", threshold=(-3.0, -2.0, -1.0)).attend(
            *drifting(grid, 1, seed=1)[0], AttentionCall(pattern)
        )


def tile_masses(
    q: torch.Tensor, k: torch.Tensor, blocks: BlockIndex, seen: torch.Tensor
) -> torch.Tensor:
    """The exact share of attention, (B, H, N, N): the mean over the rows of the softmax's sums."""
    groups = q.shape[2] // k.shape[2]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(groups, 2)) * 0.3
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num()
    tiles = tiles_of(blocks)
    rows = torch.stack([weights[:, :, t].mean(2) for t in tiles], 2)
    return torch.stack([rows[..., t].sum(-1) for t in tiles], -1)


def tile_importance(
    q: torch.Tensor, k: torch.Tensor, blocks: BlockIndex, scale: float, **options: Any
) -> torch.Tensor:
    """The mass of tiles, which values have no part in."""
    return tile_scores(q, k, k, blocks, scale, rule="mass", **options)


def test_importance_is_exact_without_pooling_and_close_with_it() -> None:
    grid = TokenGrid(3, 6, 8, text_after=5)
    blocks = Window(window=(2, 3, 8)).pattern(grid).blocks
    # Neighbouring tokens are alike, as in images: noise at a quarter of the resolution.
    random = torch.Generator().manual_seed(0)
    q, k = (
        torch.nn.functional.interpolate(
            torch.randn(2, h * 6, 37, generator=random), grid.num_tokens, mode="linear"
        ).view(2, h, 6, -1).permute(0, 3, 1, 2) * 3
        for h in (4, 2)
    )  # fmt: skip
    seen = block_sparse_reference.dense_mask(blocks)[0]
    exact = tile_masses(q.double(), k.double(), blocks, _whole_tiles(blocks))
    assert seen.any()
    single = tile_importance(q, k, blocks, 0.3, piece=1)
    assert torch.allclose(single.double(), exact, atol=1e-5)
    pooled = tile_importance(q, k, blocks, 0.3, piece=4)
    fixed = always(blocks, grid, 0)
    chosen, best = (temporal_mask.choose(x.float(), blocks, fixed, 0.6) for x in (pooled, exact))
    table = tile_table(blocks)
    mass = exact[..., table.query[0], table.key[0]]
    assert (mass * chosen).sum() > 0.97 * (mass * best).sum()
    key_mask = torch.rand(2, grid.num_tokens, generator=random) < 0.5
    hidden = tile_importance(q, k, blocks, 0.3, piece=1, key_mask=key_mask)
    masked = _whole_tiles(blocks) & key_mask[:, None, None]
    assert torch.allclose(
        hidden.double(), tile_masses(q.double(), k.double(), blocks, masked), atol=1e-5
    )


def _whole_tiles(blocks: BlockIndex) -> torch.Tensor:
    """bool (S, S): pairs of tokens in visited pairs of tiles, partial ones whole."""
    table, tiles = tile_table(blocks), tiles_of(blocks)
    seen = torch.zeros(blocks.num_tokens, blocks.num_tokens, dtype=torch.bool)
    for i, j in zip(table.query[0].tolist(), table.key[0].tolist(), strict=True):
        seen[tiles[i][:, None], tiles[j]] = True
    return seen


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    kept=st.floats(0.05, 1.0),
    per_head=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_choice_is_the_exact_top_of_every_row(
    sizes: list[int], kept: float, per_head: bool, seed: int
) -> None:
    heads = [0, 1, 1] if per_head else None
    blocks = random_blocks(sizes, kept=0.6, heads=heads, seed=seed)
    table, tiles = tile_table(blocks), len(sizes)
    random = torch.Generator().manual_seed(seed)
    importance = torch.rand(2, 3, tiles, tiles, generator=random)
    pattern = table.pattern.expand(3)
    fixed = (torch.rand(1, table.length, generator=random) < 0.2) & table.valid()
    chosen = temporal_mask.choose(importance, blocks, fixed, kept)
    for b, h, i in itertools.product(range(2), range(3), range(tiles)):
        p = int(pattern[h])
        row = [e for e in range(table.length) if table.area[p, e] > 0 and table.query[p, e] == i]
        is_fixed = fixed.expand(len(table.pattern), -1)[h if per_head else 0]
        must = {e for e in row if is_fixed[e]}
        count = max(len(must), math.ceil(torch.tensor(len(row)).mul(kept).item()))
        rest = sorted(set(row) - must, key=lambda e: -importance[b, h, i, table.key[p, e]])
        expected = must | set(rest[: count - len(must)])
        assert {e for e in range(table.length) if chosen[b, h, e]} & set(row) == expected
    assert not (chosen & ~table.valid()).any()


def test_mask_chooses_now_and_keeps_to_it() -> None:
    grid = TokenGrid(4, 6, 6, text_before=3)
    method = Temporal(over=Dense(tile=16), mode="mask", kept=0.4, refresh=2)
    pattern, state = method.pattern(grid), dict[str, Any]()
    table, chosen = tile_table(pattern.blocks), []
    for step, (q, k, v) in enumerate(drifting(grid, 4, seed=1, sharp=8.0)):
        done = method.attend(q, k, v, AttentionCall(pattern, step=step, state=state))
        active = active_tiles.unpack(state["bits"], table.length)
        chosen.append(active)
        expected, _, _ = active_tiles_reference.attend(
            q, k, v, pattern.blocks, active, 8**-0.5, None, None, False
        )
        assert torch.allclose(done.out, expected, atol=1e-12)
        assert float(done.kept) == pytest.approx(method.kept_at(pattern, step), abs=1e-9)
    assert torch.equal(chosen[0], chosen[1]) and torch.equal(chosen[2], chosen[3])
    assert not torch.equal(chosen[0], chosen[2])
    assert not method.at_most(pattern)


def test_tiles_of_different_sizes_bound_what_mask_keeps() -> None:
    grid = TokenGrid(5, 7, 9, text_after=4)
    method = Temporal(over=Dense(tile=32), mode="mask", kept=0.3)
    pattern = method.pattern(grid)
    assert method.at_most(pattern)
    least, most = temporal_mask.bounds(pattern, 0.3, 0)
    for seed in range(3):
        q, k, v = drifting(grid, 1, seed)[0]
        done = method.attend(q, k, v, AttentionCall(pattern))
        assert least <= float(done.kept) <= most == method.kept_at(pattern, 0)


def test_dense_keeps_everything_in_tiles() -> None:
    for grid in (TokenGrid(3, 5, 7, text_before=2), TokenGrid(1, 9, 9, text_after=130)):
        pattern = Dense(tile=16).pattern(grid)
        assert pattern.kept == 1.0 and bool(pattern.dense().all())
    small, large = TokenGrid(13, 16, 16), TokenGrid(21, 45, 80)
    assert Dense().pattern(small).blocks.starts.diff().max() <= 128
    assert Dense().pattern(large).blocks.starts.diff().max() > 128
