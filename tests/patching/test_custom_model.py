"""Bringing one's own model: three lines, no row in any table."""

from __future__ import annotations

import contextlib
import gc
import weakref
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

import diffpatch
from diffpatch import BadParameter, Neighborhood, TokenGrid, UnknownFamily
from diffpatch.errors import DiffpatchError

LOCAL = Neighborhood(window=(1, 3, 3), stride=1)
GRID = TokenGrid(2, 4, 6, text_before=5, text_after=3)


class Processor:
    """As diffusers' own: projects, then calls the dispatcher of its module."""

    _attention_backend = None

    def __call__(self, attn: Attention, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)) for t in attn.qkv(x).chunk(3, -1))
        out = dispatch_attention_fn(q, k, v, backend=self._attention_backend)
        return out.flatten(2)


class OlderProcessor(Processor):
    """As diffusers' older ones: calls torch's operator, (B, H, S, D)."""

    def __call__(self, attn: Attention, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in attn.qkv(x).chunk(3, -1))
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class HelpedProcessor(Processor):
    """Leaves the call to a function of its module, which imported the operator by name."""

    def __call__(self, attn: Attention, x: torch.Tensor) -> torch.Tensor:
        return _attend(*attn.qkv(x).chunk(3, -1))


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class HiddenProcessor(Processor):
    """Reaches the operator in a way that cannot be rebound."""

    def __call__(self, attn: Attention, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in attn.qkv(x).chunk(3, -1))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self, features: int, processor: Processor) -> None:
        super().__init__()
        self.qkv = nn.Linear(features, 3 * features)
        self.processor = processor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.processor(self, x)


class Model(nn.Module):
    """Five prompt tokens, the video, three registers; every block attends over all of them."""

    def __init__(self, processor: type[Processor] = Processor, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(4, 32)
        self.blocks = nn.ModuleList(Attention(32, processor()) for _ in range(layers))
        self.registers = nn.Parameter(torch.randn(1, 3, 32))

    def forward(self, video: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(video.flatten(2).mT)
        x = torch.cat([prompt, tokens, self.registers.expand(len(video), -1, -1)], 1)
        for block in self.blocks:
            x = x + block(x)
        return x


def inputs(height: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "video": torch.randn(2, 4, 2, height, 6, generator=generator),
        "prompt": torch.randn(2, 5, 32, generator=generator),
    }


def masked(model: Any, video: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """The model written out again, under the dense mask of `LOCAL`."""
    mask = LOCAL.pattern(GRID).dense()
    tokens = model.embed(video.flatten(2).mT)
    x = torch.cat([prompt, tokens, model.registers.expand(len(video), -1, -1)], 1)
    for block in model.blocks:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in block.qkv(x).chunk(3, -1))
        scores = (q @ k.mT / 4).masked_fill(~mask, -torch.inf)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return x


def grid_of(video: torch.Tensor, prompt: torch.Tensor, **_: Any) -> TokenGrid:
    frames, height, width = video.shape[2:]
    return TokenGrid(frames, height, width, text_before=prompt.shape[1], text_after=3)


@pytest.mark.parametrize("processor", [Processor, OlderProcessor, HelpedProcessor])
@pytest.mark.parametrize("grid", [GRID, grid_of], ids=["grid", "function"])
@torch.no_grad()
def test_three_lines(processor: type[Processor], grid: Any) -> None:
    model = Model(processor)
    plain = model(**inputs())
    diffpatch.patch(model, LOCAL, grid=grid, modules=r"blocks\.\d+")
    torch.testing.assert_close(model(**inputs()), masked(model, **inputs()))
    report = diffpatch.report(model)
    assert (report.calls, report.dense_calls) == (2, 0)
    assert report.kept == pytest.approx(LOCAL.pattern(GRID).kept)
    diffpatch.unpatch(model)
    assert torch.equal(model(**inputs()), plain)


@torch.no_grad()
def test_a_function_follows_every_resolution_and_a_grid_does_not() -> None:
    model, tall = Model(), inputs(height=8)
    plain = model(**tall)
    diffpatch.patch(model, LOCAL, grid=grid_of, modules=r"blocks\.\d+")
    model(**inputs())
    model(tall["video"], tall["prompt"])  # positional arguments reach the function by name
    assert diffpatch.report(model).dense_calls == 0
    diffpatch.patch(model, LOCAL, grid=GRID, modules=r"blocks\.\d+")
    assert torch.equal(model(**tall), plain)
    assert list(diffpatch.report(model).reasons) == [
        "a sequence of 104 tokens does not hold the grid (2, 4, 6, 5, 3)"
    ]


def test_only_the_named_modules_are_patched() -> None:
    model = Model(layers=3)
    diffpatch.patch(model, LOCAL, grid=GRID, modules=r"blocks\.[02]")
    model(**inputs())
    assert diffpatch.report(model).layers == 2
    assert type(model.blocks[1].processor).__name__ == "Processor"


def test_gradients_pass_through() -> None:
    model = Model()
    diffpatch.patch(model, LOCAL, grid=GRID, modules=r"blocks\.\d+")
    model(**inputs()).square().sum().backward()
    got = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    masked(model, **inputs()).square().sum().backward()
    for ours, reference in zip(got, (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_compiled_whole() -> None:
    model = Model()
    diffpatch.patch(model, LOCAL, grid=grid_of, modules=r"blocks\.\d+")
    expected = model(**inputs())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs()), expected)


def test_what_is_missing_is_named() -> None:
    model = Model()
    with pytest.raises(UnknownFamily, match=r"pass grid= and modules="):
        diffpatch.patch(model, LOCAL)
    with pytest.raises(BadParameter, match="pass both or neither"):
        diffpatch.patch(model, LOCAL, grid=GRID)
    with pytest.raises(UnknownFamily, match=r"no attention module of Model matches 'layers"):
        diffpatch.patch(model, LOCAL, grid=GRID, modules=r"layers\.\d+")


def test_a_processor_whose_attention_is_out_of_reach_is_refused() -> None:
    model = Model(HiddenProcessor)
    with pytest.raises(DiffpatchError, match=r"HiddenProcessor.__call__ calls neither"):
        diffpatch.patch(model, LOCAL, grid=GRID, modules=r"blocks\.\d+")
    assert type(model.blocks[0].processor).__name__ == "HiddenProcessor"


def test_patterns_of_the_plain_function_are_few_and_go() -> None:
    """It keeps those of a few grids, with their copies on devices; later ones take their place."""
    made = diffpatch.functional.PATTERNS
    made.clear()
    known = weakref.ref(diffpatch.functional._pattern(LOCAL, GRID, None, None))
    most = made.size
    assert most <= 8
    gc.disable()  # nothing may wait for it
    try:
        for width in range(2, 2 + most):
            q = torch.zeros(1, 2 * width, 1, 8)
            diffpatch.attention(q, q, q, (1, 2, width), "window")
        assert known() is None and len(made) == most
    finally:
        gc.enable()


def test_more_runs_of_the_plain_function_than_it_keeps_patterns_are_as_alone() -> None:
    """A state is about one pattern; made anew in the middle of a run, that would be another."""
    grids = [TokenGrid(2, 3, width) for width in range(2, 12)]

    def step(i: int, grid: TokenGrid, state: dict[str, Any]) -> torch.Tensor:
        random = torch.Generator().manual_seed(i)
        q, k, v = torch.randn(3, 1, grid.num_tokens, 2, 8, generator=random)
        method = diffpatch.Temporal(
            over=diffpatch.Window(window=(-1, 1, 2), shift="none"), refresh=9
        )
        return diffpatch.attention(q, k, v, grid, method, step=i, state=state)

    states: list[dict[str, Any]] = [{} for _ in grids]
    alone: list[list[torch.Tensor]] = []
    for grid in grids:
        own: dict[str, Any] = {}
        alone.append([step(i, grid, own) for i in range(3)])
    for i in range(3):
        for expected, grid, state in zip(alone, grids, states, strict=True):
            assert torch.equal(step(i, grid, state), expected[i])


@pytest.mark.parametrize("how", [diffpatch.patch, diffpatch.patched])
@torch.no_grad()
def test_what_fails_as_it_is_put_on_leaves_the_earlier_patch(how: Any) -> None:
    model = Model()
    own = model.blocks[0].processor
    described: dict[str, Any] = {"grid": GRID, "modules": r"blocks\.\d+"}
    diffpatch.patch(model, LOCAL, **described)
    expected = masked(model, **inputs())
    with (
        pytest.raises(BadParameter, match="rotary embedding is not known"),
        contextlib.ExitStack() as stack,
    ):
        made = how(model, "longer", trained=1, **described)
        stack.enter_context(made)
    torch.testing.assert_close(model(**inputs()), expected)
    assert diffpatch.report(model).dense_calls == 0
    diffpatch.unpatch(model)
    assert model.blocks[0].processor is own
