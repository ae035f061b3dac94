"""FlexAttention on our block indexes: unfused, and compiled for the CPU that the tests run on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import get_args

import pytest
import torch
from torch.nn.attention import flex_attention

import diffpatch
from diffpatch.kernels.block_sparse.api import block_sparse_attention, work_of
from diffpatch.kernels.block_sparse.backends import choose_backend
from diffpatch.kernels.block_sparse.flex import attend
from diffpatch.kernels.block_sparse.flex.attend import attend_flex, unsupported_reason
from diffpatch.kernels.block_sparse.flex.layout import BLOCK, flex_layout
from diffpatch.kernels.block_sparse.operators import BLOCK_SPARSE
from diffpatch.kernels.blocks import BlockIndex
from tests.exactness import TOLERANCE, assert_exact, exact
from tests.kernels.random_blocks import random_blocks, random_qkv

needs_compiler = pytest.mark.skipif(
    unsupported_reason(torch.zeros(1, 1, 1, 64), random_blocks([4])) is not None,
    reason=str(unsupported_reason(torch.zeros(1, 1, 1, 64), random_blocks([4]))),
)


@pytest.fixture(autouse=True)
def unfused_is_meant() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without")
        yield


def hidden(blocks: BlockIndex) -> torch.Tensor:
    """bool (2, S): some keys, and in the second entry a whole tile."""
    mask = torch.rand(2, blocks.num_tokens, generator=torch.Generator().manual_seed(3)) < 0.7
    mask[1, blocks.order[: int(blocks.starts[1])]] = False
    return mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("sizes", "heads"),
    [([37, 64, 20], None), ([37, 64, 20], [0, 1, 0, 0]), ([200, 130, 7], [1, 0, 2, 1])],
)
def test_unfused_it_is_the_definition(
    sizes: list[int], heads: list[int] | None, dtype: torch.dtype, masked: bool
) -> None:
    blocks = random_blocks(sizes, kept=0.6, heads=heads, seed=1)
    inputs = random_qkv(2, blocks.num_tokens, 4, 16, dtype, key_heads=2)
    key_mask = hidden(blocks) if masked else None
    out, lse = attend_flex(*inputs, blocks, 0.25, key_mask, True, compiled=False)
    assert lse is not None
    assert_exact((out, lse), inputs, blocks, key_mask)


@needs_compiler
@pytest.mark.timeout(900)  # compilers take a minute, or several where others want the cores too
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_for_a_cpu(dtype: torch.dtype) -> None:
    """Twice, with and without hidden keys, by one compiled function."""
    blocks = random_blocks([37, 128, 20], kept=0.6, heads=[0, 1, 0, 0], seed=1)
    inputs = random_qkv(2, blocks.num_tokens, 4, 32, dtype, key_heads=2)
    for key_mask in (None, hidden(blocks)):
        out, lse = block_sparse_attention(
            *inputs, blocks, key_mask=key_mask, return_lse=True, backend="flex"
        )
        expected, expected_lse = exact(inputs, blocks, key_mask)
        blind = expected_lse.isinf()
        assert blind.any() and torch.equal(lse.isinf(), blind) and not out[blind].any()
        assert out.dtype == dtype
        assert (out.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


def test_a_grid_with_text_through_the_front_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend, "_compiled", lambda with_lse, kind: attend._function(with_lse))
    monkeypatch.setattr(attend, "_cpu_reason", lambda: None)
    grid = diffpatch.TokenGrid(3, 5, 7, text_before=4, text_after=3)
    q, k, v = random_qkv(1, grid.num_tokens, 2, 16)
    outs = [
        diffpatch.attention(q, k, v, grid, "neighborhood", window=(3, 3, 3), backend=backend)
        for backend in ("flex", "reference")
    ]
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)


def test_what_it_cannot_do_is_refused() -> None:
    blocks = random_blocks([8, 8])
    q, k, v = random_qkv(1, 16, 1, 32)
    with pytest.raises(diffpatch.BackendUnavailable, match=r"'flex' cannot run: .*float64"):
        block_sparse_attention(q.double(), k.double(), v.double(), blocks, backend="flex")
    with pytest.raises(diffpatch.BackendUnavailable, match="no gradients on CPUs"):
        block_sparse_attention(q.requires_grad_(), k, v, blocks, backend="flex")
    assert "q is on meta" in str(unsupported_reason(q.to("meta"), blocks))
    assert choose_backend(BLOCK_SPARSE, "auto", blocks, k) == "torch"  # not unasked


@pytest.mark.parametrize("heads", [None, [0, 1, 1]])
def test_padding_is_counted(heads: list[int] | None) -> None:
    blocks = random_blocks([200, 130, 7], kept=0.6, heads=heads, seed=1)
    layout = flex_layout(blocks)
    assert len(layout.token) == 5 * BLOCK
    assert torch.equal(layout.token[layout.place], torch.arange(337))
    assert layout.real.sum() == 337
    visited = whole = 0
    for pattern in heads or [0]:
        for row in range(pattern * 3, pattern * 3 + 3):
            for e in range(int(blocks.row_ptr[row]), int(blocks.row_ptr[row + 1])):
                col, mask = int(blocks.cols[e]), int(blocks.mask_ids[e])
                size = int(blocks.sizes[row % 3]), int(blocks.sizes[col])
                seen = (
                    torch.ones(size) > 0 if mask < 0 else blocks.masks[mask][: size[0], : size[1]]
                )
                for a in range(0, size[0], BLOCK):
                    for b in range(0, size[1], BLOCK):
                        part = seen[a : a + BLOCK, b : b + BLOCK]
                        visited += bool(part.any())
                        whole += bool(part.all()) and part.shape[1] == BLOCK
    work, count = work_of(blocks, "flex"), len(heads or [0])
    assert work.pairs == pytest.approx(visited * BLOCK**2 / count)
    assert work.masked == pytest.approx((visited - whole) * BLOCK**2 / count)
    assert work.rows == 4 * 5 * BLOCK


@pytest.mark.parametrize("masked", [False, True])
def test_what_torch_asks_of_a_call_for_flash_attention_4(masked: bool) -> None:
    """The name of the option; lists of full blocks beside those with a mask, whatever is hidden;
    and no captured numbers, which torch would have to make symbols of."""
    assert attend.FLASH["BACKEND"] in get_args(flex_attention._Backend)
    blocks = random_blocks([200, 130, 7], kept=0.6, heads=[0, 1, 1], seed=1)
    mask = attend._block_mask(
        blocks, flex_layout(blocks), 2, 3, hidden(blocks) if masked else None, False
    )
    assert mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None
    assert mask.kv_num_blocks is not None and mask.BLOCK_SIZE == (BLOCK, BLOCK)
    captured = [cell.cell_contents for cell in mask.mask_mod.__closure__]
    assert captured and all(isinstance(x, torch.Tensor) for x in captured)
