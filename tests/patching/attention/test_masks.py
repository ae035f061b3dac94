"""The models' own masks: what can be said token by token, and nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from diffpatch.patching.attention.model_masks import fold_bias, read_mask

Q = torch.randn(2, 7, 3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
VALID = torch.tensor([[True] * 7, [True] * 5 + [False] * 2])


def test_no_mask_says_nothing() -> None:
    for square in (True, False):
        seen = read_mask(Q, None, square)
        assert (seen.keys, seen.bias, seen.reason) == (None, None, None)


def test_key_masks() -> None:
    expanded = VALID[:, None, None].expand(-1, 3, 7, -1)  # Lumina-Next's
    for mask in (VALID[:, None, None, :], VALID[1:, None, None, :], VALID, expanded):
        keys = read_mask(Q, mask, square=False).keys
        assert keys is not None and torch.equal(keys, VALID[-len(mask) :].expand(2, -1))


def test_square_masks_are_read_where_the_family_vouches_for_them() -> None:
    square = (VALID[:, :, None] & VALID[:, None, :])[:, None]
    keys = read_mask(Q, square, square=True).keys
    assert keys is not None and torch.equal(keys, VALID)
    bias = read_mask(Q, square.double(), square=True).bias
    assert bias is not None and torch.equal(bias, VALID.double())
    assert "own mask (2, 1, 7, 7) of torch.bool" in str(read_mask(Q, square, square=False).reason)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, 3, 7, 7, dtype=torch.bool),  # another one for every head
        torch.zeros(2, 1, 1, 7),  # additive
        torch.ones(2, 1, 1, 8, dtype=torch.bool),  # of another sequence
        torch.zeros(2, 7),
        torch.ones(7, 7, dtype=torch.bool),  # of pairs
    ],
)
def test_everything_else_is_a_reason(mask: torch.Tensor) -> None:
    seen = read_mask(Q, mask, square=True)
    assert seen.keys is None and seen.bias is None and seen.reason


@pytest.mark.parametrize("scale", [None, 0.3])
def test_a_folded_bias_is_the_additive_mask(scale: float | None) -> None:
    k, v, bias = torch.randn_like(Q), torch.randn_like(Q), torch.rand(2, 7, dtype=torch.float64)
    a, b, c = (x.transpose(1, 2) for x in (Q, k, v))
    mask = bias[:, None, :, None] * bias[:, None, None, :]
    expected = F.scaled_dot_product_attention(a, b, c, mask, scale=scale).transpose(1, 2)
    *folded, new_scale = fold_bias(Q, k, v, bias, scale)
    a, b, c = (x.transpose(1, 2) for x in folded)
    out = F.scaled_dot_product_attention(a, b, c, scale=new_scale).transpose(1, 2)
    assert a.shape[-1] % 4 == 0 and not out[..., 20:].any()
    torch.testing.assert_close(out[..., :20], expected)
