"""The slots of other engines compute what `diffpatch.attention` does, and are undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

import diffpatch
from diffpatch import BadParameter, DiffpatchError, Neighborhood, TokenGrid
from diffpatch.adapters import diffusers_backend
from diffpatch.adapters.diffusers_backend import Backend
from diffpatch.adapters.plugin import Params, Plugin
from tests.pipelines.test_families import error
from tests.tiny import wan

GRID = TokenGrid(3, 2, 4, text_after=3)
LOCAL = Neighborhood(window=(1, 1, 3), stride=1)
Q, K, V = torch.randn(3, 2, GRID.num_tokens, 2, 16, generator=torch.Generator().manual_seed(0))


def dense(q: Any, k: Any, v: Any, mask: Any = None, causal: bool = False) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal).transpose(1, 2)


@pytest.fixture
def backend() -> Iterator[Backend]:
    made = diffusers_backend.register("diffpatch_local", LOCAL, grid=GRID)
    yield made
    made.remove()


def test_a_backend_is_the_functional_api(backend: Backend) -> None:
    expected = diffpatch.attention(Q, K, V, GRID, LOCAL, scale=0.3)
    assert error(expected, dense(Q, K, V)) > 1e-2
    out = dispatch_attention_fn(Q, K, V, scale=0.3, backend=AttentionBackendName("diffpatch_local"))
    assert torch.equal(out, expected)
    with diffusers.attention_backend("diffpatch_local"):
        assert torch.equal(dispatch_attention_fn(Q, K, V, scale=0.3), expected)


def test_a_backend_is_dense_where_it_does_not_fit(backend: Backend) -> None:
    name = AttentionBackendName("diffpatch_local")
    mask = torch.ones(2, 1, 1, GRID.num_tokens, dtype=torch.bool)
    mask[1, ..., -2:] = False
    out = dispatch_attention_fn(Q, K, V, mask, backend=name)
    torch.testing.assert_close(out, dense(Q, K, V, mask))
    cross = dispatch_attention_fn(Q, K[:, :5], V[:, :5], backend=name)
    torch.testing.assert_close(cross, dense(Q, K[:, :5], V[:, :5]))
    causal = dispatch_attention_fn(Q, K, V, is_causal=True, backend=name)
    torch.testing.assert_close(causal, dense(Q, K, V, causal=True))


def test_a_model_takes_a_backend_and_gives_it_back() -> None:
    model = wan()
    plain = model.run()
    with diffpatch.patched(model.pipe, LOCAL, dense_steps=0):
        expected = model.run()
    before = list(AttentionBackendName), dict(AttentionBackendName.__members__)
    made = diffusers_backend.register("diffpatch_local", LOCAL, grid=TokenGrid(3, 2, 4))
    model.pipe.transformer.set_attention_backend("diffpatch_local")
    assert error(model.run(), expected) < 1e-6
    model.pipe.transformer.reset_attention_backend()
    made.remove()
    made.remove()
    assert (list(AttentionBackendName), dict(AttentionBackendName.__members__)) == before
    assert torch.equal(model.run(), plain)  # the choice for everyone is undone, too
    with pytest.raises(ValueError, match="diffpatch_local"):
        AttentionBackendName("diffpatch_local")


@pytest.mark.parametrize(
    ("name", "method", "words"),
    [
        ("native", LOCAL, "new to diffusers"),
        ("Local", LOCAL, "in lower case"),
        ("diffpatch_window", "window", "window differs between layers or steps"),
        ("diffpatch_temporal", "window+temporal", "differs between layers or steps"),
    ],
)
def test_what_a_backend_cannot_be(name: str, method: Any, words: str) -> None:
    with pytest.raises(BadParameter, match=words):
        diffusers_backend.register(name, method, grid=GRID)
    assert AttentionBackendName.__members__.keys() & {"Local", "diffpatch_window"} == set()


def engine(attend: Callable[..., torch.Tensor], begin: Callable[..., None]) -> list[torch.Tensor]:
    """A stand-in for the engine: three steps, two branches, two layers, each with its tensors."""
    out = []
    for step in range(3):
        for branch in range(2):
            begin(step, GRID, branch=branch)
            for layer in range(2):
                q = Q + 0.01 * step + branch + layer
                out.append(attend(q, K, V * (branch + 1), Params(layer), False, 0.3))
    return out


@pytest.mark.parametrize("method", ["window", "neighborhood+temporal"])
def test_a_plugin_is_the_functional_api_with_state(method: str) -> None:
    plugin = Plugin(method, dense_steps=1, dense_layers=1)
    now: dict[str, Any] = {}
    states: dict[Any, dict[str, Any]] = {}

    def begin(step: int, grid: TokenGrid, branch: int) -> None:
        now.update(step=step, branch=branch)

    def attend(q: Any, k: Any, v: Any, params: Params, *_: Any) -> torch.Tensor:
        if now["step"] < 1 or params.layer < 1:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2)
        state = states.setdefault((params.layer, now["branch"]), {})
        return diffpatch.attention(
            q, k, v, GRID, method, scale=0.3, layer=params.layer, step=now["step"], state=state
        )

    expected = engine(attend, begin)
    for _ in range(2):  # a second run starts afresh
        found = engine(plugin, plugin.begin)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_plugin_is_dense_where_it_does_not_fit() -> None:
    plugin = Plugin(LOCAL)
    with pytest.raises(DiffpatchError, match="before begin"):
        plugin(Q, K, V, Params(0))
    plugin.begin(0, GRID)
    mask = torch.arange(GRID.num_tokens).expand(2, -1) < torch.tensor([[27], [20]])
    torch.testing.assert_close(
        plugin(Q, K, V, Params(0, mask)), dense(Q, K, V, mask[:, None, None])
    )
    torch.testing.assert_close(
        plugin(Q, K[:, :5], V[:, :5], Params(0)), dense(Q, K[:, :5], V[:, :5])
    )
    torch.testing.assert_close(plugin(Q, K, V, Params(0), True), dense(Q, K, V, causal=True))
