"""What every kernel of block-sparse attention is held to: it writes all its outputs, and right."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from diffpatch.kernels.block_sparse import reference as block_sparse_reference
from diffpatch.kernels.blocks import BlockIndex

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}


def poisoned() -> Any:
    """Within this, memory that was not written is NaN, if it can be."""
    empty = torch.empty

    def nan(*shape: Any, **options: Any) -> torch.Tensor:
        made = empty(*shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    return mock.patch.object(torch, "empty", nan)


def exact(
    inputs: Tensors, blocks: BlockIndex, key_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, in fp64."""
    q, k, v = (x.double() for x in inputs)
    out, lse = block_sparse_reference.attend_reference(
        q, k, v, blocks, q.shape[-1] ** -0.5, key_mask, True
    )
    assert lse is not None
    return out, lse


def assert_exact(
    found: tuple[torch.Tensor, torch.Tensor],
    inputs: Tensors,
    blocks: BlockIndex,
    key_mask: torch.Tensor | None = None,
) -> None:
    """An output and log-sum-exp are those of the definition, but for the rounding of the dtype."""
    out, lse = found
    expected, expected_lse = exact(inputs, blocks, key_mask)
    assert out.dtype == inputs[0].dtype
    blind = expected_lse.isinf()
    assert torch.equal(lse.isinf(), blind)
    assert not out[blind].any()
    assert (out.double() - expected).norm() <= TOLERANCE[out.dtype] * expected.norm()
    torch.testing.assert_close(lse[~blind].double(), expected_lse[~blind], rtol=1e-5, atol=1e-5)
