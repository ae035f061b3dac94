"""Every static method on random grids with random parameters, against its rule pair by pair.

Each example checks the pattern element by element, the fraction it says it keeps, its index, and
that attention over it is dense attention under its mask, in fp64, for two batch entries and every
group of heads. Tiles are sometimes made far smaller than real ones, so that small grids have many.
"""

from __future__ import annotations

import itertools
import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from diffpatch import Disc, Method, Neighborhood, Radial, SlidingTile, TokenGrid, Window
from diffpatch.methods.base import AttentionCall
from diffpatch.methods.radial import rules as radial_rules
from diffpatch.patterns.tiles import choose_tile
from tests.brute import Position, Rule, border, brute_force, gna, published_by_hand

random_settings = settings(deadline=None, max_examples=25, derandomize=True)
sides, few = st.integers(1, 5), st.integers(0, 5)
tile_sizes = st.sampled_from([6, 17, 128])
grids = st.builds(TokenGrid, sides, sides, sides, text_before=few, text_after=few)


def check(
    method: Method, grid: TokenGrid, expected: torch.Tensor, tile: int = 128, **place: int
) -> None:
    """That a method attends to `expected`, bool (groups of heads, S, S), and to nothing else."""
    with mock.patch.object(choose_tile, "__defaults__", (tile, None)):
        pattern = method.pattern(grid, method.variant(place.get("layer", 0), place.get("step", 0)))
    pattern.blocks.validate()
    assert torch.equal(pattern.dense(), expected)
    assert pattern.kept == pytest.approx(expected.double().mean().item(), abs=1e-12)
    heads = 2 * len(expected)
    random = torch.Generator().manual_seed(0)
    shape = (3, 2, grid.num_tokens, heads, 4)
    q, k, v = torch.randn(shape, generator=random, dtype=torch.float64)
    spread = pattern.for_heads(heads) if len(expected) > 1 else pattern
    found = method.attend(q, k, v, AttentionCall(spread, backend="torch")).out
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask, scale = expected.repeat_interleave(2, 0), method.softmax_factor() / 2
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    torch.testing.assert_close(found.transpose(1, 2), dense)


def masks(grid: TokenGrid, *rules: Rule) -> torch.Tensor:
    return torch.stack([brute_force(grid, rule) for rule in rules])


def along_axes(tables: list[list[list[bool]]]) -> Rule:
    """The rule that holds where a table [query, key] of every axis does."""

    def rule(q: Position, k: Position) -> bool:
        return all(table[i][j] for table, i, j in zip(tables, q, k, strict=True))

    return rule


@st.composite
def neighborhoods(draw: st.DrawFn, grid: TokenGrid) -> tuple[Neighborhood, Rule]:
    """A setting for all heads, and its rule."""
    sizes: list[tuple[Any, ...]] = []
    tables = []
    for length in grid.shape:
        dilation = draw(st.integers(1, min(3, length)))
        window = draw(st.integers(1, length // dilation))
        stride, causal = draw(st.integers(1, window)), draw(st.booleans())
        whole = draw(st.booleans()) and dilation == 1 and window == length
        sizes.append((-1 if whole else window, stride, dilation, causal))
        axis = (length, window, stride, dilation, causal)
        tables.append([[gna(q, k, *axis) for k in range(length)] for q in range(length)])
    values: list[Any] = [*zip(*sizes, strict=True)]
    return Neighborhood(*values), along_axes(tables)


@random_settings
@given(data=st.data(), grid=grids, tile=tile_sizes)
def test_neighborhood(data: st.DataObject, grid: TokenGrid, tile: int) -> None:
    method, rule = data.draw(neighborhoods(grid))
    check(method, grid, masks(grid, rule), tile)


@random_settings
@given(data=st.data(), grid=grids, tile=tile_sizes, count=st.integers(2, 3), layer=few)
def test_neighborhood_by_heads_and_layers(
    data: st.DataObject, grid: TokenGrid, tile: int, count: int, layer: int
) -> None:
    parts = [data.draw(neighborhoods(grid)) for _ in range(count)]
    methods, rules = zip(*parts, strict=True)
    check(Neighborhood(heads=methods), grid, masks(grid, *rules), tile)
    heads = Neighborhood(heads=methods[:2])
    layers = Neighborhood(layers=(heads, *methods[2:], methods[0]))
    turn = [rules[:2], *((rule,) for rule in rules[2:]), rules[:1]][layer % count]
    check(layers, grid, masks(grid, *turn), tile, layer=layer)


def window_of(x: int, length: int, size: int, move: int, shift: str) -> int:
    """The number of the window, along one axis, that a position lies in."""
    if size == length:
        return 0
    if shift == "count":
        count = min(length, round(length / size) + move)
        return sum(border(i, length, count) <= x for i in range(1, count))
    return (x - move * size // 4) // size


@random_settings
@given(
    data=st.data(),
    grid=grids,
    tile=tile_sizes,
    shift=st.sampled_from(["layer", "step", "random", "count", "none"]),
    layer=few,
    step=st.integers(0, 50),
    groups=st.integers(1, 3),
)
def test_window(
    data: st.DataObject, grid: TokenGrid, tile: int, shift: str, layer: int, step: int, groups: int
) -> None:
    sizes: Any = [tuple(data.draw(st.integers(1, n)) for n in grid.shape) for _ in range(groups)]
    seed: dict[str, Any] = {"seed": data.draw(few), "shift": shift}
    method = Window(heads=tuple(sizes), **seed) if groups > 1 else Window(sizes[0], **seed)
    move = {"layer": layer % 2 * 2, "step": step % 2 * 2, "count": layer % 2, "none": 0}
    moved = move[shift] if shift in move else method.variant(layer, step)
    assert moved in range(4)

    def rule(windows: tuple[int, ...]) -> Rule:
        tables = []
        for length, size in zip(grid.shape, windows, strict=True):
            of = [window_of(x, length, size, moved, shift) for x in range(length)]
            tables.append([[a == b for b in of] for a in of])
        return along_axes(tables)

    check(method, grid, masks(grid, *map(rule, sizes)), tile, layer=layer, step=step)


@random_settings
@given(data=st.data(), grid=grids, tile=tile_sizes)
def test_sliding_tile(data: st.DataObject, grid: TokenGrid, tile: int) -> None:
    tiles, windows, tables = [], [], []
    for length in grid.shape:
        size = data.draw(st.integers(1, length))
        count = math.ceil(length / size)
        window = data.draw(st.one_of(st.just(-1), st.integers(1, count)))
        span = count if window in (-1, count) else 2 * (window // 2) + 1
        of = [sum(border(i, length, count) <= x for i in range(1, count)) for x in range(length)]
        first = [min(max(n - span // 2, 0), count - span) for n in of]
        tables.append([[a <= of[k] < a + span for k in range(length)] for a in first])
        tiles.append(size)
        windows.append(window)
    t, h, w = tiles
    size_of_each: Any = tuple(windows)
    method = SlidingTile(window=size_of_each, tile=(t, h, w))
    check(method, grid, masks(grid, along_axes(tables)), tile)


@random_settings
@given(
    data=st.data(),
    grid=grids,
    tile=tile_sizes,
    radius=st.one_of(st.integers(1, 8), st.floats(0.1, 1.5)),
    sharpen=st.floats(0.8, 1.3),
)
def test_disc(
    data: st.DataObject, grid: TokenGrid, tile: int, radius: float, sharpen: float
) -> None:
    frames = data.draw(st.integers(1, grid.num_frames))
    reach = radius if isinstance(radius, int) else radius * math.sqrt(grid.height * grid.width)

    def rule(q: Position, k: Position) -> bool:
        near = (q[1] - k[1]) ** 2 + (q[2] - k[2]) ** 2 < reach**2
        return near and gna(q[0], k[0], grid.num_frames, frames, 1, 1, False)

    check(Disc(radius, time=frames, sharpen=sharpen), grid, masks(grid, rule), tile)


videos = st.builds(
    TokenGrid, st.integers(2, 6), st.integers(2, 14), st.integers(2, 16), few, few
)  # the rules of radial work on blocks of 128 tokens


@settings(random_settings, max_examples=10)
@given(grid=videos, decay=st.floats(0.1, 3.0), sink=st.booleans())
@example(grid=TokenGrid(130, 1, 1), decay=0.5, sink=True)  # a last block of two frames
@example(grid=TokenGrid(130, 1, 1), decay=0.5, sink=False)
def test_radial_as_published(grid: TokenGrid, decay: float, sink: bool) -> None:
    blocks = published_by_hand(grid, decay, sink)
    of = torch.arange(grid.visual_tokens) // 128
    expected = torch.ones(1, grid.num_tokens, grid.num_tokens, dtype=torch.bool)
    inner = slice(grid.text_before, grid.text_before + grid.visual_tokens)
    expected[0, inner, inner] = blocks[of[:, None], of]
    check(Radial(decay=decay, rule="published", sink=sink), grid, expected)


@settings(random_settings, max_examples=15)
@given(
    grid=videos,
    decay=st.floats(0.1, 3.0),
    sink=st.booleans(),
    tile=st.sampled_from([8, 24, 128]),
    kept=st.one_of(st.none(), st.floats(0.2, 1.0)),
)
def test_radial_on_tiles(
    grid: TokenGrid, decay: float, sink: bool, tile: int, kept: float | None
) -> None:
    """Between two frames every query sees a box of whole tiles around it, never cut by an edge."""
    method = Radial(decay=decay, sink=sink, kept=kept)
    with mock.patch.object(choose_tile, "__defaults__", (tile, None)):
        mask = method.pattern(grid).dense()
        tiling, _ = radial_rules.tiles(grid, decay, sink, kept)
    slabs = list(itertools.pairwise(tiling.cuts[0]))
    centre = [(a + b) / 2 for a, b in slabs for _ in range(a, b)]
    inner = slice(grid.text_before, grid.text_before + grid.visual_tokens)
    frames = mask[0, inner, inner].unflatten(0, grid.shape).unflatten(3, grid.shape)
    expected = mask.new_ones(mask.shape)
    visual = expected[0, inner, inner].unflatten(0, grid.shape).unflatten(3, grid.shape)
    for i, j in itertools.product(range(grid.num_frames), repeat=2):
        seen = frames[i, :, :, j]
        rows, columns = seen.any(3).any(1), seen.any(2).any(0)
        for along, cuts in ((rows, tiling.cuts[1]), (columns, tiling.cuts[2])):
            assert_windows(along, cuts)
        visual[i, :, :, j] = rows[:, None, :, None] & columns[None, :, None, :]
        near = abs(centre[i] - centre[j]) < 2  # of their slabs: small frames share tiles
        assert kept is not None or bool(seen.all()) or not (near or (sink and j == 0))
    expected[0, inner, inner] = visual.flatten(3).flatten(0, 2)
    check(method, grid, expected, tile)


def assert_windows(seen: torch.Tensor, cuts: tuple[int, ...]) -> None:
    """That every tile sees a run of whole tiles that holds itself, as many as any other tile."""
    tiles = seen[list(cuts[:-1])][:, list(cuts[:-1])]
    of = torch.bucketize(torch.arange(cuts[-1]), torch.tensor(cuts[1:-1]), right=True)
    assert torch.equal(seen, tiles[of[:, None], of])
    if not tiles.any():
        return
    assert tiles.diagonal().all()
    assert len(tiles.sum(1).unique()) == 1
    edges = F.pad(tiles.int(), (1, 1)).diff(dim=1)
    assert bool((edges.abs().sum(1) == 2).all())
