"""The guide branch of `larger` against two rows carried by hand, and what it leaves behind."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig

import diffpatch
from diffpatch import BadParameter, DiffpatchError, Larger
from tests import tiny as tiny_models
from tests.patching.run.test_runs import clone
from tests.tiny import Tiny, flux, videos, wan
from tests.tiny.images import dit, pixart

STEPS = 5
SMALL = (2, 2)  # of the 2×4 tokens of a frame of the tiny Wan


def by_hand(tiny: Tiny, every: int) -> torch.Tensor:
    """A run with windows whose cross-attention comes from a dense copy of the model."""
    model = tiny.pipe.transformer
    dense, calls = copy.deepcopy(model), iter(range(1000))
    kept: dict[int, torch.Tensor] = {}
    for i, block in enumerate(dense.blocks):
        block.attn2.register_forward_hook(lambda m, a, out, i=i: kept.__setitem__(i, out))
    diffpatch.patch(tiny.pipe, "larger", trained=SMALL, guide=0)
    override: list[int] = []
    handles = [
        block.attn2.register_forward_hook(lambda m, a, out, i=i: kept[i] if override else None)
        for i, block in enumerate(model.blocks)
    ]
    windows = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        step, branch = divmod(next(calls), 2)
        if branch == 0:  # with the prompt
            if step % every == 0:
                dense(*args, **kwargs)
            override.append(1)
        out = windows(*args, **kwargs)
        override.clear()
        return out

    model.forward = forward
    try:
        return tiny.run(num_inference_steps=STEPS)
    finally:
        del model.forward
        for handle in handles:
            handle.remove()
        diffpatch.unpatch(tiny.pipe)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_it_is_two_rows_of_which_one_gives_its_cross_attention(every: int) -> None:
    tiny = wan()
    expected = by_hand(tiny, every)
    diffpatch.patch(tiny.pipe, "larger", trained=SMALL, guide=every)
    assert torch.equal(tiny.run(num_inference_steps=STEPS), expected)
    report = diffpatch.report(tiny.pipe)
    guides = -(-STEPS // every)
    assert report.notes == (f"{guides} guide forwards ran dense beside the others: kept has them",)
    # Three of the four columns are seen, and a guide's pairs come on top.
    assert report.kept == pytest.approx(0.75 + guides / STEPS / 2)
    assert report.calls == STEPS * 2 * 2
    guided = [1.25 if step % every == 0 else 0.75 for step in range(STEPS)]
    assert report.kept_per_step == pytest.approx(guided)
    assert list(report.kept_per_layer.values()) == pytest.approx([report.kept] * 2)
    assert report.kept_map == [pytest.approx([kept] * 2) for kept in guided]
    tokens, channels = 3 * 2 * 4, 24
    assert report.state_bytes == 2 * tokens * channels * 4  # two layers, fp32


def test_undo_is_exact_and_copies_are_plain() -> None:
    tiny = wan()
    before = tiny.run()
    diffpatch.patch(tiny.pipe, "larger", trained=SMALL)
    during = tiny.run()
    assert not torch.equal(during, before)
    copied = copy.deepcopy(tiny.pipe.transformer)
    patched, tiny.pipe.transformer = tiny.pipe.transformer, copied
    assert torch.equal(tiny.run(), before)
    tiny.pipe.transformer = patched
    assert torch.equal(tiny.run(), during)
    diffpatch.unpatch(tiny.pipe)
    assert torch.equal(tiny.run(), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in patched.modules())


def test_trained_size_and_dense_steps_need_no_guide() -> None:
    tiny = wan()
    before = tiny.run(num_inference_steps=STEPS)
    diffpatch.patch(tiny.pipe, "larger", trained=(2, 4))
    assert torch.equal(tiny.run(num_inference_steps=STEPS), before)
    report = diffpatch.report(tiny.pipe)
    assert report.notes == () and report.state_bytes == 0
    assert list(report.reasons) == ["a window of the trained 2×4 tokens holds all 2×4 of a frame"]
    diffpatch.patch(tiny.pipe, "larger", trained=SMALL, dense_steps=3)
    tiny.run(num_inference_steps=STEPS)
    assert diffpatch.report(tiny.pipe).notes[0].startswith("1 guide forwards")


@pytest.mark.parametrize("build", ["ltx", "skyreels", "wan22"])
def test_other_families_with_cross_attention_are_guided(build: str) -> None:
    model = (getattr(videos, build, None) or getattr(tiny_models, build))()
    if build == "ltx":
        model.call["width"] = 4 * 32
    before = model.run()
    diffpatch.patch(model.pipe, "larger", trained=SMALL, guide=0)
    alone = model.run()
    diffpatch.patch(model.pipe, "larger", trained=SMALL)
    guided = model.run()
    assert "guide forwards" in diffpatch.report(model.pipe).notes[0]
    assert not torch.equal(guided, alone)
    diffpatch.unpatch(model.pipe)
    assert torch.equal(model.run(), before)


def test_images_with_cross_attention_too() -> None:
    tiny = pixart()
    diffpatch.patch(tiny.pipe, "larger", trained=SMALL)
    tiny.run()
    assert "guide forwards" in diffpatch.report(tiny.pipe).notes[0]


@pytest.mark.parametrize("build", [flux, dit])
def test_models_without_cross_attention_have_windows_alone(build: Callable[[], Tiny]) -> None:
    tiny = build()
    diffpatch.patch(tiny.pipe, "larger", trained=SMALL)
    tiny.run()
    assert diffpatch.report(tiny.pipe).notes == ()
    with pytest.raises(BadParameter, match=r"no cross-attention .* pass guide=0"):
        diffpatch.patch(flux().pipe, "larger", trained=SMALL, guide=3)


def test_two_sizes_at_once() -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, "larger", trained=SMALL)
    sizes = [(32, 64), (48, 32), (48, 64)]
    pipes = [clone(tiny) for _ in sizes]
    # The autoencoder of Wan holds state while it decodes.
    latent: dict[str, Any] = {"output_type": "latent"}
    alone = [one.run(height=h, width=w, **latent) for one, (h, w) in zip(pipes, sizes, strict=True)]
    together: dict[int, torch.Tensor] = {}

    def work(i: int) -> None:
        height, width = sizes[i]
        together[i] = pipes[i].run(height=height, width=width, **latent)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(sizes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(together[i], alone[i]) for i in range(len(sizes)))


def guides(tiny: Tiny, change: Callable[[Any, Any], Any], *inputs: str) -> int:
    """How many guides there are in a run with a change after step 1."""

    def callback(pipe: Any, step: int, time: Any, tensors: Any) -> Any:
        return change(pipe, tensors) if step == 1 else {}

    diffpatch.patch(tiny.pipe, "larger", trained=SMALL, guide=STEPS, dense_steps=0)
    tiny.run(
        num_inference_steps=STEPS, callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=list(inputs),
    )  # fmt: skip
    note = next(n for n in diffpatch.report(tiny.pipe).notes if "guide forwards" in n)
    return int(note.split()[0])


def test_a_text_that_is_exchanged_has_a_guide_of_its_own() -> None:
    tiny = wan()
    assert guides(tiny, lambda *_: {}) == 1
    assert guides(tiny, lambda _, t: {"prompt_embeds": -t["prompt_embeds"]}, "prompt_embeds") == 2


def test_guidance_may_end_between_two_guides() -> None:
    tiny = videos.ltx()

    def end(pipe: Any, tensors: Any) -> Any:
        pipe._guidance_scale = 1.0
        return {name: value.chunk(2)[1] for name, value in tensors.items()}

    assert guides(tiny, end, "prompt_embeds") == 2


def test_what_goes_around_a_guide_is_refused() -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, "larger", trained=SMALL)
    tiny.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(DiffpatchError, match=r"FirstBlockCache is enabled.*pass guide=0"):
        tiny.run()
    tiny.pipe.transformer.disable_cache()
    tiny.run()
    block = tiny.pipe.transformer.blocks[0]
    block.compile(backend="eager")
    with pytest.raises(DiffpatchError, match=r"compiled.*pass guide=0"):
        tiny.run()
    block._compiled_call_impl = None
    with pytest.raises(BadParameter, match="a bare transformer knows no steps"):
        diffpatch.patch(tiny.pipe.transformer, Larger(trained=SMALL, guide=2))
