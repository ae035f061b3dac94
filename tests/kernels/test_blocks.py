"""A block index keeps its promises: each broken alone is refused, by what it breaks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from diffpatch.kernels.blocks import BlockIndex


def index() -> BlockIndex:
    """Tiles of 2, 3 and 1 tokens, two patterns; full, partial and empty rows."""
    masks = torch.zeros(2, 3, 3, dtype=torch.bool)
    masks[0, :2, :1] = True  # of the first tile on the last
    masks[1, :3, :2] = True  # of the second tile on the first
    return BlockIndex(
        order=torch.tensor([3, 1, 0, 5, 4, 2]),
        starts=torch.tensor([0, 2, 5, 6]).int(),
        row_ptr=torch.tensor([0, 3, 5, 6, 8, 8, 9]).int(),
        full_end=torch.tensor([2, 4, 6, 8, 8, 9]).int(),
        cols=torch.tensor([0, 1, 2, 1, 0, 2, 0, 2, 1]).int(),
        mask_ids=torch.tensor([-1, -1, 0, -1, 1, -1, -1, -1, -1]).int(),
        masks=masks,
        head_pattern=torch.tensor([0, 1, 1]).int(),
    )


def changed(name: str, place: int | tuple[int, ...], value: int) -> BlockIndex:
    old = getattr(index(), name).clone()
    old[place] = value
    return dataclasses.replace(index(), **{name: old})


def test_one_that_keeps_its_promises_is_taken() -> None:
    index().validate()
    nothing = torch.zeros(0, dtype=torch.int32)
    dataclasses.replace(
        index(), row_ptr=torch.zeros(7).int(), full_end=torch.zeros(6).int(), cols=nothing,
        mask_ids=nothing,
    ).validate()  # fmt: skip
    one = torch.tensor([0, 1]).int()
    BlockIndex(
        order=torch.tensor([0]), starts=one, row_ptr=one, full_end=one[1:], cols=one[:1],
        mask_ids=one[:1] - 1, masks=torch.zeros(0, 1, 1).bool(), head_pattern=None,
    ).validate()  # fmt: skip


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("order", 0, 1, r"not a permutation of 0\.\.5"),
        ("starts", 0, 1, "from 1 to 6, expected 0 to 6"),
        ("starts", -1, 5, "from 0 to 5, expected 0 to 6"),
        ("starts", 1, 0, "hold 0 to 5 tokens, expected 1 to 3"),
        ("starts", 2, 6, "hold 0 to 4 tokens, expected 1 to 3"),
        ("starts", 1, 1, r"hold 1 to 4 tokens, expected 1 to 3 \(T of masks\)"),
        ("head_pattern", 0, -1, "holds -1 to 1, expected 0 to 1"),
        ("head_pattern", 1, 2, "holds 0 to 2, expected 0 to 1"),
        ("row_ptr", 0, 1, "must rise from 0 to the 9 entries"),
        ("row_ptr", -1, 8, "must rise from 0 to the 9 entries"),
        ("row_ptr", 1, 6, "must rise from 0 to the 9 entries"),
        ("full_end", 1, 2, "between the row's first entry and its last"),
        ("full_end", 0, 4, "between the row's first entry and its last"),
        ("cols", 0, -1, "holds -1 to 2, expected 0 to 2"),
        ("cols", 1, 3, "holds 0 to 3, expected 0 to 2"),
        ("cols", 1, 0, "twice or out of order"),  # twice in full
        ("cols", 2, 0, "twice or out of order"),  # in full and in part
        ("cols", 0, 2, "twice or out of order"),  # falling
        ("mask_ids", 2, -1, "-1 for full tiles and 0 to 1 for partial"),
        ("mask_ids", 0, 0, "-1 for full tiles and 0 to 1 for partial"),
        ("mask_ids", 2, 2, "-1 for full tiles and 0 to 1 for partial"),
        ("masks", (0, 2, 0), 1, "True past the end of an edge tile"),  # queries
        ("masks", (0, 0, 1), 1, "True past the end of an edge tile"),  # keys
        ("masks", (1, 0, 2), 1, "True past the end of an edge tile"),
    ],
)  # fmt: skip
def test_a_promise_that_is_broken_is_named(
    name: str, place: int | tuple[int, ...], value: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        changed(name, place, value).validate()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("starts", torch.zeros(1).int(), "starts has 1 entries, expected one more"),
        ("full_end", torch.zeros(0).int(), "full_end has 0 rows, expected a multiple of the 3"),
        ("full_end", torch.zeros(4).int(), "full_end has 4 rows, expected a multiple of the 3"),
        ("row_ptr", torch.zeros(6).int(), "row_ptr has 6 entries, expected 7"),
        ("cols", torch.zeros(8).int(), "cols has 8 entries and mask_ids 9"),
        ("masks", torch.zeros(2, 3, 4).bool(), r"shape \(2, 3, 4\), expected \(M, T, T\)"),
        ("masks", torch.zeros(2, 0, 0).bool(), r"shape \(2, 0, 0\), expected \(M, T, T\)"),
        ("masks", torch.zeros(3, 3).bool(), r"masks is torch.bool with 2 dim.*with 3 on cpu"),
        ("masks", torch.zeros(2, 3, 3), r"masks is torch.float32 with 3 dim.*torch.bool"),
        ("cols", torch.zeros(9, device="meta").int(), "cols is torch.int32 with 1 .* on meta"),
        ("head_pattern", None, "2 patterns but head_pattern is None"),
    ],
)
def test_a_shape_that_is_wrong_is_named(
    name: str, value: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(index(), **{name: value}).validate()  # type: ignore[arg-type]
