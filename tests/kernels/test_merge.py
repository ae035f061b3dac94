"""Two attentions to different keys become one, whatever the size of their scores."""

from __future__ import annotations

import pytest
import torch

from diffpatch.kernels.merge import PIECE, merge


def attended(scores: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by its definition, (1, queries, 1, D) and (1, queries, 1)."""
    lse = scores.logsumexp(-1)
    out = scores.softmax(-1).nan_to_num() @ values
    return out[None, :, None], lse[None, :, None]


@pytest.mark.parametrize("shift", [0.0, 200.0, -200.0, 5e4])
@pytest.mark.parametrize("apart", [0.0, 3.0, -40.0])
def test_merging_equals_one_softmax(shift: float, apart: float) -> None:
    random = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 8, generator=random).double() + shift
    scores[:, 4:] += apart
    scores[1, :4] = scores[2, 4:] = scores[3] = -torch.inf  # seen by one side, or by neither
    values = torch.randn(8, 3, generator=random).double()
    expected, expected_lse = attended(scores, values)
    sides = [attended(scores[:, part], values[part]) for part in (slice(4), slice(4, 8))]
    out, lse = merge(*(x.float() for side in sides for x in side))
    assert out.dtype == lse.dtype == torch.float32
    assert not out[0, 3].any() and lse[0, 3] == -torch.inf
    near = 1e-6 if abs(shift) < 1e4 else 0.02  # what fp32 can hold of a log-sum-exp of that size
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=max(near, 1e-5))
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-5)


def test_gradients_of_merging_are_those_of_one_softmax() -> None:
    random = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 8, generator=random).double()
    values = torch.randn(8, 2, generator=random).double()
    grads = []
    for whole in (True, False):
        x, y = scores.clone().requires_grad_(), values.clone().requires_grad_()
        z = x.masked_fill(
            torch.tensor([[True] * 4 + [False] * 4, [False] * 8, [False] * 8]), -torch.inf
        )
        if whole:
            out, lse = attended(z, y)
        else:
            out, lse = merge(*attended(z[:, :4], y[:4]), *attended(z[:, 4:], y[4:]))
        loss = out.square().sum() + lse[..., 1:, :].square().sum()
        grads.append(torch.autograd.grad(loss, (x, y)))
    for found, expected in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(found, expected)


def test_merging_in_pieces_gives_the_bits_of_merging_at_once() -> None:
    random = torch.Generator().manual_seed(0)
    shape = (2, PIECE // 8 + 3, 2, 8)
    a, b = (torch.randn(shape, generator=random).bfloat16() for _ in range(2))
    x, y = (torch.randn(shape[:3], generator=random) for _ in range(2))
    out, _ = merge(a.requires_grad_(), x, b, y)  # with gradients there are no pieces
    pieces, _ = merge(a.detach().transpose(0, 1).contiguous().transpose(0, 1), x, b, y)
    assert pieces.dtype == torch.bfloat16
    assert torch.equal(out, pieces)
