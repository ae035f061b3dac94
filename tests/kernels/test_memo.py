"""What is made once must not carry what the first caller happened to have switched on."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import pytest
import torch

from diffpatch.kernels.memo import Memo, neutral
from tests.kernels.random_blocks import random_blocks


def made() -> tuple[torch.Tensor, ...]:
    """A sum, a product and a quotient: what autocast and the default dtype would change."""
    x = torch.ones(3, 3)
    return x, x @ x, torch.arange(3) / 2


@pytest.mark.parametrize(
    "around",
    [
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        torch.device("meta"),
        torch.enable_grad(),
    ],
    ids=["inference mode", "autocast", "default device", "gradients"],
)
def test_what_is_made_does_not_depend_on_the_first_caller(
    around: AbstractContextManager[object],
) -> None:
    memo = Memo()
    with around:
        first = memo("key", made)
    assert memo("key", lambda: pytest.fail("made twice")) is first
    for x in first:
        assert x.dtype == torch.float32 and x.device.type == "cpu"
        assert not x.is_inference() and not x.requires_grad


def test_other_threads_keep_their_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with ThreadPoolExecutor(4) as threads:  # some are in it while others look
            for found in threads.map(lambda key: Memo()(key, made), range(64)):
                assert all(x.dtype == torch.bfloat16 for x in found)
        with neutral():
            assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)


def test_two_threads_get_the_same_value() -> None:
    memo, both = Memo(), threading.Barrier(2)

    def make() -> list[int]:
        both.wait(timeout=240)  # each is in here while the other is
        return []

    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(lambda _: memo("key", make), range(2))
    assert one is other


def test_what_an_index_says_of_its_entries() -> None:
    blocks = random_blocks([5, 3, 4], heads=[0, 1])
    entries = [
        (row, int(blocks.cols[e]), int(blocks.mask_ids[e]))
        for row in range(6)
        for e in range(int(blocks.row_ptr[row]), int(blocks.row_ptr[row + 1]))
    ]
    assert blocks.rows.tolist() == [row for row, _, _ in entries]
    assert blocks.sizes.tolist() == [5, 3, 4]
    assert blocks.tile_of_place.tolist() == [0] * 5 + [1] * 3 + [2] * 4
    assert blocks.order[blocks.place].tolist() == list(range(12))
    table, ids = blocks.mask_table(), blocks.mask_map()
    assert not table[-2].any() and table[-1].all()
    listed = {(row // 3, row % 3, col): mask for row, col, mask in entries}
    for at in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(3)).tolist():
        assert ids[tuple(at)] == listed.get(tuple(at), -2)
