"""Heads sharpened by their entropy, against the equations of UltraImage in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from diffpatch import Larger, TokenGrid
from diffpatch.methods.base import AttentionCall
from diffpatch.methods.larger import focus

GRID = TokenGrid(2, 3, 5)
MOST = 1.3


def heads(layer: int, key_heads: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of a layer, whose heads are more and less local."""
    generator = torch.Generator().manual_seed(layer)
    q = torch.randn(2, GRID.num_tokens, 3, 8, generator=generator)
    k, v = (torch.randn(2, GRID.num_tokens, key_heads, 8, generator=generator) for _ in range(2))
    return q * torch.tensor([0.5, 1.5, 3.0])[:, None] * (layer + 1), k, v


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    return torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / math.sqrt(q.shape[-1])


def entropy(of: torch.Tensor) -> torch.Tensor:
    """Equation 10, the mean over the batch."""
    chances = of.softmax(-1)
    logs = torch.where(chances > 0, chances, 1.0).log()
    return -(chances * logs).sum(-1).mean((0, 2))


@pytest.mark.parametrize("key_heads", [1, 3])
def test_entropies_are_those_of_the_equation(key_heads: int) -> None:
    q, k, _ = heads(0, key_heads)
    assert torch.allclose(focus.entropies(q, k, None).double(), entropy(scores(q, k)), atol=1e-5)
    keys = torch.ones(2, GRID.num_tokens, dtype=torch.bool)
    keys[1, 7:] = False
    masked = scores(q, k).masked_fill(~keys[:, None, None], -math.inf)
    found = focus.entropies(q, k, 8**-0.5, keys)
    assert torch.allclose(found.double(), entropy(masked), atol=1e-5)


def test_a_sample_of_many_queries_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = heads(0)
    exact = focus.entropies(q, k, None)
    monkeypatch.setattr(focus, "SAMPLED", 10)
    assert (focus.entropies(q, k, None) - exact).abs().max() < 0.2 < exact.diff().abs().min()


def test_factors_compare_all_heads_of_all_layers() -> None:
    found = [torch.tensor([1.0, 4.0]), torch.tensor([3.0, 2.0, 4.0])]
    made = focus.factors(found, MOST)
    expected = [[(4 - h) / 3 for h in layer.tolist()] for layer in found]
    for one, shares in zip(made, expected, strict=True):
        assert one.tolist() == pytest.approx([1 + 0.3 * share**2 for share in shares])
    assert focus.factors([torch.ones(3)], MOST)[0].tolist() == [1, 1, 1]  # all alike: none


@pytest.mark.parametrize("shape", ["whole", "inward"])
def test_calls_are_sharpened_from_the_second_step_on(shape: Any) -> None:
    method = Larger(trained=(2, 3), shape=shape, focus=MOST)
    pattern = method.pattern(GRID)
    seen = pattern.dense()[0]
    common: dict[str, Any] = {}
    factor = method.softmax_factor()
    assert (factor == 1) == (shape == "whole")
    layers = range(2)
    found = [entropy(factor * scores(*heads(layer)[:2])) for layer in layers]
    low, high = torch.cat(found).min(), torch.cat(found).max()
    for step in range(3):
        for layer in layers:
            q, k, v = heads(layer)
            call = AttentionCall(pattern, step=step, layer=layer, common=lambda: common)
            out = method.attend(q, k, v, call).out
            sharp = 1 + (MOST - 1) * ((high - found[layer]) / (high - low)) ** 2 * (step > 0)
            logits = factor * sharp[:, None, None] * scores(q, k)
            chances = logits.masked_fill(~seen, -math.inf).softmax(-1)
            expected = torch.einsum("bhij,bjhd->bihd", chances, v.double())
            assert torch.allclose(out.double(), expected, atol=1e-4), (step, layer)
    held: dict[str, Any] = {}
    again = AttentionCall(pattern, step=0, layer=0, common=lambda: held)
    q, k, v = heads(0)
    once, twice = (method.attend(q, k, v, again).out for _ in range(2))
    assert torch.equal(once, twice)  # a block that a backward pass computes again


def test_whole_frames_are_changed_beyond_the_trained_size_only() -> None:
    changes: tuple[dict[str, Any], ...] = ({"focus": MOST}, {"sharpen": 1.1})
    for params in changes:
        method = Larger(trained=(3, 5), shape="whole", **params)
        assert not method.changes_whole(GRID) and method.changes_whole(TokenGrid(1, 4, 5))
        assert "holds all 3×5" in method.why_whole(GRID)
    plain = Larger(trained=(2, 5), shape="whole", slowed=1)
    assert not plain.changes_whole(GRID) and "leaves nothing out" in plain.why_whole(GRID)
    assert plain.for_model(None, None, cross_attention=True).guide_every(GRID) == 0
