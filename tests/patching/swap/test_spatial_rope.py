"""UltraImage's parts of `larger` on tiny models: what changes in a run, and is undone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import diffpatch
from diffpatch import BadParameter, DiffpatchError
from diffpatch.patching.attention import parallel
from tests.patching.run.test_runs import clone
from tests.tiny import Tiny, flux, videos, wan
from tests.tiny.images import qwen

WIDE: dict[str, Any] = {"shape": "whole", "slowed": 1, "focus": 1.3}


def wide(build: Callable[[], Tiny]) -> Tiny:
    """A tiny model whose frames have more columns than the shortest period, 6.3 tokens."""
    tiny = build()
    tiny.call.update(height=32, width=128 if build is wan else 160, output_type="latent")
    return tiny


@pytest.mark.parametrize("build", [wan, flux, qwen])
def test_each_part_changes_the_run_and_undo_is_exact(build: Callable[[], Tiny]) -> None:
    tiny = wide(build)
    before = tiny.run(num_inference_steps=3)
    made = []
    for params in (WIDE, WIDE | {"slowed": 0}, WIDE | {"focus": 1.0}):
        diffpatch.patch(tiny.pipe, "larger", trained=(2, 2), strict=False, **params)
        made.append(tiny.run(num_inference_steps=3))
        assert diffpatch.report(tiny.pipe).kept == 1
    for i, one in enumerate(made):
        assert not any(torch.equal(one, other) for other in (before, *made[:i]))
    diffpatch.patch(tiny.pipe, "larger", trained=(99, 99), **WIDE)
    assert torch.equal(tiny.run(num_inference_steps=3), before)
    diffpatch.unpatch(tiny.pipe)
    assert torch.equal(tiny.run(num_inference_steps=3), before)


def test_tables_come_back_bit_for_bit() -> None:
    model = qwen().pipe.transformer
    args = [[(1, 9, 11)]], torch.device("cpu"), 5
    before = [table.clone() for table in model.pos_embed(*args)]
    diffpatch.patch(model, "larger", trained=(4, 4), guide=0, slowed=2)
    during = model.pos_embed(*args)
    assert all((a != b).any() for a, b in zip(before, during, strict=True))
    diffpatch.unpatch(model)
    after = model.pos_embed(*args)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_two_sizes_at_once() -> None:
    tiny = wide(wan)
    diffpatch.patch(tiny.pipe, "larger", trained=(2, 2), **WIDE)
    sizes = [(32, 128), (32, 160), (128, 32)]
    pipes = [clone(tiny) for _ in sizes]

    def run(i: int) -> torch.Tensor:
        height, width = sizes[i]
        return pipes[i].run(height=height, width=width, num_inference_steps=3)

    alone = [run(i) for i in range(len(sizes))]
    together: dict[int, torch.Tensor] = {}

    def work(i: int) -> None:
        together[i] = run(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(sizes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(together[i], alone[i]) for i in range(len(sizes)))


def test_compiled_blocks_are_sharpened_alike() -> None:
    tiny = wide(wan)
    diffpatch.patch(tiny.pipe, "larger", trained=(2, 2), **WIDE)
    expected = tiny.run(num_inference_steps=3)
    for block in tiny.pipe.transformer.blocks:
        block.compile(backend="eager")
    assert torch.allclose(tiny.run(num_inference_steps=3), expected, atol=1e-5)


def test_what_cannot_work_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadParameter, match="rotary embedding is not known: pass slowed=0"):
        diffpatch.patch(videos.ltx().pipe, "larger", slowed=1)
    with pytest.raises(BadParameter, match=r"focus=0\.5 must be a number from 1"):
        diffpatch.patch(wan().pipe, "larger", focus=0.5)
    with pytest.raises(BadParameter, match="guide=2 must be None with shape='whole'"):
        diffpatch.patch(wan().pipe, "larger", shape="whole", guide=2)
    with pytest.raises(BadParameter, match="a bare transformer knows no steps"):
        diffpatch.patch(wan().pipe.transformer, "larger", trained=(2, 2), guide=0, focus=1.3)
    monkeypatch.setattr(parallel, "context", lambda model: object())
    monkeypatch.setattr(parallel, "check", lambda *args: None)
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("larger", {"trained": (2, 2), "guide": 0, "slowed": 1}, "cut over.*pass slowed=0"),
        ("larger", {"trained": (2, 2), "guide": 0, "focus": 1.3}, "all heads.*pass focus=1"),
        ("longer", {"trained": 1}, "cut over several processes here: pass riflex=False"),
    ]
    for name, params, message in cases:
        tiny = wan()
        diffpatch.patch(tiny.pipe, name, **params)
        with pytest.raises(DiffpatchError, match=message):
            tiny.run()
