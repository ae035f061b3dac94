"""What a forward is given beside latents and time: no held result outlives a change of it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_module

import diffpatch
from diffpatch.patching.run.path import Given, Path
from tests.patching.test_combinations import flux_controlnet
from tests.tiny import Tiny, flux, images, wan
from tests.tiny.families import CASES

STEPS, ALWAYS = 7, 1e9


def held(tiny: Tiny, change: Callable[[Any, Any], Any] | None = None, **call: Any) -> int:
    """How many steps of a run are held of those that may be, with a change before the fourth."""

    def callback(pipe: Any, step: int, time: Any, tensors: Any) -> Any:
        return change(pipe, tensors) if change is not None and step == 3 else {}

    if change is not None:
        call["callback_on_step_end"] = callback
    diffpatch.patch(tiny.pipe, "dense", hold=ALWAYS)
    tiny.run(num_inference_steps=STEPS, **call)
    count = diffpatch.report(tiny.pipe).held_steps
    diffpatch.unpatch(tiny.pipe)
    return count


def more(value: Any) -> Any:
    return [more(one) for one in value] if isinstance(value, list) else value + 1


TEXTS = [
    ("wan", "prompt_embeds"), ("hidream", "prompt_embeds_t5"), ("hidream", "prompt_embeds_llama3"),
    ("z-image", "prompt_embeds"), ("sd3", "pooled_prompt_embeds"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "text"), TEXTS)
def test_texts_may_have_any_name(family: str, text: str) -> None:
    tiny = CASES[family].build()
    assert held(tiny) == held(tiny, lambda _, tensors: {}) == STEPS - 2

    def exchange(_: Any, tensors: Any) -> Any:
        return {text: more(tensors[text])}

    assert held(tiny, exchange, callback_on_step_end_tensor_inputs=[text]) == STEPS - 3


def test_a_text_may_be_written_to_in_place() -> None:
    def write(_: Any, tensors: Any) -> Any:
        tensors["prompt_embeds"].mul_(-1)
        return {}

    call = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"], "guidance_scale": 1.0}
    assert held(wan(), write, **call) == STEPS - 3


@pytest.mark.parametrize("build", [wan, flux])
def test_latents_may_be_exchanged(build: Callable[[], Tiny]) -> None:
    def exchange(_: Any, tensors: Any) -> Any:
        noise = torch.randn(tensors["latents"].shape, generator=torch.Generator().manual_seed(5))
        return {"latents": noise.to(tensors["latents"].dtype)}

    call = {"callback_on_step_end_tensor_inputs": ["latents"]}
    assert held(build(), lambda _, tensors: {"latents": tensors["latents"]}, **call) == STEPS - 2
    assert held(build(), exchange, **call) == STEPS - 3


def test_latents_go_on_as_fast_as_before() -> None:
    times = [0.0, 0.1, 0.3, 0.4, 0.6, 1.0]
    latents = torch.zeros(1, 2, 2)

    def going(time: float, factor: float = 1.0) -> dict[str, Any]:
        return {"latents": [latents + factor * time], "time": torch.tensor([time])}

    path = Path(times)
    for step in (0, 1):
        given = path.given(0, going(times[step]))
        path.made(step, 0, given, (latents + 1,), first=True)
    assert float(path.speed) == pytest.approx(2.0)  # type: ignore[arg-type]
    for step, factor, holding in ((2, 1.0, True), (3, 1.0, True), (4, 2.0, True), (4, 4.0, False)):
        path.begin_step(step, 0, path.given(0, going(times[step], factor)), ALWAYS)
        assert path.holding == holding, (step, factor)
    path.begin_step(4, 0, path.given(0, going(0.6, -2.0)), ALWAYS)
    assert path.holding, "turned round, but no farther"


def test_the_scale_of_an_adapter_may_change() -> None:
    def fade(pipe: Any, _: Any) -> Any:
        pipe._joint_attention_kwargs = {"scale": 0.3}
        return {}

    assert held(flux(), fade, joint_attention_kwargs={"scale": 1.0}) == STEPS - 3


def test_a_control_net_may_begin_and_end() -> None:
    tiny = flux_controlnet()
    assert held(tiny) == STEPS - 2
    assert held(tiny, control_guidance_end=0.5) == STEPS - 3
    # What was zero in the first steps counts as steady, and it is not after them.
    assert held(tiny, control_guidance_start=0.5) < STEPS - 3


def test_a_first_forward_may_give_more_than_the_others() -> None:
    """As where a prompt goes into a cache with it."""
    assert held(CASES["qwen21-pipeline"].build()) == STEPS - 3
    path = Path([0.0, 0.5, 1.0])
    for step, size in ((0, 3), (1, 2)):
        given = path.given(0, {"x": torch.full((2,), float(step))})
        path.made(step, 0, given, (torch.ones(size),), first=True)
    assert path.rate is None


def test_the_result_that_turns_most_decides() -> None:
    path = Path([0.0, 0.5, 1.0])
    for step in (0, 1):
        given = path.given(0, {"x": torch.full((2,), float(step))})
        results = [torch.ones(3), torch.tensor([1.0, 2.0 * step]), torch.tensor([step])]
        path.made(step, 0, given, results, first=True)
    assert float(path.rate) == pytest.approx(2 / 5**0.5 / 0.5)  # type: ignore[arg-type]


def test_what_moves_is_seen_in_the_first_two_forwards() -> None:
    text, pooled = torch.ones(1, 2, 3), torch.ones(1, 4)

    def arguments(time: float, **changes: Any) -> dict[str, Any]:
        steady = {"texts": [text, {"pooled": pooled}], "scale": 1.0, "image": None}
        return {"latents": torch.full((1, 2), time), **steady, **changes}

    first = Given(arguments(0))
    assert not first.fits(Given(arguments(0), first)), "nothing is known of what moves"
    known = Given(arguments(1), first)
    assert known.fits(Given(arguments(2, texts=[text.clone(), {"pooled": pooled}]), known))
    for changes in (
        {"texts": [text + 1, {"pooled": pooled}]}, {"texts": [text[:, :1], {"pooled": pooled}]},
        {"texts": [text, {"pooled": pooled + 1}]}, {"texts": [text]}, {"scale": 0.5},
        {"image": pooled}, {"latents": torch.zeros(2, 2)}, {"latents": torch.zeros(1, 2).double()},
    ):  # fmt: skip
        other = Given(arguments(2, **changes), known)
        assert not known.fits(other) and known.differs(other)
    with torch.inference_mode():
        unwritten = Given({"x": torch.ones(2)}, None)
    assert not unwritten.fits(unwritten)


@pytest.mark.parametrize("zeros", [1, 2])
def test_guidance_may_begin_at_zero(zeros: int) -> None:
    """As CFG-Zero* does: the first steps leave the latents where they are."""
    tiny = wan()
    plain_step = tiny.pipe.scheduler.step
    calls: list[None] = []

    def step(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return plain_step(output * (len(calls) > zeros), *args, **kwargs)

    tiny.pipe.scheduler.step = step
    assert held(tiny) == STEPS - 2 - zeros


def test_gradients_hold_nothing_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    tiny = images.dit()
    diffpatch.patch(tiny.pipe, "dense", hold=ALWAYS)
    arguments: dict[str, Any] = {}
    hook = tiny.pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: arguments.update(kwargs, hidden_states=args[0]), with_kwargs=True
    )
    tiny.run(num_inference_steps=1)
    hook.remove()
    scheduler = tiny.pipe.scheduler
    scheduler.set_timesteps(2)
    tiny.pipe.transformer(**arguments)
    assert "no step is held: gradients are recorded" in caplog.text


def test_what_somebody_goes_on_calling_keeps_no_patch() -> None:
    tiny = wan()
    plain, model = tiny.run(), tiny.pipe.transformer
    diffpatch.patch(tiny.pipe, "dense", hold=ALWAYS)
    patch = weakref.ref(model._diffpatch.patch)
    accelerate.cpu_offload_with_hook(model, execution_device=torch.device("cpu"))
    diffpatch.unpatch(tiny.pipe)
    assert torch.equal(tiny.run(), plain)
    remove_hook_from_module(model)
    assert torch.equal(tiny.run(), plain)
    gc.collect()
    assert patch() is None
