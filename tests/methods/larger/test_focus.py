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
    """Equation 10, of each sample."""
    chances = of.softmax(-1)
    logs = torch.where(chances > 0, chances, 1.0).log()
    return -(chances * logs).sum(-1).mean(2)


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
    assert (focus.entropies(q, k, None) - exact).abs().max() < 0.2 < exact.diff(dim=1).abs().min()


def test_factors_compare_all_heads_of_all_layers() -> None:
    """And those of one sample only."""
    found = [
        torch.tensor([[1.0, 4.0], [0.0, 6.0]]), torch.tensor([[3.0, 2.0, 4.0], [8.0, 2.0, 4.0]])
    ]  # fmt: skip
    made = focus.factors(found, MOST)
    for sample, (low, high) in enumerate([(1, 4), (0, 8)]):
        for one, layer in zip(made, found, strict=True):
            shares = [(high - h) / (high - low) for h in layer[sample].tolist()]
            assert one[sample].tolist() == pytest.approx([1 + 0.3 * s**2 for s in shares])
    assert focus.factors([torch.ones(1, 3)], MOST)[0].tolist() == [[1, 1, 1]]  # all alike: none


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
    low, high = torch.cat(found, 1).amin(1, True), torch.cat(found, 1).amax(1, True)
    for step in range(3):
        for layer in layers:
            q, k, v = heads(layer)
            call = AttentionCall(pattern, step=step, layer=layer, common=lambda: common)
            out = method.attend(q, k, v, call).out
            sharp = 1 + (MOST - 1) * ((high - found[layer]) / (high - low)) ** 2 * (step > 0)
            logits = factor * sharp[..., None, None] * scores(q, k)
            chances = logits.masked_fill(~seen, -math.inf).softmax(-1)
            expected = torch.einsum("bhij,bjhd->bihd", chances, v.double())
            assert torch.allclose(out.double(), expected, atol=1e-4), (step, layer)
    held: dict[str, Any] = {}
    again = AttentionCall(pattern, step=0, layer=0, common=lambda: held)
    q, k, v = heads(0)
    once, twice = (method.attend(q, k, v, again).out for _ in range(2))
    assert torch.equal(once, twice)  # a block that a backward pass computes again


def test_a_sample_is_sharpened_as_if_it_were_alone() -> None:
    """Also where another joins it, or leaves, in the middle."""
    method = Larger(trained=(2, 3), shape="whole", focus=MOST)
    pattern = method.pattern(GRID)
    common: dict[str, Any] = {}
    alone: dict[str, Any] = {}

    def run(step: int, layer: int, samples: slice, held: dict[str, Any]) -> torch.Tensor:
        call = AttentionCall(pattern, step=step, layer=layer, common=lambda: held)
        q, k, v = (x[samples] for x in heads(layer))
        return method.attend(q, k, v, call).out

    both, first = slice(0, 2), slice(0, 1)
    for step, samples in enumerate([both, both, first, first, both, both]):
        fresh = step % 2 == 0  # entropies are measured, and nothing is sharpened
        for layer in range(2):
            out = run(step, layer, samples, common)[:1]
            expected = run(0 if fresh else 1, layer, first, {} if fresh else alone)
            if step == 0:
                run(0, layer, first, alone)
            assert torch.allclose(out, expected, atol=1e-6), (step, layer)
        assert fresh or not torch.allclose(out, run(0, 1, first, {}), atol=1e-3)


def test_whole_frames_are_changed_beyond_the_trained_size_only() -> None:
    changes: tuple[dict[str, Any], ...] = ({"focus": MOST}, {"sharpen": 1.1})
    for params in changes:
        method = Larger(trained=(3, 5), shape="whole", **params)
        assert not method.changes_whole(GRID) and method.changes_whole(TokenGrid(1, 4, 5))
        assert "holds all 3×5" in method.why_whole(GRID)
    plain = Larger(trained=(2, 5), shape="whole", slowed=1)
    assert not plain.changes_whole(GRID) and "leaves nothing out" in plain.why_whole(GRID)
    assert plain.for_model(None, None, cross_attention=True).guide_every(GRID) == 0
