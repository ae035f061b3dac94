"""A method as a backend of diffusers: what it computes, for whom, and that it goes again."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

import diffpatch
from diffpatch import BadParameter, DiffpatchError, Neighborhood, TokenGrid, internals
from diffpatch.adapters import diffusers_backend
from diffpatch.adapters.diffusers_backend import GridBackend
from tests.pipelines.test_families import error
from tests.tiny import wan
from tests.tiny.videos import cosmos

GRID = TokenGrid(3, 2, 4, text_after=3)
LOCAL = Neighborhood(window=(1, 1, 3), stride=1)
Q, K, V = torch.randn(3, 2, GRID.num_tokens, 2, 16, generator=torch.Generator().manual_seed(0))


def dense(q: Any, k: Any, v: Any, mask: Any = None, causal: bool = False) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal).transpose(1, 2)


@pytest.fixture
def backend() -> Iterator[GridBackend]:
    made = diffusers_backend.register("diffpatch_local", LOCAL, grid=GRID)
    yield made
    made.remove()


def test_a_backend_is_the_functional_api(backend: GridBackend) -> None:
    expected = diffpatch.attention(Q, K, V, GRID, LOCAL, scale=0.3)
    assert error(expected, dense(Q, K, V)) > 1e-2
    out = dispatch_attention_fn(Q, K, V, scale=0.3, backend=AttentionBackendName("diffpatch_local"))
    assert torch.equal(out, expected)
    with diffusers.attention_backend("diffpatch_local"):
        assert torch.equal(dispatch_attention_fn(Q, K, V, scale=0.3), expected)


def test_a_backend_is_dense_where_it_does_not_fit(backend: GridBackend) -> None:
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


def test_a_choice_for_one_model_is_not_everybodys(backend: GridBackend) -> None:
    chosen, other = wan(), wan(layers=3)
    plain, before = chosen.run(), other.run()
    made = diffusers_backend.register("diffpatch_here", LOCAL, grid=TokenGrid(3, 2, 4))
    try:
        chosen.pipe.transformer.set_attention_backend("diffpatch_here")
        assert error(chosen.run(), plain) > 1e-3
        assert torch.equal(other.run(), before)
        assert torch.equal(wan(layers=3).run(), before)  # nor that of a model made since
        chosen.pipe.transformer.reset_attention_backend()
        assert torch.equal(other.run(), before)
        with diffusers.attention_backend("diffpatch_here"):  # this one is everybody's
            assert error(other.run(), before) > 1e-3
        assert torch.equal(other.run(), before)
    finally:
        made.remove()


def test_what_does_not_fit_gets_what_would_have_run(backend: GridBackend) -> None:
    """Cross-attention of a model that chose ours uses the backend that is active without it."""
    name = AttentionBackendName("diffpatch_local")
    registry = diffusers_backend._registry()
    asked = []

    def other(query: Any, key: Any, value: Any) -> torch.Tensor:
        asked.append(key.shape[1])
        return query

    native = registry._backends[AttentionBackendName._NATIVE_MATH]
    registry.register(AttentionBackendName._NATIVE_MATH)(other)
    try:
        with diffusers.attention_backend("_native_math"):
            dispatch_attention_fn(Q, K[:, :5], V[:, :5], backend=name)
            dispatch_attention_fn(Q, K, V, backend=name)
    finally:
        registry.register(AttentionBackendName._NATIVE_MATH)(native)
    assert asked == [5]


def test_set_attention_backend_is_diffusers_own_again() -> None:
    mixin: Any = diffusers.ModelMixin
    own = mixin.set_attention_backend
    first = diffusers_backend.register("diffpatch_a", LOCAL, grid=GRID)
    second = diffusers_backend.register("diffpatch_b", LOCAL, grid=GRID)
    first.remove()
    model = wan().pipe.transformer
    model.set_attention_backend("_native_math")  # others' names do what they did
    assert diffusers_backend._registry()._active_backend.value == "_native_math"
    model.set_attention_backend("native")
    second.remove()
    assert mixin.set_attention_backend is own


def test_a_wrapper_of_somebody_else_stays() -> None:
    mixin: Any = diffusers.ModelMixin
    made = diffusers_backend.register("diffpatch_a", LOCAL, grid=GRID)
    wrapped = mixin.set_attention_backend
    try:

        @functools.wraps(wrapped)
        def theirs(self: Any, backend: str) -> None:
            wrapped(self, backend)

        mixin.set_attention_backend = theirs
        made.remove()
        assert mixin.set_attention_backend is theirs
        wan().pipe.transformer.set_attention_backend("native")
    finally:
        mixin.set_attention_backend = wrapped.__wrapped__


def test_a_model_that_never_asks_is_refused(backend: GridBackend) -> None:
    with pytest.raises(DiffpatchError, match=r"CosmosTransformer3DModel asks.*attention_backend\("):
        cosmos().pipe.transformer.set_attention_backend("diffpatch_local")


@pytest.mark.parametrize("name", [*internals.BACKEND_TABLES, internals.ACTIVE_BACKEND, "all"])
def test_changed_insides_are_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = diffusers_backend._registry()
    if name == "all":
        monkeypatch.delattr(attention_dispatch, internals.BACKENDS)
    else:
        monkeypatch.delattr(registry, name)
    with pytest.raises(DiffpatchError, match=r"changed inside.*is gone"):
        diffusers_backend.register("diffpatch_a", LOCAL, grid=GRID)
