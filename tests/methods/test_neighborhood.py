"""Neighborhood attention against its rule by brute force; heads, layers, tiles, discs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import diffpatch
from diffpatch import BadParameter, Disc, Neighborhood, SlidingTile, TokenGrid
from diffpatch.cli.parameters import method_parameters
from diffpatch.methods.neighborhood import entropy_scale
from tests.brute import GRIDS, Position, brute_force, check, gna

NEIGHBORHOODS = [
    (Neighborhood(window=(3, 3, 5), stride=1), TokenGrid(3, 5, 7)),
    (Neighborhood(window=(2, 4, 4), stride=(1, 2, 3)), TokenGrid(5, 4, 9, text_before=6)),
    (Neighborhood(window=(-1, 3, 2), stride=1), TokenGrid(4, 7, 6, text_after=11)),
    (Neighborhood(window=(2, 3, 3), stride=1, dilation=(2, 2, 1)), TokenGrid(5, 7, 6)),
    (Neighborhood(window=(3, 2, 4), stride=1, causal=(True, False, False)), TokenGrid(7, 5, 6)),
    (Neighborhood(window=(1, 6, 6), stride=(1, 6, 6)), TokenGrid(1, 13, 11, 3, 2)),
    (Neighborhood(window=(4, 4, 4), stride=(2, 3, 4), causal=True), TokenGrid(6, 7, 9)),
]


@pytest.mark.parametrize(("method", "grid"), NEIGHBORHOODS, ids=lambda x: str(x)[:60])
def test_neighborhood_is_gna(method: Neighborhood, grid: TokenGrid) -> None:
    windows = [n if w == -1 else int(w) for w, n in zip(method.window, grid.shape, strict=True)]  # type: ignore[arg-type]
    triples = [
        value if isinstance(value, tuple) else (value,) * 3
        for value in (method.stride, method.dilation, method.causal)
    ]
    strides, dilations, causal = triples

    def rule(q: Position, k: Position) -> bool:
        axes = zip(q, k, grid.shape, windows, strides, dilations, causal, strict=True)
        return all(gna(a, b, n, w, int(s), int(d), bool(c)) for a, b, n, w, s, d, c in axes)

    check(method.pattern(grid), brute_force(grid, rule))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_query_of_a_neighborhood_sees_the_same_number_of_keys(grid: TokenGrid) -> None:
    pattern = Neighborhood(window=0.5, stride=1).pattern(grid)
    visual = pattern.dense()[0][grid.text_before :][: grid.visual_tokens]
    assert visual.sum(1).unique().numel() == 1


def test_groups_of_heads_have_windows_of_their_own() -> None:
    grid = TokenGrid(4, 6, 9, text_before=5)
    parts = [Neighborhood((-1, 2, 3), stride=1), Neighborhood(3, stride=(1, 3, 2))]
    pattern = Neighborhood(heads=tuple(parts)).pattern(grid)
    pattern.blocks.validate()
    masks = [part.pattern(grid).dense()[0] for part in parts]
    assert torch.equal(pattern.dense(), torch.stack(masks))
    assert pattern.kept == pytest.approx(torch.stack(masks).float().mean().item())
    plain = Neighborhood(stride=1, heads=((-1, 2, 3), 3))
    assert torch.equal(plain.pattern(grid).dense()[0], masks[0])


def test_groups_of_heads_spread_over_the_heads_of_the_model() -> None:
    grid = TokenGrid(3, 4, 6)
    method = Neighborhood(heads=(0.4, (-1, 0.3, 0.3), 1))
    q, k, v = torch.randn(3, 2, grid.num_tokens, 6, 8, dtype=torch.float64)
    out = diffpatch.attention(q, k, v, grid, method)
    masks = method.pattern(grid).dense().repeat_interleave(2, 0)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=masks)
    torch.testing.assert_close(out.transpose(1, 2), exact)
    with pytest.raises(BadParameter, match="3 groups of heads do not divide the 4 heads"):
        diffpatch.attention(out[:, :, :4], out[:, :, :4], out[:, :, :4], grid, method)


def test_layers_take_their_settings_in_turn() -> None:
    grid = TokenGrid(5, 7, 6)
    dilated = Neighborhood(2, stride=1, dilation=(2, 3, 3))
    method = Neighborhood(stride=1, layers=(2, dilated, (-1, 3, 3)))
    for layer in range(7):
        one = [Neighborhood(2, stride=1), dilated, Neighborhood((-1, 3, 3), stride=1)][layer % 3]
        pattern = method.pattern(grid, method.variant(layer, step=9))
        assert torch.equal(pattern.dense(), one.pattern(grid).dense())
    assert len({method.variant(layer, 0) for layer in range(7)}) == 3


def test_layers_may_hold_heads_and_nothing_else_nests() -> None:
    grid = TokenGrid(3, 6, 6)
    crossed = Neighborhood(heads=((-1, 2, -1), (-1, -1, 2)))
    method = Neighborhood(layers=(crossed, 0.5))
    assert method.pattern(grid, 0).blocks.num_patterns == 2
    assert method.pattern(grid, 1).blocks.num_patterns == 1
    with pytest.raises(BadParameter, match="nothing else nests"):
        Neighborhood(heads=(0.5, crossed))
    with pytest.raises(BadParameter, match="sharpen is one for all"):
        Neighborhood(layers=(0.5, Neighborhood(sharpen=1.1)))


def test_freeswim_is_an_inward_window_with_a_sharper_softmax() -> None:
    method = Neighborhood.freeswim(30, 52)  # Wan at 480×832
    assert method.window == (-1, 31, 53) and method.stride == 1
    assert method.sharpen == pytest.approx(math.sqrt(math.log(3120, 1560)))
    assert method.pattern(TokenGrid(1, 68, 120)).kept == pytest.approx(31 * 53 / (68 * 120))


def test_the_softmax_is_sharpened() -> None:
    grid = TokenGrid(1, 5, 6)
    q, k, v = torch.randn(3, 1, 30, 2, 8, dtype=torch.float64)
    sharp = diffpatch.attention(q, k, v, grid, "disc", radius=9, sharpen=1.7)
    scaled = diffpatch.attention(q, k, v, grid, "disc", radius=9, scale=1.7 / math.sqrt(8))
    torch.testing.assert_close(sharp, scaled)
    assert entropy_scale(4096, 4096) == 1 < entropy_scale(16384, 4096)
    with pytest.raises(BadParameter, match="must both be at least 2"):
        entropy_scale(1, 10)


@pytest.mark.parametrize(
    ("radius", "kept"),
    [(8, (0.042, 0.011, 0.0029)), (16, (0.155, 0.043, 0.0115)), (32, (0.482, 0.156, 0.0438))],
)
def test_a_disc_keeps_what_clear_keeps(radius: int, kept: tuple[float, ...]) -> None:
    for side, share in zip((64, 128, 256), kept, strict=True):
        pattern = Disc(radius=radius).pattern(TokenGrid(1, side, side))
        assert pattern.kept == pytest.approx(share, rel=0.02)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_disc_is_round_and_cut_off_at_the_edges(grid: TokenGrid) -> None:
    def rule(q: Position, k: Position) -> bool:
        return (q[1] - k[1]) ** 2 + (q[2] - k[2]) ** 2 < 9

    pattern = Disc(radius=3).pattern(grid)
    pattern.blocks.validate()
    check(pattern, brute_force(grid, rule))


def test_sliding_tiles_keep_what_the_paper_keeps() -> None:
    grid = TokenGrid(30, 48, 80)  # 5×6×10 tiles
    for window, kept in (((3, 3, 3), 27 / 300), ((5, 5, 5), 125 / 300), ((5, 6, 1), 30 / 300)):
        pattern = SlidingTile(window=window).pattern(grid)
        assert pattern.kept == pytest.approx(kept) and not (pattern.blocks.mask_ids >= 0).any()
    # On a grid that tiles divide it is Neighborhood with a stride of one tile.
    sta = SlidingTile(window=3, tile=(2, 4, 4)).pattern(TokenGrid(8, 16, 12))
    gna = Neighborhood(window=(6, 12, 12), stride=(2, 4, 4)).pattern(TokenGrid(8, 16, 12))
    assert torch.equal(sta.dense(), gna.dense())


@pytest.mark.parametrize(
    ("name", "texts", "expected"),
    [
        ("sliding_tile", ["tile=4,4,8", "window=3"], SlidingTile(window=3, tile=(4, 4, 8))),
        ("disc", ["radius=16", "time=0.5"], Disc(radius=16, time=0.5)),
        ("neighborhood", ["layers=0.3,(2,3,3)"], Neighborhood(layers=(0.3, (2, 3, 3)))),
        ("neighborhood", ["heads=(-1,0.5,0.5),(0.3,-1,-1)", "sharpen=1.05"],
         Neighborhood(heads=((-1, 0.5, 0.5), (0.3, -1, -1)), sharpen=1.05)),
    ],
)  # fmt: skip
def test_the_command_line_spells_all_forms(name: str, texts: list[str], expected: Any) -> None:
    assert diffpatch.make_method(name, **method_parameters(name, texts)) == expected
