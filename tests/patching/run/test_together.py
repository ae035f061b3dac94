"""Two runs at once over one patched model with other things on; the table is in `test_where`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import accelerate
import cache_dit
import diffusers
import pytest
import torch

import diffpatch
from diffpatch import Temporal, TokenGrid, Window
from diffpatch.adapters import diffusers_backend
from diffpatch.patching.report import Record
from tests.patching.run.test_runs import LATENT, LOCAL, TEMPORAL, Turns, clone, owner, together
from tests.tiny import Tiny, flux, wan, wan22

CPU = torch.device("cpu")
TWO: list[dict[str, Any]] = [
    LATENT | {"height": 32, "width": 64, "num_inference_steps": 3},
    LATENT | {"height": 64, "width": 32, "num_inference_steps": 4},
]


def at_once(tiny: Tiny, requests: list[dict[str, Any]]) -> list[Any]:
    """The requests, step by step in turn, each by a clone in a thread of its own."""
    turns, pipes = Turns(len(requests)), [clone(tiny) for _ in requests]
    return together([lambda i=i: turns.run(pipes[i], i, requests[i]) for i in range(len(requests))])


def within(tiny: Tiny, requests: list[dict[str, Any]]) -> list[Any]:
    """The second request in the middle of the first, for what threads must not share."""
    inner: list[Any] = []

    def callback(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 1:
            inner.extend(together([lambda: clone(tiny).run(**requests[1])]))
        return {}

    outer = together([lambda: tiny.run(callback_on_step_end=callback, **requests[0])])
    return outer + inner


def check(
    build: Callable[[], Tiny],
    change: Callable[[Tiny], Any],
    method: Any = TEMPORAL,
    run: Callable[[Tiny, list[dict[str, Any]]], list[Any]] = at_once,
) -> None:
    """Requests at once equal requests alone on fresh pipelines, all changed likewise."""

    def fresh() -> Tiny:
        tiny = build()
        change(tiny)
        diffpatch.patch(tiny.pipe, method, dense_steps=1)
        return tiny

    expected = [fresh().run(**request) for request in TWO]
    tiny = fresh()
    for found, one in zip(run(tiny, TWO), expected, strict=True):
        assert torch.equal(found, one)
    assert owner(tiny).patch.state_bytes() == 0


def offloaded_whole(tiny: Tiny) -> None:
    accelerate.cpu_offload_with_hook(tiny.pipe.transformer, execution_device=CPU)


def offloaded_by_parts(tiny: Tiny) -> None:
    accelerate.cpu_offload(tiny.pipe.transformer, execution_device=CPU)


def offloaded_by_groups(tiny: Tiny) -> None:
    tiny.pipe.transformer.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type="leaf_level"
    )


def tuned(tiny: Tiny) -> None:
    from peft import LoraConfig

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    tiny.pipe.transformer.add_adapter(config)


def cast(tiny: Tiny) -> None:
    tiny.pipe.transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )


CHANGES = [
    (offloaded_whole, at_once), (offloaded_by_parts, within), (offloaded_by_groups, within),
    (tuned, at_once), (cast, within),
]  # fmt: skip


@pytest.mark.parametrize(("change", "run"), CHANGES, ids=lambda f: f.__name__)
def test_what_is_around_a_model_leaves_runs_apart(change: Any, run: Any) -> None:
    check(wan, change, run=run)


def test_experts_follow_each_run_over_their_border() -> None:
    check(wan22, lambda tiny: None)


def test_negative_prompts_of_images() -> None:
    guided = {"true_cfg_scale": 3.0, "negative_prompt": "bad"}

    def build() -> Tiny:
        tiny = flux()
        return Tiny(tiny.pipe, tiny.call | guided)

    check(build, lambda tiny: None, Temporal(over=Window(window=(-1, 4, 4), shift="none")))


def test_modes_of_one_thread_are_not_those_of_another() -> None:
    tiny = wan()
    tiny.run()
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=1)
    modes: list[Any] = [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
    pipes = [clone(tiny), clone(tiny)]

    def run(i: int, turns: Turns | None = None) -> torch.Tensor:
        with modes[i]():
            return pipes[i].run(**TWO[i]) if turns is None else turns.run(pipes[i], i, TWO[i])

    expected, turns = [run(0), run(1)], Turns(2)
    out = together([lambda i=i: run(i, turns) for i in (0, 1)])
    for found, one in zip(out, expected, strict=True):
        assert torch.equal(found, one)


def test_a_training_step_beside_a_run() -> None:
    tiny = wan()
    tiny.run()
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=0)
    model = tiny.pipe.transformer.requires_grad_(True)
    weight = model.blocks[0].attn1.to_q.weight

    def train() -> torch.Tensor:
        out = model(torch.ones(1, 16, 3, 8, 4), torch.tensor([5]), torch.ones(1, 8, 32))[0]
        return torch.autograd.grad(out.square().sum(), weight)[0]

    expected = train(), clone(tiny).run(**TWO[0])
    for _ in range(2):
        found = together(
            [lambda: [train() for _ in range(4)][-1], lambda: clone(tiny).run(**TWO[0])]
        )
        torch.testing.assert_close(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_a_backend_of_diffusers_holds_nothing_of_a_run() -> None:
    tiny = wan()
    tiny.run()
    backend = diffusers_backend.register("diffpatch_two", LOCAL, grid=TokenGrid(3, 2, 4))
    tiny.pipe.transformer.set_attention_backend("diffpatch_two")
    try:
        requests = [TWO[0], LATENT | {"height": 64, "width": 64, "num_inference_steps": 3}]
        expected = [clone(tiny).run(**request) for request in requests]
        for found, one in zip(at_once(tiny, requests), expected, strict=True):
            assert torch.equal(found, one)
    finally:
        tiny.pipe.transformer.reset_attention_backend()
        backend.remove()


def first_block(tiny: Tiny) -> None:
    tiny.pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e9))


def pyramid(tiny: Tiny) -> None:
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
        spatial_attention_block_identifiers=("blocks",),
    )
    tiny.pipe.transformer.enable_cache(config)


def cached_by_cache_dit(tiny: Tiny) -> None:
    config = cache_dit.DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1)
    cache_dit.enable_cache(tiny.pipe, cache_config=config)


CACHES = [first_block, pyramid, cached_by_cache_dit]


@pytest.mark.parametrize("enable", CACHES, ids=lambda f: f.__name__)
def test_caches_that_runs_share_are_named(
    enable: Callable[[Tiny], Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "diffpatch")
    tiny = wan(layers=3)
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=0)
    enable(tiny)
    for request in TWO:  # one after the other
        tiny.run(**request)
    assert "runs under way" not in caplog.text
    within(tiny, TWO)  # diffusers itself fails in some
    assert caplog.text.count("several runs under way") == 1
    assert "several runs under way" in str(diffpatch.report(tiny.pipe))  # of the outer one
    cache_dit.disable_cache(tiny.pipe)


def test_no_lock_is_held_during_attention() -> None:
    """Two threads meet within attention of one layer; if one waited for the other, none would."""
    tiny = wan(layers=1)
    tiny.run()
    met: list[int] = []
    both = threading.Barrier(2, timeout=240)

    class Meeting(Window):
        only_skips = True

        def attend(self, q: Any, k: Any, v: Any, call: Any) -> Any:
            if armed:
                met.append(both.wait())
            return super().attend(q, k, v, call)

    armed = False
    diffpatch.patch(tiny.pipe, Meeting(window=(-1, 1, 2), shift="none"), dense_steps=0)
    armed, guided = True, {"guidance_scale": 1.0, "num_inference_steps": 3}
    pipes = [clone(tiny), clone(tiny)]
    out = together([lambda i=i: pipes[i].run(**TWO[i] | guided) for i in (0, 1)])
    assert sorted(met) == [0] * 3 + [1] * 3
    armed = False
    for i in (0, 1):
        assert torch.equal(out[i], clone(tiny).run(**TWO[i] | guided))


class Late(torch.Tensor):
    """A number that is still on its way from the device."""

    asked, here = threading.Event(), threading.Event()

    def __float__(self) -> float:
        self.asked.set()
        assert self.here.wait(10)
        return 0.25


def test_two_who_ask_at_once_for_what_is_on_a_device_are_told_the_same() -> None:
    record = Record()
    record.add("transformer", 0, 0, 100.0, torch.tensor(0.25).as_subclass(Late), "torch")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(record.snapshot)
        assert Late.asked.wait(10)
        second = pool.submit(record.snapshot)
        record.add("transformer", 1, 0, 100.0, 1.0, "dense")  # calls are counted meanwhile
        time.sleep(0.05)
        Late.here.set()
        assert first.result().kept_pairs == second.result().kept_pairs == 125.0
