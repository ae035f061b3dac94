"""A method in the place of one of xDiT's backends: its own registry, and what calls it there."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import diffpatch
from diffpatch import BadParameter, DiffpatchError, Neighborhood, TokenGrid
from diffpatch.adapters import xdit
from tests.adapters import stand_ins
from tests.pipelines.test_families import error

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("xfuser", "einops")),
    reason="xDiT is not installed: pip install --no-deps xfuser==0.7.0 einops (it wants an"
    " accelerator's stack, so no extra installs it)",
)

GRID = TokenGrid(3, 2, 4)
LOCAL = Neighborhood(window=(1, 1, 3), stride=1)
Q, K, V = torch.randn(3, 2, 4, 26, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def loaded() -> Iterator[Any]:
    with stand_ins.xdit():
        yield importlib.import_module("xfuser.model_executor.layers.usp")


@pytest.fixture
def replaced(loaded: Any) -> Iterator[xdit.Replaced]:
    made = xdit.register(LOCAL)
    yield made
    made.remove()


def call(loaded: Any, tokens: int = 24, keys: int | None = None, **told: Any) -> torch.Tensor:
    """As xDiT's attention layers call the backend they were told."""
    function = loaded._get_attention_function(backend=loaded.AttentionBackendType.SDPA_EFFICIENT)
    q, (k, v) = Q[:, :, :tokens], (x[:, :, : keys or tokens] for x in (K, V))
    causal = told.pop("is_causal", False)
    out: torch.Tensor
    out, _ = function(
        q, k, v, dropout_p=0.0, is_causal=causal, attention_kwargs={"thw": GRID.shape, **told}
    )
    return out


def sparse(grid: TokenGrid = GRID) -> torch.Tensor:
    q, k, v = (x[:, :, : grid.num_tokens].transpose(1, 2) for x in (Q, K, V))
    return diffpatch.attention(q, k, v, grid, LOCAL).transpose(1, 2)


def dense(tokens: int = 24, keys: int | None = None, **how: Any) -> torch.Tensor:
    k, v = (x[:, :, : keys or tokens] for x in (K, V))
    return F.scaled_dot_product_attention(Q[:, :, :tokens], k, v, **how)


def test_a_backend_computes_a_method_until_it_is_removed(loaded: Any) -> None:
    functions = importlib.import_module(xdit._BACKENDS).ATTENTION_FUNCTION_REGISTRY
    before = dict(functions)
    made = xdit.register(LOCAL)
    assert error(call(loaded), sparse()) < 1e-6
    assert error(call(loaded), dense()) > 1e-2
    made.remove()
    made.remove()
    assert functions == before


def test_what_does_not_fit_is_dense(loaded: Any, replaced: xdit.Replaced) -> None:
    mask = torch.ones(2, 1, 1, 24, dtype=torch.bool)
    mask[1, ..., 20:] = False
    assert error(call(loaded, keys=5), dense(keys=5)) < 1e-6
    assert error(call(loaded, attn_mask=mask), dense(attn_mask=mask)) < 1e-6
    assert error(call(loaded, is_causal=True), dense(is_causal=True)) < 1e-6
    assert error(call(loaded, thw=None), dense()) < 1e-6
    assert error(call(loaded, tokens=26), dense(26)) < 1e-6  # two tokens of text


def several(monkeypatch: pytest.MonkeyPatch, ring: int, ulysses: int) -> None:
    state = importlib.import_module(xdit._STATE)
    monkeypatch.setattr(state, "model_parallel_is_initialized", lambda: True)
    monkeypatch.setattr(state, "get_ring_parallel_world_size", lambda: ring)
    monkeypatch.setattr(state, "get_ulysses_parallel_world_size", lambda: ulysses)


def test_under_ulysses_padding_is_seen_and_heads_must_not_differ(
    loaded: Any, replaced: xdit.Replaced, monkeypatch: pytest.MonkeyPatch
) -> None:
    several(monkeypatch, 1, 4)
    assert error(call(loaded, tokens=26), sparse(TokenGrid(3, 2, 4, text_after=2))) < 1e-6
    made = xdit.register(Neighborhood(heads=((1, 1, 3), (1, 2, 1)), stride=1))
    assert error(call(loaded), dense()) < 1e-6
    several(monkeypatch, 1, 1)
    assert error(call(loaded), dense()) > 1e-2
    made.remove()


def test_rings_are_refused(loaded: Any, replaced: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    several(monkeypatch, 2, 1)
    with pytest.raises(DiffpatchError, match="ring_degree=2: no call sees all keys"):
        call(loaded)


def test_what_needs_more_is_refused(loaded: Any) -> None:
    with pytest.raises(BadParameter, match="layers are not told"):
        xdit.register(LOCAL, dense_layers=1)
    with pytest.raises(DiffpatchError, match=r"xDiT 0\.7.* has no backend SDPA_FAST"):
        xdit.register(LOCAL, member="SDPA_FAST")


@pytest.mark.parametrize("name", xdit._NAMES)
def test_another_version_is_named(loaded: Any, name: str, monkeypatch: Any) -> None:
    monkeypatch.delattr(importlib.import_module(xdit._BACKENDS), name)
    with pytest.raises(DiffpatchError, match=rf"xDiT 0\.7.* has no {name}"):
        xdit.register(LOCAL)


def test_other_arguments_are_named(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backends = importlib.import_module(xdit._BACKENDS)
    functions = backends.ATTENTION_FUNCTION_REGISTRY
    monkeypatch.setitem(functions, backends.AttentionBackendType.SDPA, lambda q, k, v: q)
    with pytest.raises(DiffpatchError, match="has no backend with the arguments query"):
        xdit.register(LOCAL)


def test_requests_in_turn_are_as_alone(loaded: Any, replaced: xdit.Replaced) -> None:
    """Of two sizes with as many tokens, over the same function."""
    alone = [sparse(), sparse(TokenGrid(1, 4, 6))]
    for _ in range(2):
        for expected, thw in zip(alone, (GRID.shape, (1, 4, 6)), strict=True):
            assert error(call(loaded, thw=thw), expected) < 1e-6
    assert error(*alone) > 1e-2
