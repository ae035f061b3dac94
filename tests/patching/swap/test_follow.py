"""What others change in a processor's code is what runs, whenever they change it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers import transformer_flux, transformer_wan

import diffpatch
from diffpatch import DiffpatchError, Window
from tests.tiny import Tiny, flux, images, more, videos, wan

WHOLE: dict[str, Any] = {"window": -1, "dense_steps": 0}  # leaves nothing out: all must stay
LOCAL: dict[str, Any] = {"window": 0.5, "shift": "none", "dense_steps": 0}
Processor = transformer_flux.FluxAttnProcessor
Call = Callable[..., Any]
CALLS = 0


def times(out: Any, factor: float) -> Any:
    return tuple(x * factor for x in out) if isinstance(out, tuple) else out * factor


def halved(function: Call) -> Call:
    @functools.wraps(function)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return times(function(self, *args, **kwargs), 0.5)

    return call


def counted(function: Call) -> Call:
    seen = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        global CALLS
        nonlocal seen
        CALLS, seen = CALLS + 1, seen + 1
        return times(function(*args, **kwargs), 1 + seen / 100)

    call.__signature__ = __import__("inspect").signature(function)  # type: ignore[attr-defined]
    return call


class Decorated(Processor):
    __call__ = halved(Processor.__call__)


class Inherited(Decorated):
    pass


class Twice(Processor):
    __call__ = halved(halved(Processor.__call__))


class Above(Processor):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return times(super().__call__(*args, **kwargs), 0.5)


class DecoratedAbove(Above):
    @halved
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


class Untold(Processor):
    """Reached through an object, whose inside nobody can see."""

    __call__ = functools.partialmethod(Processor.__call__)


ORIGINAL = Processor.__call__


class ByName(Processor):
    """Reached through a name of another module than the function's own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return times(ORIGINAL(self, *args, **kwargs), 0.5)


def using(processor: Any) -> Tiny:
    model = flux()
    for module in model.pipe.transformer.modules():
        if hasattr(module, "processor"):
            module.processor = processor()
    return model


def same_as_unpatched(model: Tiny) -> None:
    """Patched with everything kept and with less, it does what it does unpatched, sparsely."""
    plain = model.run()
    diffpatch.patch(model.pipe, "window", **WHOLE)
    assert torch.equal(model.run(), plain)
    diffpatch.patch(model.pipe, "window", **LOCAL)
    assert not torch.allclose(model.run(), plain, atol=1e-4)
    assert diffpatch.report(model.pipe).dense_calls == 0
    diffpatch.unpatch(model.pipe)
    assert torch.equal(model.run(), plain)


@pytest.mark.parametrize(
    "processor",
    [Decorated, Inherited, Twice, Above, DecoratedAbove, ByName],
    ids=lambda c: c.__name__,
)
def test_own_processors_run_as_they_are(processor: Any) -> None:
    same_as_unpatched(using(processor))
    assert not torch.equal(using(processor).run(), using(Processor).run())


@pytest.fixture(params=["fresh", "patched before"])
def model(request: pytest.FixtureRequest) -> Tiny:
    if request.param == "patched before":
        diffpatch.patch(flux().pipe, "window", **WHOLE)
    return flux()


def own_rope(x: Any, freqs: Any, **kwargs: Any) -> Any:
    return times(apply_rotary_emb(x, freqs, **kwargs), 0.7)


CHANGES = [
    (transformer_flux, "apply_rotary_emb", own_rope),
    (transformer_flux, "dispatch_attention_fn", halved(dispatch_attention_fn)),
    (Processor, "__call__", halved(ORIGINAL)),
    (Processor, "__call__", lambda self, *a, **k: times(ORIGINAL(self, *a, **k), 0.5)),
]  # fmt: skip
NAMES = ["a function", "the dispatcher", "a decorator", "a lambda"]


@pytest.mark.parametrize(("place", "name", "value"), CHANGES, ids=NAMES)
def test_changes_before_a_patch_are_followed(
    model: Tiny, place: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = model.run()
    monkeypatch.setattr(place, name, value)
    assert not torch.equal(model.run(), stock)
    if name == "dispatch_attention_fn":  # sparse calls are ours in its place
        plain = model.run()
        diffpatch.patch(model.pipe, "window", **WHOLE)
        assert torch.equal(model.run(), plain)
    else:
        same_as_unpatched(model)


@pytest.mark.parametrize(("place", "name", "value"), CHANGES, ids=NAMES)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_changes_under_a_patch_are_followed_and_gone_when_taken_back(
    place: Any, name: str, value: Any, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    model = flux()
    stock = model.run()
    with monkeypatch.context() as patches:
        patches.setattr(place, name, value)
        changed = model.run()
    diffpatch.patch(model.pipe, "window", **WHOLE)
    if compiled:
        model.pipe.transformer = torch.compile(
            model.pipe.transformer, fullgraph=True, backend="eager"
        )
    assert torch.allclose(model.run(), stock, atol=1e-6)
    monkeypatch.setattr(place, name, value)
    assert torch.allclose(model.run(), changed, atol=1e-6)
    monkeypatch.undo()
    assert torch.allclose(model.run(), stock, atol=1e-6)


def test_counters_of_a_decorator_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processor, "__call__", counted(ORIGINAL))
    before, plain = CALLS, flux().run()
    each = CALLS - before
    monkeypatch.setattr(Processor, "__call__", counted(ORIGINAL))
    model = flux()
    diffpatch.patch(model.pipe, "window", **WHOLE)
    assert torch.equal(model.run(), plain)
    assert before + 2 * each == CALLS


def test_what_cannot_be_followed_is_refused_before_and_after(
    model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DiffpatchError, match=r"Untold.__call__ calls neither"):
        diffpatch.patch(using(Untold).pipe, "window", **WHOLE)
    diffpatch.patch(model.pipe, "window", **WHOLE)
    monkeypatch.setattr(Processor, "__call__", functools.partialmethod(ORIGINAL))
    with pytest.raises(DiffpatchError, match=r"FluxAttnProcessor.__call__ calls neither"):
        model.run()
    diffpatch.unpatch(model.pipe)
    model.run()


def test_code_that_writes_globals_beside_attention_is_refused() -> None:
    names: dict[str, Any] = {"F": F, "__name__": __name__}
    exec(
        "class Writer:\n"
        "    def __call__(self, q):\n"
        "        global seen\n"
        "        seen = 1\n"
        "        return F.scaled_dot_product_attention(q, q, q)\n",
        names,
    )
    with pytest.raises(DiffpatchError, match="writes the global seen"):
        diffpatch.patch(using(names["Writer"]).pipe, "window", **WHOLE)


def test_nothing_of_others_is_written_to() -> None:
    places = {m.__name__: dict(vars(m)) for m in (transformer_flux, transformer_wan, F)}
    modules = set(sys.modules)
    for model in (flux(), wan()):
        diffpatch.patch(model.pipe, "window", **LOCAL)
        model.run()
        assert all(dict(vars(sys.modules[name])) == was for name, was in places.items())
        diffpatch.unpatch(model.pipe)
    assert not {name for name in set(sys.modules) - modules if "diffpatch_" in name}


# The signature of SageAttention's drop-in for torch's operator.
def sageattn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensor_layout: str = "HND",
    is_causal: bool = False, sm_scale: float | None = None, return_lse: bool = False, **kwargs: Any,
) -> torch.Tensor:  # fmt: skip
    assert tensor_layout in ("HND", "NHD"), tensor_layout
    return OPERATOR(q, k, v, is_causal=is_causal, scale=sm_scale) * 0.9


OPERATOR = F.scaled_dot_product_attention
OLDER = [videos.cogvideox, images.sd3, images.pixart, images.auraflow]


@pytest.mark.parametrize("build", OLDER, ids=lambda f: f.__name__)
def test_an_operator_in_place_of_torchs_is_called_as_diffusers_calls_it(
    build: Callable[[], Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    stock = model.run()
    monkeypatch.setattr(F, "scaled_dot_product_attention", sageattn)
    replaced = model.run()
    assert not torch.equal(replaced, stock)
    for first in ("replaced", "stock"):  # when the patch is made
        diffpatch.patch(model.pipe, "neighborhood", window=0.6, dense_steps=1.0)
        assert torch.equal(model.run(), replaced if first == "replaced" else stock)
        monkeypatch.undo()
        assert torch.equal(model.run(), stock)
        monkeypatch.setattr(F, "scaled_dot_product_attention", sageattn)
        assert torch.equal(model.run(), replaced)
        diffpatch.patch(model.pipe, "neighborhood", window=0.5, stride=1, dense_steps=0)
        model.run()
        assert diffpatch.report(model.pipe).kept < 1
        diffpatch.unpatch(model.pipe)
        monkeypatch.undo()


@pytest.mark.parametrize("scale", [None, 0.3])
def test_dense_calls_keep_the_scale_of_the_model(scale: float | None) -> None:
    from diffpatch.patching.swap import rebind
    from tests.patching.test_custom_model import GRID, LOCAL, Model, OlderProcessor

    model = Model(OlderProcessor)
    diffpatch.patch(model, LOCAL, grid=GRID, modules=r"blocks\.\d+")
    q, k, v = torch.randn(3, 1, 20, 2, 8, generator=torch.Generator().manual_seed(0))
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], scale=scale)
    out = rebind.dense(model.blocks[0].processor, q, k, v, None, scale)
    assert torch.equal(out, expected.transpose(1, 2))


def test_dense_layers_of_lumina_next_keep_its_proportional_attention() -> None:
    model = more.lumina_next()
    own = model.run()
    longer: dict[str, Any] = {"cross_attention_kwargs": {"base_sequence_length": 6}}
    plain = model.run(**longer)
    assert float((plain - own).abs().max()) > 1e-4
    diffpatch.patch(model.pipe, Window(window=(-1, 1, 2)), dense_layers=1.0)
    assert torch.equal(model.run(**longer), plain)
    assert diffpatch.report(model.pipe).reasons == {"dense layers": 2}


@pytest.fixture(autouse=True)
def same_operator() -> Iterator[None]:
    yield
    assert F.scaled_dot_product_attention is OPERATOR
