"""Packed sequences: each grid by its own method, everything else exact, against brute force."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import diffpatch
from diffpatch import BadParameter, Method, PackedGrid, TokenGrid
from diffpatch.methods.packed import pattern_on
from diffpatch.patterns.drawing import draw
from tests.brute import GRIDS

LAYOUTS = [
    PackedGrid((5, (3, 5, 7), 3, (2, 3, 4))),  # text, a reference, audio, the target last
    PackedGrid(((5, 4, 6), (3, 5, 7), 131)),  # the target first, text in two tiles
    PackedGrid(((1, 7, 5), 1, (4, 3, 5), (3, 5, 7), 2)),  # an image and two videos of other sizes
]
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("radial", {"kept": 0.3}),
    ("radial", {"rule": "published", "decay": 0.05, "sink": False}),
    ("neighborhood", {"window": (0.5, 0.6, 0.6)}),
    ("neighborhood", {"window": (1, 3, 4), "stride": (1, 2, 1)}),
    ("window", {"window": (0.5, 0.5, 0.5)}),
    ("sliding_tile", {"tile": (2, 2, 4), "window": (0.6, 0.6, 0.6)}),
    ("disc", {"radius": 1.0}),
]


def method_of(name: str, params: dict[str, Any]) -> Method:
    return diffpatch.list_methods()[name].cls(**params)


def expected(grid: PackedGrid, method: Method, head: int = 0) -> torch.Tensor:
    """bool (S, S): the pattern of each grid alone on the diagonal, all else seen by all."""
    mask = torch.ones(grid.num_tokens, grid.num_tokens, dtype=torch.bool)
    start = 0
    for span in grid.spans:
        if isinstance(span, int):
            start += span
            continue
        own = TokenGrid(*span)
        if own.num_frames > 1 or "image" in method.kinds:
            dense = method.pattern(own, method.variant(0, 0)).dense()
            end = start + own.num_tokens
            mask[start:end, start:end] = dense[min(head, len(dense) - 1)]
        start += own.num_tokens
    return mask


@pytest.mark.parametrize("grid", LAYOUTS, ids=str)
@pytest.mark.parametrize(("name", "params"), METHODS, ids=lambda x: str(x))
def test_every_grid_is_sparse_by_itself(
    grid: PackedGrid, name: str, params: dict[str, Any]
) -> None:
    method = method_of(name, params)
    pattern = pattern_on(method, grid, method.variant(0, 0))
    pattern.blocks.validate()
    wanted = expected(grid, method)
    assert torch.equal(pattern.dense()[0], wanted)
    assert pattern.kept == pytest.approx(wanted.float().mean().item(), abs=1e-6)
    if method.name not in ("radial", "disc"):  # which need larger grids to leave anything out
        assert pattern.kept < 1


def test_grids_large_enough_for_every_method() -> None:
    grid = PackedGrid((70, (9, 8, 9), 5, (6, 8, 8)))
    for name, params in (*METHODS[:2], METHODS[-1]):
        method = method_of(name, params)
        pattern = pattern_on(method, grid, None)
        pattern.blocks.validate()
        assert torch.equal(pattern.dense()[0], expected(grid, method)) and pattern.kept < 0.99


def test_heads_with_settings_of_their_own() -> None:
    method = diffpatch.Neighborhood(heads=((0.5, 0.6, 0.6), (1, 3, 3)))
    grid = LAYOUTS[0]
    pattern = pattern_on(method, grid, None).for_heads(4)
    pattern.blocks.validate()
    wanted = torch.stack([expected(grid, method, head) for head in (0, 0, 1, 1)])
    heads = pattern.blocks.head_pattern
    assert heads is not None
    assert torch.equal(pattern.dense()[heads.long()], wanted)
    assert pattern.kept == pytest.approx(wanted.float().mean().item(), abs=1e-6)


def corresponding(position: list[float], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The token of a grid that a relative position (fractions of the axes) falls into."""
    return tuple(
        min(int(fraction * size), size - 1) for fraction, size in zip(position, shape, strict=True)
    )


@pytest.mark.parametrize("grid", LAYOUTS, ids=str)
def test_aligned_grids_see_of_each_other_what_stands_at_their_place(grid: PackedGrid) -> None:
    """Asked for every query token and every key tile, as the rule is written."""
    method = diffpatch.Window(window=(0.5, 0.5, 0.5))
    aligned = PackedGrid(grid.spans, between="aligned")
    pattern = pattern_on(method, aligned, 0)
    pattern.blocks.validate()
    wanted = expected(grid, method)
    spans = [
        (start, TokenGrid(*span), method.pattern(TokenGrid(*span), 0))
        for span, start in zip(grid.spans, grid.starts, strict=True)
        if isinstance(span, tuple)
    ]
    for (q0, q_grid, q_own), (k0, k_grid, k_own) in itertools.permutations(spans, 2):
        keys = k_own.dense()[0]
        key_tiles = tiles(k_own)
        places = list(itertools.product(*map(range, k_grid.shape)))
        for tile in tiles(q_own):
            where = [torch.unravel_index(torch.tensor(t), q_grid.shape) for t in tile]
            middle = [
                (sum(float(w[axis]) for w in where) / len(where) + 0.5) / q_grid.shape[axis]
                for axis in range(3)
            ]
            twin = places.index(corresponding(middle, k_grid.shape))
            twins = next(t for t in key_tiles if twin in t)
            for other in key_tiles:
                seen = bool(keys[twins][:, other].any())
                rows = q0 + torch.tensor(tile)
                wanted[rows[:, None], k0 + torch.tensor(other)] = seen
    assert torch.equal(pattern.dense()[0], wanted)
    assert pattern.kept == pytest.approx(wanted.float().mean().item(), abs=1e-6)


def tiles(pattern: Any) -> list[list[int]]:
    """The tokens of every tile."""
    starts = pattern.blocks.starts.tolist()
    return [pattern.blocks.order[a:b].tolist() for a, b in itertools.pairwise(starts)]


@pytest.mark.parametrize("method", ["neighborhood", "linear", "neighborhood+temporal"])
@pytest.mark.parametrize("between", ["exact", "aligned"])
def test_attention_over_a_packed_sequence(method: str, between: str) -> None:
    grid = PackedGrid(LAYOUTS[0].spans, between)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, grid.num_tokens, 2, 16, dtype=torch.float64) for _ in range(3))
    params: dict[str, Any] = {"kept": 0.5} if method == "linear" else {"window": (0.5, 0.6, 0.6)}
    state: dict[str, Any] = {}
    if "temporal" in method:  # which begins a run with everything
        diffpatch.attention(k, q, v, grid, method, backend="torch", state=state, **params)
    out = diffpatch.attention(q, k, v, grid, method, backend="torch", state=state, step=1, **params)
    assert torch.isfinite(out).all()
    text = grid.is_text(torch.arange(grid.num_tokens))
    dense = under(q, k, v)
    assert torch.allclose(out[:, text], dense[:, text])
    assert not torch.allclose(out[:, ~text], dense[:, ~text])
    if method == "neighborhood":
        mask = pattern_on(diffpatch.Neighborhood(**params), grid, None).dense()[0]
        assert torch.allclose(out, under(q, k, v, mask))


def under(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention as torch has it; (B, S, H, D)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


def test_pictures_of_a_packed_sequence() -> None:
    grid = LAYOUTS[0]
    pattern = pattern_on(diffpatch.Window(window=(0.5, 0.5, 0.5)), grid, 0)
    assert draw(pattern, "tiles").size[0] > 100
    for kind in ("query", "distance"):
        with pytest.raises(BadParameter, match="has 2 grids and this picture shows one"):
            draw(pattern, kind)


def test_virtual_tokens_of_each_grid_are_counted() -> None:
    method, grid = diffpatch.Linear(kept=0.3), LAYOUTS[2]
    pattern = pattern_on(method, grid, None)
    own = [method.pattern(g) for g in grid.grids]
    apart = sum(p.kept * g.num_tokens**2 for p, g in zip(own, grid.grids, strict=True))
    inside = sum(g.num_tokens**2 for g in grid.grids)
    wanted = (apart + grid.num_tokens**2 - inside) / grid.num_tokens**2
    assert pattern.kept == pytest.approx(wanted, abs=1e-6)


def test_one_grid_is_a_token_grid() -> None:
    for grid in GRIDS:
        spans = [n for n in (grid.text_before, grid.shape, grid.text_after) if n]
        packed = PackedGrid(tuple(spans))
        assert packed.simplest() == grid and packed.num_tokens == grid.num_tokens
        index = torch.arange(grid.num_tokens)
        assert torch.equal(packed.is_text(index), grid.is_text(index))
        for frames in (0, 1, 9):
            mine, its = (g.in_first_frames(index, frames) for g in (packed, grid))
            assert torch.equal(mine, its)
    assert LAYOUTS[0].simplest() is LAYOUTS[0]
    two = PackedGrid((4, 5, (2, 3, 4), 1, 2))
    assert two.simplest() == TokenGrid(2, 3, 4, text_before=9, text_after=3)


@pytest.mark.parametrize(
    ("spans", "said"),
    [
        ((), "hold no grid"),
        ((7, 3), "hold no grid"),
        ((0, (2, 3, 4)), "span 0 of a PackedGrid must be"),
        (((2, 3),), r"span \(2, 3\) of a PackedGrid must be"),
        (((2, 0, 4),), r"span \(2, 0, 4\)"),
        ((4.0, (2, 3, 4)), "span 4.0"),
        ((True, (2, 3, 4)), "span True"),
        (5, "spans=5 of a PackedGrid must be a list"),
    ],
)
def test_layouts_that_do_not_add_up(spans: Any, said: str) -> None:
    with pytest.raises(BadParameter, match=said):
        PackedGrid(spans)


def test_other_mistakes_are_named() -> None:
    with pytest.raises(BadParameter, match="between='near' of a PackedGrid must be 'exact' or"):
        PackedGrid((3, (2, 3, 4)), between="near")
    grid = LAYOUTS[0]
    q = torch.zeros(1, grid.num_tokens + 1, 1, 16)
    with pytest.raises(BadParameter, match=f"has {grid.num_tokens} tokens: q has {len(q[0])}"):
        diffpatch.attention(q, q, q, grid, "neighborhood", window=(0.5, 0.6, 0.6))
