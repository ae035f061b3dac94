"""cache-dit itself over and under a patch: its caches, its choice of a backend, and both undone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cache_dit
import pytest
import torch

import diffpatch
from diffpatch import Neighborhood, TokenGrid
from diffpatch.adapters import diffusers_backend
from tests.pipelines.test_families import error
from tests.tiny import Tiny, flux, wan

LOCAL = Neighborhood(window=(1, 1, 3), stride=1)
STEPS = 6
NEVER, ALWAYS = 0.0, 1e9  # how far a residual may be off for its block to be skipped


def enable(pipe: Any, threshold: float, **options: Any) -> None:
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1,
        residual_diff_threshold=threshold, num_inference_steps=STEPS,
    )  # fmt: skip
    cache_dit.enable_cache(pipe, cache_config=config, **options)


def insides(pipe: Any) -> list[Any]:
    """What a patch and a cache touch."""
    model = pipe.transformer
    kinds = [type(pipe), type(pipe).__call__, model.forward.__func__, type(pipe.scheduler)]
    return kinds + [m.processor for m in model.modules() if hasattr(m, "processor")]


@pytest.fixture(params=["wan", "flux"])
def tiny(request: pytest.FixtureRequest) -> Iterator[Tiny]:
    made = wan(layers=3) if request.param == "wan" else flux()
    yield made
    cache_dit.disable_cache(made.pipe)  # it changes the class of the pipeline


def run(tiny: Tiny) -> torch.Tensor:
    return tiny.run(num_inference_steps=STEPS)


@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("threshold", [NEVER, ALWAYS])
@pytest.mark.parametrize("unpatch_first", [True, False])
def test_a_patch_and_its_caches_in_either_order(
    tiny: Tiny, patch_first: bool, threshold: float, unpatch_first: bool
) -> None:
    plain = run(tiny)
    with diffpatch.patched(tiny.pipe, LOCAL, dense_steps=1):
        sparse = run(tiny)
        calls = diffpatch.report(tiny.pipe).calls
    enable(tiny.pipe, threshold)
    cached = run(tiny)
    cache_dit.disable_cache(tiny.pipe)
    before = insides(tiny.pipe)  # it leaves a rewritten forward behind in some models, by itself
    if patch_first:
        diffpatch.patch(tiny.pipe, LOCAL, dense_steps=1)
        enable(tiny.pipe, threshold)
    else:
        enable(tiny.pipe, threshold)
        diffpatch.patch(tiny.pipe, LOCAL, dense_steps=1)
    both = run(tiny)
    report = diffpatch.report(tiny.pipe)
    if threshold == NEVER:  # the cache computes everything, so the patch alone makes the difference
        assert torch.equal(cached, plain)
        assert torch.equal(both, sparse)
        assert report.calls == calls
    else:
        assert report.calls < calls  # what the cache skips is not called
        assert error(both, cached) > 1e-3
    undo = [diffpatch.unpatch, cache_dit.disable_cache]
    for one in undo if unpatch_first else reversed(undo):
        one(tiny.pipe)
    assert torch.equal(run(tiny), plain)
    assert insides(tiny.pipe) == before


@pytest.mark.parametrize("way", ["set_attn_backend", "enable_cache"])
def test_its_choice_of_a_backend_reaches_ours(way: str) -> None:
    tiny, other = wan(layers=3), wan()
    plain, others = run(tiny), run(other)
    with diffpatch.patched(tiny.pipe, LOCAL, dense_steps=0):
        expected = run(tiny)
    made = diffusers_backend.register("diffpatch_local", LOCAL, grid=TokenGrid(3, 2, 4))
    try:
        if way == "set_attn_backend":
            cache_dit.set_attn_backend(tiny.pipe, "diffpatch_local")
        else:
            enable(tiny.pipe, NEVER, attention_backend="diffpatch_local")
        assert error(run(tiny), expected) < 1e-6
        assert torch.equal(run(other), others)
        cache_dit.disable_cache(tiny.pipe)
        tiny.pipe.transformer.reset_attention_backend()
    finally:
        cache_dit.disable_cache(tiny.pipe)
        made.remove()
    assert torch.equal(run(tiny), plain)
