"""patch and unpatch on real (tiny) pipelines: exact undo, isolation, schedules, fallbacks."""

from __future__ import annotations

import importlib
import logging
import threading
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

import diffpatch
from diffpatch import BadParameter, NotPatched, TokenGrid, UnknownFamily, UnknownMethod, Window
from tests.tiny import Tiny, flux, wan, wan22, wan_i2v, wan_transformer

LOCAL = Window(window=(-1, 1, 2), shift="none")  # 3×2×4 tokens: far from dense
MAKERS = [wan, wan22, wan_i2v, flux]


def processors(pipe: Any) -> list[Any]:
    models = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    return [m.processor for model in models for m in model.modules() if hasattr(m, "processor")]


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module", params=MAKERS, ids=lambda f: f.__name__)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    model: Tiny = request.param()
    return model


def test_unpatch_restores_everything_to_the_bit(tiny: Tiny) -> None:
    before, objects = tiny.run(), processors(tiny.pipe)
    scheduler = type(tiny.pipe.scheduler)
    assert diffpatch.patch(tiny.pipe, LOCAL, dense_steps=0) is tiny.pipe
    assert not torch.equal(tiny.run(), before)
    assert diffpatch.unpatch(tiny.pipe) is tiny.pipe
    assert same(processors(tiny.pipe), objects)
    assert type(tiny.pipe.scheduler) is scheduler
    assert torch.equal(tiny.run(), before)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_pattern_that_keeps_all_equals_dense(
    tiny: Tiny, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tiny.run()
    # One row short of everything would hide a bug here, and everything would run dense: force it.
    monkeypatch.setattr("diffpatch.patching.attention.decision.DENSE_FROM", 2.0)
    with diffpatch.patched(tiny.pipe, "window", window=-1, dense_steps=0, backend=backend):
        after = tiny.run()
        assert set(diffpatch.report(tiny.pipe).backends) == {backend}
    assert (after - before).abs().max() < 1e-5


def test_the_report_says_what_was_computed(tiny: Tiny) -> None:
    with diffpatch.patched(tiny.pipe, LOCAL, dense_steps=1):
        tiny.run()
        report = diffpatch.report(tiny.pipe)
    steps = tiny.call["num_inference_steps"]
    grid = (
        TokenGrid(1, 8, 16, 48)
        if "flux" in type(tiny.pipe).__name__.lower()
        else TokenGrid(3, 2, 4)
    )
    kept = LOCAL.pattern(grid).kept
    assert report.steps == steps
    assert report.kept_per_step == pytest.approx([1.0] + [kept] * (steps - 1))
    assert report.kept == pytest.approx((1 + kept * (steps - 1)) / steps)
    assert report.reasons == {"dense first steps": report.dense_calls}
    assert "kept" in str(report) and report.to_dict()["calls"] == report.calls


def test_dense_layers_stay_dense() -> None:
    tiny = wan(layers=3)
    with diffpatch.patched(tiny.pipe, LOCAL, dense_steps=1, dense_layers=[1]):
        tiny.run()
        by_step = diffpatch.report(tiny.pipe).kept_map
    with diffpatch.patched(tiny.pipe, LOCAL, dense_steps=0, dense_layers=[1]):
        tiny.run()
        per_layer = diffpatch.report(tiny.pipe).kept_per_layer
    assert by_step[0] == [1.0, 1.0, 1.0]
    assert by_step[1] == list(per_layer.values()) == by_step[-1]
    assert per_layer["transformer.1"] == 1.0
    assert per_layer["transformer.0"] == per_layer["transformer.2"] < 1


def test_both_experts_share_one_step_count() -> None:
    tiny = wan22()
    with diffpatch.patched(tiny.pipe, LOCAL, dense_steps=2):
        tiny.run()
        report = diffpatch.report(tiny.pipe)
    assert report.steps == 4 and report.layers == 4
    assert [k == 1.0 for k in report.kept_per_step] == [True, True, False, False]
    seen = [[kept is not None for kept in layers] for layers in report.kept_map]
    assert [sum(layers) for layers in seen] == [2] * 4 and seen[0] != seen[-1]  # an expert at once


def test_the_output_equals_diffusers_own_attention_with_the_same_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Independent reference: SDPA masked by hand in the dispatcher of the Wan module alone."""
    transformer_wan: Any = importlib.import_module("diffusers.models.transformers.transformer_wan")

    tiny = wan()
    mask = LOCAL.pattern(TokenGrid(3, 2, 4)).dense()[0]
    with diffpatch.patched(tiny.pipe, LOCAL, dense_steps=0):
        patched = tiny.run()
    original = transformer_wan.dispatch_attention_fn

    def masked(query: Any, key: Any, value: Any, **kwargs: Any) -> Any:
        if query.shape[1] == key.shape[1]:
            kwargs["attn_mask"] = mask
        return original(query, key, value, **kwargs)

    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", masked)
    assert (patched - tiny.run()).abs().max() < 1e-5


def test_neighbours_names_work_too() -> None:
    tiny = wan()
    assert not diffpatch.is_patched(tiny.pipe) and not diffpatch.is_patched(tiny.pipe.transformer)
    with diffpatch.patched(tiny.pipe, LOCAL, dense_steps=0):
        assert diffpatch.is_patched(tiny.pipe) and diffpatch.is_patched(tiny.pipe.transformer)
        tiny.run()
        assert diffpatch.summary(tiny.pipe) == diffpatch.report(tiny.pipe)
    assert not diffpatch.is_patched(tiny.pipe)


def test_patching_again_replaces_the_earlier_patch() -> None:
    tiny = wan()
    before, objects = tiny.run(), processors(tiny.pipe)
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=0)
    diffpatch.patch(tiny.pipe, "window", window=-1, dense_steps=0)
    assert torch.equal(tiny.run(), before)
    diffpatch.unpatch(tiny.pipe)
    assert same(processors(tiny.pipe), objects)


def test_one_model_under_two_names_is_patched_once(caplog: pytest.LogCaptureFixture) -> None:
    tiny = wan22()
    tiny.pipe.register_modules(transformer_2=tiny.pipe.transformer)
    plain = tiny.run()
    with diffpatch.patched(tiny.pipe, LOCAL, dense_steps=0):
        tiny.run()
        report = diffpatch.report(tiny.pipe)
    assert report.calls == 16 and not report.dense_calls and "replaced" not in caplog.text
    assert torch.equal(tiny.run(), plain)


def test_a_followed_scheduler_equals_its_class() -> None:
    """Some pipelines (Bria) ask for the very class of their scheduler, by ``type() !=``."""
    tiny = wan()
    own = type(tiny.pipe.scheduler)
    with diffpatch.patched(tiny.pipe, LOCAL, dense_steps=0):
        tiny.pipe.scheduler.set_timesteps(2)
        followed = type(tiny.pipe.scheduler)
        assert followed is not own
        assert followed == own == followed
        assert not (followed != own or own != followed)
        assert hash(followed) == hash(own) and {own: 1}[followed] == 1
        assert followed != diffusers.FlowMatchHeunDiscreteScheduler
    assert type(tiny.pipe.scheduler) is own


def test_an_exception_in_mid_run_leaves_a_clean_next_run() -> None:
    tiny = wan()
    before = tiny.run()

    def stop(*args: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), diffpatch.patched(tiny.pipe, LOCAL, dense_steps=0):
        tiny.run(callback_on_step_end=stop)
    assert torch.equal(tiny.run(), before)
    with diffpatch.patched(tiny.pipe, LOCAL, dense_steps=1):
        with pytest.raises(KeyboardInterrupt):
            tiny.run(callback_on_step_end=stop)
        first = tiny.run()
        assert diffpatch.report(tiny.pipe).kept_per_step[0] == 1.0
        assert torch.equal(tiny.run(), first)


def test_state_does_not_cross_prompts_or_resolutions() -> None:
    tiny = wan()
    other: dict[str, Any] = {"prompt": "dog!", "height": 64}
    with diffpatch.patched(tiny.pipe, LOCAL, dense_steps=1):
        first, second = tiny.run(), tiny.run(**other)
        assert torch.equal(tiny.run(), first)
    with diffpatch.patched(tiny.pipe, LOCAL, dense_steps=1):
        assert torch.equal(tiny.run(**other), second)


def test_two_pipelines_in_one_process_never_meet() -> None:
    a, b = wan(), wan()
    alone = {}
    for name, tiny, method in (("a", a, LOCAL), ("b", b, Window(window=(1, -1, -1)))):
        with diffpatch.patched(tiny.pipe, method, dense_steps=0):
            alone[name] = tiny.run()
    diffpatch.patch(a.pipe, LOCAL, dense_steps=0)
    diffpatch.patch(b.pipe, Window(window=(1, -1, -1)), dense_steps=0)
    assert torch.equal(a.run(), alone["a"]) and torch.equal(b.run(), alone["b"])
    diffpatch.unpatch(a.pipe)
    assert torch.equal(b.run(), alone["b"])


def test_two_pipelines_in_two_threads_never_meet() -> None:
    models = [wan(), flux()]
    for tiny in models:
        diffpatch.patch(tiny.pipe, LOCAL, dense_steps=0)
    alone = [tiny.run() for tiny in models]
    results: list[list[bool]] = [[], []]

    def work(i: int) -> None:
        results[i] = [torch.equal(models[i].run(), alone[i]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[True] * 5] * 2


def test_a_scheduler_set_after_patching_is_followed() -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=1)
    config = tiny.pipe.scheduler.config
    tiny.pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler.from_config(config)
    tiny.run(num_inference_steps=3)
    report = diffpatch.report(tiny.pipe)
    assert report.steps == 5  # Heun evaluates the model twice in every step but the last
    assert [k == 1.0 for k in report.kept_per_step] == [True, True, False, False, False]
    diffpatch.unpatch(tiny.pipe)
    assert type(tiny.pipe.scheduler) is diffusers.FlowMatchHeunDiscreteScheduler


def test_replaced_processors_are_patched_again_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    tiny = wan()
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=0)
    patched = tiny.run()
    tiny.pipe.transformer.set_attn_processor(WanAttnProcessor())
    with caplog.at_level(logging.WARNING):
        assert torch.equal(tiny.run(), patched)
        tiny.run()
    assert sum("replaced after patching" in r.message for r in caplog.records) == 1


def test_a_bare_transformer_reports_its_last_forward() -> None:
    model = wan_transformer(2, 2, 12)
    inputs = {
        "hidden_states": torch.randn(1, 16, 3, 4, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 7, 32),
    }
    diffpatch.patch(model, LOCAL)
    for _ in range(2):
        model(**inputs)
    report = diffpatch.report(model)
    assert report.calls == 2 and report.kept < 1
    with pytest.raises(BadParameter, match="bare transformer"):
        diffpatch.patch(model, LOCAL, dense_steps=2)
        model(**inputs)


def test_training_through_a_patch_gives_gradients() -> None:
    model = wan_transformer(2, 2, 12)
    diffpatch.patch(model, LOCAL)
    out = model(
        torch.randn(1, 16, 3, 4, 8), torch.tensor([500]), torch.randn(1, 7, 32), return_dict=False
    )[0]
    out.square().mean().backward()
    grads = [p.grad for n, p in model.named_parameters() if "attn1.to_q.weight" in n]
    assert len(grads) == 2 and all(g is not None and g.abs().sum() > 0 for g in grads)


def test_auto_is_what_suits_the_kind_of_model() -> None:
    for model, name in ((wan(), "radial"), (flux(), "neighborhood")):
        diffpatch.patch(model.pipe, "auto", dense_steps=0)
        assert diffpatch.report(model.pipe).method.lower().startswith(name)
    made = diffpatch.plan("flux", "auto", height=512, width=512)
    assert made.method.lower().startswith("neighborhood")


def test_bad_input_is_refused_in_one_line() -> None:
    tiny = wan()
    objects = processors(tiny.pipe)
    cases: list[tuple[type[Exception], dict[str, Any]]] = [
        (UnknownMethod, {"method": "radail"}),
        (BadParameter, {"method": "window", "size": 3}),
        (BadParameter, {"method": "window", "dense_layers": 9}),
        (BadParameter, {"method": "window", "dense_steps": 1.5}),
        (BadParameter, {"method": "window", "backend": "cuda"}),
    ]
    for error, options in cases:
        with pytest.raises(error) as caught:
            diffpatch.patch(tiny.pipe, **options)
        assert "\n" not in str(caught.value)
        assert same(processors(tiny.pipe), objects)
    with pytest.raises(UnknownFamily, match="grid= and modules="):
        diffpatch.patch(torch.nn.Linear(2, 2), "window")
    with pytest.raises(BadParameter, match="radial works on video models only"):
        diffpatch.patch(flux().pipe, "radial")
    with pytest.raises(NotPatched, match="call diffpatch"):
        diffpatch.report(tiny.pipe)
    diffpatch.patch(tiny.pipe, "window", dense_steps=7)
    with pytest.raises(BadParameter, match="only 2 steps"):
        tiny.run()


def test_attention_is_the_same_operator_as_a_function() -> None:
    grid = TokenGrid(3, 5, 7, text_before=4)
    q, k, v = torch.randn(3, 2, grid.num_tokens, 3, 32).unbind()
    out = diffpatch.attention(q, k, v, grid, "neighborhood", window=(3, 3, 3), stride=1)
    mask = diffpatch.Neighborhood(window=(3, 3, 3), stride=1).pattern(grid).dense()
    a, b, c = (t.transpose(1, 2) for t in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(a, b, c, attn_mask=mask)
    torch.testing.assert_close(out, expected.transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_a_transformer_shared_with_another_pipeline_keeps_no_state_of_it() -> None:
    """The other pipeline has a scheduler that nobody follows: every forward is a run of its own."""
    tiny = wan()
    config = tiny.pipe.scheduler.config
    other = Tiny(type(tiny.pipe)(**tiny.pipe.components), tiny.call)
    other.pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    other.pipe.set_progress_bar_config(disable=True)
    diffpatch.patch(tiny.pipe, "window+temporal", window=(-1, 1, 2), refresh=99, dense_steps=0)
    tiny.run(prompt="dog!")
    first = other.run()
    tiny.run(prompt="something else")
    assert torch.equal(other.run(), first)


def test_video_to_video_strength_counts_the_steps_that_are_taken() -> None:
    tiny = wan()
    parts = dict(tiny.pipe.components)
    known = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    pipe: Any = diffusers.WanVideoToVideoPipeline(**{name: parts[name] for name in known})
    pipe.set_progress_bar_config(disable=True)
    video = [Image.new("RGB", (64, 32), (10 * i, 0, 0)) for i in range(9)]
    call = {k: v for k, v in tiny.call.items() if k != "num_frames"}
    with diffpatch.patched(pipe, LOCAL, dense_steps=0, dense_last_steps=1):
        Tiny(pipe, call).run(video=video, num_inference_steps=8, strength=0.5)
        report = diffpatch.report(pipe)
    assert report.steps == 4
    assert [k == 1.0 for k in report.kept_per_step] == [False, False, False, True]


def test_a_patch_that_cannot_work_leaves_the_earlier_one() -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=0)
    expected = tiny.run()
    with pytest.raises(BadParameter):
        diffpatch.patch(tiny.pipe, LOCAL, dense_layers=99)
    assert torch.equal(tiny.run(), expected)


def test_training_only_keys_and_values_gives_gradients() -> None:
    model = wan_transformer(1, 2, 12).requires_grad_(False)
    model.blocks[0].attn1.to_v.requires_grad_(True)
    diffpatch.patch(model, LOCAL)
    inputs = torch.randn(1, 16, 3, 4, 8), torch.tensor([500]), torch.randn(1, 7, 32)
    model(*inputs, return_dict=False)[0].square().mean().backward()
    assert model.blocks[0].attn1.to_v.weight.grad.abs().sum() > 0


def test_one_frame_is_dense_where_a_method_saves_between_frames() -> None:
    tiny = wan()
    before = tiny.run(num_frames=1)
    with diffpatch.patched(tiny.pipe, "radial", dense_steps=0, dense_layers=0):
        assert torch.equal(tiny.run(num_frames=1), before)
        assert "one" in next(iter(diffpatch.report(tiny.pipe).reasons))
