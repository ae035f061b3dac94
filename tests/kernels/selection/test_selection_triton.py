"""The kernels that choose tiles, interpreted: against rules in fp64 and the choice in PyTorch."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from diffpatch import Dense, TokenGrid
from diffpatch.kernels.active_tiles.table import tile_table
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.gpu import support
from diffpatch.kernels.selection import triton_impl as kernels
from diffpatch.kernels.selection.api import select
from diffpatch.kernels.selection.choose import Counts, choose
from diffpatch.kernels.selection.rules import RULES
from diffpatch.kernels.selection.tiles import Options, Tiles
from tests.exactness import poisoned
from tests.kernels.gpu.pretend_gpu import pretend_gpu
from tests.kernels.gpu.triton_interpreter import as_on_a_gpu, interpreted
from tests.kernels.random_blocks import random_blocks, random_qkv

SCALE = 0.4
DENSE = Dense(tile=32).pattern(TokenGrid(2, 9, 11, text_before=5)).blocks
WINDOW = random_blocks([32, 30, 17, 32, 5], kept=0.6, seed=3)


def hidden_keys(blocks: BlockIndex) -> torch.Tensor:
    """bool (2, S): some, and a whole tile in the second entry."""
    mask = torch.rand(2, blocks.num_tokens, generator=torch.Generator().manual_seed(0)) < 0.8
    mask[1, blocks.order[: int(blocks.starts[1])]] = False
    return mask


def tiles_of(
    blocks: BlockIndex,
    dtype: torch.dtype = torch.float32,
    *,
    rest: str = "virtual",
    strip: int = 12,
    masked: bool = True,
    size: int = 40,
    backend: str = "torch",
) -> Tiles:
    """Batch 2, grouped heads, a head size that is not a power of two."""
    q, k, v = random_qkv(2, blocks.num_tokens, 4, size, dtype, key_heads=2)
    mask = hidden_keys(blocks) if masked else None
    return Tiles(q, k + 0.5, v - 1, blocks, strip, SCALE, mask, backend, Options(rest))


def in_fp64(tiles: Tiles) -> Tiles:
    q, k, v = (x.double() for x in (tiles.q, tiles.k, tiles.v))
    return Tiles(
        q, k, v, tiles.blocks, tiles.strip, tiles.scale, tiles.key_mask, "torch", tiles.options
    )


@pytest.mark.parametrize("blocks", [DENSE, WINDOW], ids=["dense", "window"])
@pytest.mark.parametrize(
    ("rule", "rest", "masked"),
    [
        ("error", "virtual", True),
        ("error", "drop", True),
        ("error", "drop", False),
        ("mass", "virtual", True),
        ("pooled", "virtual", False),
    ],
)
def test_scores_are_those_of_the_rule(
    rule: str, rest: str, masked: bool, blocks: BlockIndex
) -> None:
    tiles = tiles_of(blocks, rest=rest, masked=masked)
    with interpreted(), poisoned():
        found = kernels.scores(tiles, rule)
        log_mass = kernels.scores(tiles, "mass")
    assert found is not None and log_mass is not None
    exact = in_fp64(tiles)
    expected = RULES[rule].score(exact)
    seen = exact.seen.expand_as(expected)
    found, log_mass = found.double(), log_mass.double()
    assert not found.isnan().any()
    if rule == "error" and rest == "drop":
        certain = expected.isinf() & seen
        assert (found[certain] == found.max()).all()
        found, expected = found.exp(), expected.masked_fill(certain, 0.0)
        found = found.masked_fill(certain, 0.0)
    elif rule != "pooled":  # the sum of a row is left out
        total = log_mass.masked_fill(~seen, -torch.inf).logsumexp(-1, keepdim=True)
        found = (found - total).exp()
    torch.testing.assert_close(found[seen], expected[seen], rtol=2e-5, atol=1e-7)


def test_a_strip_of_more_than_half_of_the_mass_comes_first() -> None:
    tiles = tiles_of(DENSE, rest="drop", masked=False)
    strips = tiles.table.strips
    tiles.q[:], tiles.k[:] = 0.5, 0.0
    tiles.k[:, strips.index[0][strips.valid[0]]] = 1.0
    with interpreted(), poisoned():
        found = kernels.scores(tiles, "error")
    assert found is not None
    expected = RULES["error"].score(in_fp64(tiles))
    assert expected[..., 0].isinf().all() and not expected[..., 1:].isinf().any()
    assert (found[..., :1] > found[..., 1:]).all() and (found[..., 0] > 1e38).all()


@pytest.mark.parametrize("strips", [5, 33, 130])
def test_the_best_of_every_row_are_those_of_pytorch(strips: int) -> None:
    """With equal scores, signs of both kinds, zeros of both signs, and rows that see nothing."""
    random = torch.Generator().manual_seed(strips)
    shape = (2, 3, 4, strips)
    scores = torch.randint(-4, 5, shape, generator=random) * 0.5
    scores[scores == 0] *= torch.where(torch.rand(shape, generator=random) < 0.5, -1.0, 1.0)[
        scores == 0
    ]
    scores[0, 0, 0] = -3.0e38
    for heads in (1, 3):
        seen = torch.rand((1, heads, 4, strips), generator=random) < 0.8
        seen[:, 0, 1] = False
        fixed = torch.rand((heads, 4, strips), generator=random) < 0.1
        rows = torch.randint(0, strips + 1, (heads, 4), generator=random)
        rows[0, 0] = 0
        counts = [Counts.of(rows, 3), Counts.of(rows // 2, 3)]
        with interpreted():
            found = kernels.choose(scores, seen, fixed, counts)
        for one, count in zip(found, counts, strict=True):
            assert torch.equal(one, choose(scores, seen, fixed, count))


def on_kernels(tiles: Tiles, rule: str, fixed: torch.Tensor, counts: list[Counts]) -> Any:
    own = Tiles(
        tiles.q, tiles.k, tiles.v, tiles.blocks, tiles.strip, tiles.scale, tiles.key_mask,
        "triton", tiles.options,
    )  # fmt: skip
    with as_on_a_gpu():
        return select(own, rule, fixed, counts)


def a_choice(tiles: Tiles) -> tuple[torch.Tensor, list[Counts]]:
    """Its own strip is in; then a third of a row, and half of it."""
    table = tile_table(tiles.blocks, tiles.strip)
    fixed = torch.zeros(1, table.num_tiles, len(table.strips), dtype=torch.bool)
    fixed[0, torch.arange(table.num_tiles), 0] = True
    row = torch.full((1, table.num_tiles), len(table.strips))
    return fixed, [Counts.of(row // 3, tiles.heads), Counts.of(row // 2, tiles.heads)]


@pytest.mark.parametrize(
    ("rule", "rest", "dtype", "blocks", "strip"),
    [
        ("error", "virtual", torch.float32, DENSE, 12),
        ("error", "drop", torch.float32, WINDOW, 12),
        ("error", "virtual", torch.bfloat16, WINDOW, 0),
        ("error", "drop", torch.float16, DENSE, 0),
        ("subblock", "drop", torch.float32, DENSE, 12),  # scores of PyTorch, the choice a kernel
    ],
)
def test_a_choice_is_that_of_fp64(
    rule: str, rest: str, dtype: torch.dtype, blocks: BlockIndex, strip: int
) -> None:
    tiles = tiles_of(blocks, dtype, rest=rest, strip=strip)
    fixed, counts = a_choice(tiles)
    found = on_kernels(tiles, rule, fixed, counts)
    expected = select(in_fp64(tiles), rule, fixed, counts)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert not (found[0] & ~found[1]).any()


WAITS = ("_local_scalar_dense", "nonzero", "masked_select")


class Waiting(TorchDispatchMode):
    """Refuses what would read a number back from a GPU, and notes the largest tensor made."""

    def __init__(self, refuse: bool) -> None:
        super().__init__()
        self.refuse, self.largest = refuse, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.refuse:
            assert func._schema.name.removeprefix("aten::") not in WAITS
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def test_a_choice_waits_for_nothing_and_holds_nothing_over_tokens() -> None:
    """As an H100 would be given it: the launches are recorded, and nothing is read back."""
    blocks = Dense(tile=64).pattern(TokenGrid(4, 16, 32)).blocks
    names: list[list[str]] = []
    with (
        mock.patch.object(support, "unsupported_reason", lambda *_: None),
        pretend_gpu(90) as gpu,
    ):
        for rest in ("virtual", "drop", "virtual", "drop"):  # what the tiles say is made once
            tiles = tiles_of(
                blocks, torch.bfloat16, rest=rest, strip=64, masked=False, size=64, backend="triton"
            )
            fixed, counts = a_choice(tiles)
            gpu.launches.clear()
            with Waiting(refuse=len(names) > 1) as waiting:
                select(tiles, "error", fixed, counts)
            names.append(sorted(launch["name"] for launch in gpu.launches))
    common = ["choose_kernel"] * 2, ["pool_kernel"] * 3
    assert names[2:] == [
        [*common[0], *common[1], "score_kernel"], [*common[0], "drop_kernel", *common[1]]
    ]  # fmt: skip
    assert waiting.largest <= tiles.q.numel() < blocks.num_tokens**2
