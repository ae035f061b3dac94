"""Every method with parameters drawn from its own annotations, on grids of any size, in any dtype.

A method refuses parameters in a sentence, or attends as fp64 says: one that only skips is dense
attention under its own mask; the others stay finite, blind to masked keys and, where nothing is
left out, dense.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from diffpatch.errors import BadParameter
from diffpatch.methods.base import AttentionCall, Method
from diffpatch.methods.dynamic.method import RESTS
from diffpatch.methods.linear.method import FARS
from diffpatch.methods.packed import pattern_on
from diffpatch.methods.registry import list_methods
from diffpatch.patterns.grid import TokenGrid
from tests.proof.hostile import LONG, examples

WORDS = {
    "rule": ["tiles", "published", "error", "pooled", "sol"], "rest": [*RESTS], "far": [*FARS],
    "shift": ["layer", "step", "random", "count", "none"], "mode": ["tail", "skip", "mask"],
    "order": ["forward", "reverse", "alternate"],
}  # fmt: skip
LEFT_OUT = {"weights", "allow_untrained", "layers", "budget_gib"}  # files, and models
METHODS = {n: info.cls for n, info in list_methods().items() if not info.wraps}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
MOST = 4096 if LONG else 700  # tokens: the reference holds all pairs

sides = st.one_of(st.integers(1, 6), st.integers(1, 64))
texts = st.one_of(st.just(0), st.integers(0, 9), st.integers(0, 512 if LONG else 140))


@st.composite
def grids(draw: st.DrawFn) -> TokenGrid:
    """1 to 64 along each axis, as many tokens as the reference can hold."""
    shape = [draw(sides)]
    for _ in range(2):
        room = max(1, MOST // 2 // math.prod(shape))
        shape.append(min(draw(sides), room))
    order = draw(st.permutations(shape))
    return TokenGrid(order[0], order[1], order[2], draw(texts), draw(texts))


def drawn(kind: Any, name: str) -> st.SearchStrategy[Any]:
    """Values of an annotated type, sensible ones and some that are not."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is typing.Annotated:
        return drawn(inner[0], name)
    if origin is Literal:
        return st.sampled_from(inner)
    if origin in (Union, types.UnionType):
        return st.one_of(*(drawn(one, name) for one in inner))
    if origin is tuple and inner[-1:] == (Ellipsis,):
        return st.lists(drawn(inner[0], name), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*(drawn(one, name) for one in inner))
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.one_of(st.integers(1, 8), st.sampled_from([-1, 0, 16, 32, 64, 1000]))
    if kind is float:
        return st.one_of(st.floats(0.05, 1), st.sampled_from([-1.0, 0.0, 1.0, 1.5, 3.0]))
    if kind is str:
        return st.sampled_from([*WORDS.get(name, ["?"])])
    return st.none()


@st.composite
def methods(draw: st.DrawFn, cls: type[Method]) -> dict[str, Any]:
    """Some parameters of a method."""
    kinds = typing.get_type_hints(cls, include_extras=True)
    names = [f.name for f in dataclasses.fields(cls) if f.name not in LEFT_OUT]
    chosen = draw(st.lists(st.sampled_from(names), unique=True, max_size=4)) if names else []
    return {name: draw(drawn(kinds[name], name)) for name in chosen}


def by_fp64(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention by its definition; seen is bool (B, H, S, S)."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num()
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


@pytest.mark.parametrize("name", METHODS)
@examples(12)
@given(data=st.data(), grid=grids())
def test_a_method_is_what_it_says(name: str, data: st.DataObject, grid: TokenGrid) -> None:
    cls = METHODS[name]
    layer, step = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 5))
    batch, key_heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    heads = key_heads * data.draw(st.integers(1, 3))
    dtype = data.draw(st.sampled_from([*TOLERANCE]))
    try:
        method = cls(**data.draw(methods(cls)))
        pattern = pattern_on(method, grid, method.variant(layer, step)).for_heads(heads)
    except BadParameter as error:
        assert 10 < len(str(error)) < 900 and "\n" not in str(error)
        return
    assume(grid.num_tokens <= 2 * MOST)
    assert 0 < pattern.kept <= 1 + 1e-9
    pattern.blocks.validate()
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    size = data.draw(st.sampled_from([8, 12, 32]))

    def noise(count: int) -> torch.Tensor:
        shape = (batch, grid.num_tokens, count, size)
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    q, k, v = noise(heads), noise(key_heads), noise(key_heads)
    mask = None
    if data.draw(st.booleans()):
        mask = torch.rand(batch, grid.num_tokens, generator=random) < 0.8
        mask[:, -1] = True
    scale = data.draw(st.sampled_from([None, 0.1, 0.5]))
    call = AttentionCall(
        pattern, scale=scale, key_mask=mask, backend="torch", layer=layer, step=step, total=8
    )
    done = method.attend(q, k, v, call)
    assert done.out.shape == q.shape and done.out.dtype == dtype
    assert torch.isfinite(done.out).all() and 0 < float(done.kept) <= 1 + 1e-6
    factor = size**-0.5 if scale is None else scale
    seen = torch.ones(1, grid.num_tokens, grid.num_tokens, dtype=torch.bool)
    if method.only_skips:
        seen = pattern.dense()
        groups = pattern.blocks.head_pattern
        seen = seen if groups is None else seen[groups.long()]
        factor *= method.softmax_factor()
    seen = seen[None] if mask is None else seen[None] & mask[:, None, None]
    if method.only_skips or float(done.kept) > 1 - 1e-9:
        expected = by_fp64(q, k, v, seen, factor)
        wrong = float((done.out.double() - expected).norm() / expected.norm().clamp(min=1e-9))
        assert wrong < TOLERANCE[dtype], wrong
    if mask is not None:
        hidden = ~mask[..., None, None]
        other = method.attend(
            q, k.masked_fill(hidden, 30.0), v.masked_fill(hidden, 30.0),
            dataclasses.replace(call, state={}),
        )  # fmt: skip
        assert torch.equal(other.out, done.out)
