"""Methods whose size follows from a fraction: they keep that fraction of the pairs of any grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import diffpatch
from diffpatch import BadParameter, Disc, Neighborhood, SlidingTile, TokenGrid, Window
from diffpatch.methods import axis
from diffpatch.planning.fit import kept_of

VIDEO, IMAGE, ODD = TokenGrid(21, 30, 52), TokenGrid(1, 64, 64), TokenGrid(13, 17, 19)
NAMES = ["neighborhood", "sliding_tile", "disc", "window"]


@pytest.mark.parametrize("kept", [0.5, 0.3, 0.125])
@pytest.mark.parametrize("name", NAMES)
def test_a_fraction_is_met_on_every_grid(name: str, kept: float) -> None:
    method = diffpatch.make_method(name, kept=kept)
    # Tiles of 6×8×8 are few on an odd small grid.
    near = {VIDEO: 0.1, IMAGE: 0.1, ODD: 0.35 if name == "sliding_tile" else 0.1}
    for grid, rel in near.items():
        assert kept_of(method, grid) == pytest.approx(kept, rel=rel), grid


def test_the_whole_is_kept_where_all_is_asked_for() -> None:
    for name in NAMES:
        assert diffpatch.make_method(name, kept=1.0).pattern(ODD, 0).kept == 1.0


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (Neighborhood(stride=1, kept=0.25), 0.25),
        (Neighborhood(stride=1, dilation=2, kept=0.1), 0.1),
        (Neighborhood(stride=1, causal=(True, False, False), kept=0.2), 0.2),
        (Window(kept=0.25, shift="none"), 0.25),
        (Disc(kept=0.4), 0.4),
        (SlidingTile(kept=0.34, tile=(2, 2, 2)), 0.34),
    ],
)
def test_what_is_kept_is_what_a_dense_mask_says(method: Any, expected: float) -> None:
    grid = TokenGrid(10, 8, 8)
    mask = method.pattern(grid, method.variant(0, 0)).dense()
    assert mask.float().mean().item() == pytest.approx(expected, rel=0.07)


def test_text_is_seen_beside_the_fraction() -> None:
    grid = TokenGrid(1, 32, 32, text_before=64)
    pattern = Neighborhood(kept=0.25).pattern(grid)
    mask = pattern.dense()[0][64:, 64:]
    assert mask.float().mean().item() == pytest.approx(0.25, rel=0.05)


def test_of_equally_near_boxes_the_most_even_one_is_taken() -> None:
    sizes = {size: size / 8 for size in range(1, 9)}
    assert axis.box([sizes] * 3, 1 / 8) == (4, 4, 4)
    assert axis.box([{1: 1.0}, sizes, sizes], 1 / 4) == (1, 4, 4)
    assert axis.box([{1: 0.25, 4: 1.0}, sizes, sizes], 1 / 16) in ((1, 4, 4), (4, 2, 2))


@pytest.mark.parametrize("name", NAMES)
def test_fractions_that_cannot_be_are_refused(name: str) -> None:
    for wrong in (0.0, -0.1, 1.5, float("nan")):
        with pytest.raises(BadParameter, match=rf"{name}: kept="):
            diffpatch.make_method(name, kept=wrong)


def test_a_fraction_stands_for_all_heads_and_layers() -> None:
    with pytest.raises(BadParameter, match="None where heads or layers have windows of their own"):
        Window(heads=((-1, 2, -1), (-1, -1, 2)), kept=0.3)
    with pytest.raises(BadParameter, match="None where heads or layers have windows of their own"):
        Neighborhood(layers=(0.3, 0.5), kept=0.3)
    assert Neighborhood(layers=(0.3, 0.5)).with_kept(0.3) == Neighborhood(kept=0.3)


def test_attention_over_a_fraction_is_attention_over_its_mask() -> None:
    grid = TokenGrid(4, 8, 8)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, grid.num_tokens, 2, 16, dtype=torch.float64)
    for name in NAMES:
        mask = diffpatch.make_method(name, kept=0.4).pattern(grid, 0).dense()
        x, y, z = (x.transpose(1, 2) for x in (q, k, v))
        dense = torch.nn.functional.scaled_dot_product_attention(x, y, z, attn_mask=mask)
        found = diffpatch.attention(q, k, v, grid, name, kept=0.4)
        torch.testing.assert_close(found.transpose(1, 2), dense)
