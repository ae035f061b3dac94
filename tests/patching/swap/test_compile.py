"""torch.compile over patched models: one graph, no graph per layer, step or prompt, exact undo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler
from torch._dynamo.testing import CompileCounterWithBackend

import diffpatch
from diffpatch import Window
from tests.tiny import Tiny, flux, wan

LOCAL = Window(window=(-1, 1, 2), shift="layer")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def prompts(tiny: Tiny) -> list[torch.Tensor]:
    return [tiny.run(prompt=p) for p in ("a cat", "dog!")]


def equal(a: list[torch.Tensor], b: list[torch.Tensor], atol: float = 1e-5) -> bool:
    return all(torch.allclose(x, y, atol=atol) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("maker", [wan, flux], ids=lambda f: f.__name__)
@pytest.mark.parametrize("order", ["patch first", "compile first"])
def test_a_whole_compiled_transformer_is_one_graph(maker: Any, order: str) -> None:
    tiny = maker()
    plain = prompts(tiny)
    with diffpatch.patched(tiny.pipe, LOCAL, dense_steps=1):
        expected = prompts(tiny)
        kept = diffpatch.report(tiny.pipe).kept_per_step
    counter = CompileCounterWithBackend("aot_eager")
    original = tiny.pipe.transformer
    if order == "patch first":
        diffpatch.patch(tiny.pipe, LOCAL, dense_steps=1)
    tiny.pipe.transformer = torch.compile(original, fullgraph=True, backend=counter)
    if order == "compile first":
        diffpatch.patch(tiny.pipe, LOCAL, dense_steps=1)
    assert equal(prompts(tiny), expected)
    # Reading Flux's grid off its image ids is a small graph of its own; nothing else may be.
    assert counter.frame_count == (2 if maker is flux else 1)
    assert diffpatch.report(tiny.pipe).kept_per_step == kept
    diffpatch.unpatch(tiny.pipe)
    assert equal(prompts(tiny), plain)


@pytest.mark.parametrize("maker", [wan, flux], ids=lambda f: f.__name__)
def test_compiled_blocks_share_their_graphs(maker: Any) -> None:
    tiny = maker(layers=12)  # more layers than dynamo would recompile for

    def graphs() -> int:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        tiny.pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
        outputs.append(prompts(tiny))
        return counter.frame_count

    outputs: list[list[torch.Tensor]] = []
    with diffpatch.patched(tiny.pipe, LOCAL, dense_steps=1):
        expected = prompts(tiny)
    unpatched = graphs()
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=1)
    assert graphs() == unpatched
    assert equal(outputs[-1], expected)
    diffpatch.unpatch(tiny.pipe)
    assert graphs() == unpatched
    assert all(torch.equal(a, b) for a, b in zip(outputs[0], outputs[-1], strict=True))


def test_inductor_runs_the_operator() -> None:
    tiny = wan(layers=1)
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=0)
    expected = tiny.run()
    tiny.pipe.transformer.compile_repeated_blocks(fullgraph=True)
    assert torch.allclose(tiny.run(), expected, atol=1e-4)


def test_a_compiled_transformer_follows_a_scheduler_set_later() -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=1)
    tiny.pipe.transformer = torch.compile(tiny.pipe.transformer, backend="eager")
    config = tiny.pipe.scheduler.config
    tiny.pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    tiny.run(num_inference_steps=4)
    kept = diffpatch.report(tiny.pipe).kept_per_step
    assert [k == 1.0 for k in kept] == [True, False, False, False]


@pytest.mark.parametrize("skips", [{"cache": 1e-12}, {"hold": 1e-12}])
def test_graphs_may_break_in_a_forward_that_something_stands_in_for(skips: dict[str, Any]) -> None:
    tiny = wan(layers=3)
    plain = prompts(tiny)
    tiny.pipe.transformer.compile(backend="eager")
    if "cache" not in skips:  # whose hooks break graphs
        tiny.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e-12))
    diffpatch.patch(tiny.pipe, "dense", **skips)
    assert equal(prompts(tiny), plain)
    diffpatch.unpatch(tiny.pipe)
    assert equal(prompts(tiny), plain)
