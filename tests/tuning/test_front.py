"""Rendering the front of a tiny model: resumed, chosen from, checked and undone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import platformdirs
import pytest
import torch

import diffpatch
from diffpatch import BadParameter
from diffpatch.pipelines.running.sampling import sample
from diffpatch.targets.choice import choose_for
from diffpatch.targets.front import FINEST, measured_points
from diffpatch.targets.settings import Measured, Settings
from diffpatch.targets.target import Target
from diffpatch.tuning import front as fronts
from diffpatch.tuning import tune as tuning
from diffpatch.tuning.front import check_prompts, measure_front
from tests.tiny import Tiny, wan

CALL: dict[str, Any] = {"height": 128, "width": 128, "num_frames": 9, "num_inference_steps": 6}
ALWAYS = 1e9  # a change of the first block that no step reaches


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return wan(layers=2)


def call_of(tiny: Tiny) -> dict[str, Any]:
    return {k: v for k, v in tiny.call.items() if k not in ("prompt", "output_type")} | CALL


@pytest.fixture(scope="module")
def settings(tiny: Tiny) -> Settings:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "SIZES", (0.3, 0.6))
        return diffpatch.tune(tiny.pipe, ["a cat", "a dog"], call=call_of(tiny), pairs=0)


def test_a_front_is_rendered_stopped_and_gone_on_with(
    tiny: Tiny, settings: Settings, tmp_path: Path
) -> None:
    path, before = tmp_path / "wan.json", tiny.run()
    told: list[str] = []

    def stop(progress: fronts.Advance) -> None:
        if progress.done == 4:
            raise KeyboardInterrupt
        told.append(progress.what)

    options: dict[str, Any] = {
        "call": call_of(tiny), "sparse": (0.5,), "dense_steps": (0.15,), "caches": (ALWAYS,),
        "holds": (), "path": path,
    }  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        measure_front(tiny.pipe, settings, **options, on_progress=stop)
    assert told == [
        "dense: a cat",
        "dense by another kernel: a cat",
        "cache 1e+09: a cat",
        "attention 50% after 15%: a cat",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["wan.json.clips"]
    rendered: list[str] = []

    def noted(pipe: Any, call: Any, seed: int) -> Any:
        rendered.append(call["prompt"])
        return sample(pipe, call, seed)

    def warmed(pipe: Any, call: Any, seed: int) -> None:
        rendered.append("warm-up")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fronts, "sample", noted)
        patch.setattr(fronts, "warm_up", warmed)
        found = measure_front(tiny.pipe, settings, **options)
    # What was done is not done again, but dense, so that no times of two processes are compared.
    assert rendered == ["warm-up", *["a cat"] * 2, *["a dog"] * 4]
    of_cat = [run.dense_seconds for run in found.front if run.prompt == "a cat"]
    assert len(of_cat) == 3 and of_cat[0] == of_cat[1] != of_cat[2]
    assert Settings.load(path) == found and [p.name for p in tmp_path.iterdir()] == ["wan.json"]
    assert torch.equal(tiny.run(), before), "something was left behind"
    points = {point.applied.label: point for point in measured_points(found.front)}
    assert set(points) == {
        "cache 1e+09", "attention 50% after 15%", "attention 50% after 15% + cache 1e+09"
    }  # fmt: skip
    first = 1 / CALL["num_inference_steps"]
    layers = 2
    for label, point in points.items():  # the first step is computed, then the first block alone
        skips = "cache" in label
        assert point.calls == pytest.approx(first + (1 - first) / layers if skips else 1.0)
        assert 0 < point.psnr <= FINEST and point.spread >= 0
    assert all(0 < run.psnr < 100 for run in found.front)
    assert found.floor is not None and 50 < found.floor <= 100
    with pytest.raises(BadParameter, match="means nothing: dense differs from dense"):
        choose_for(found.model_copy(update={"floor": 45.0}), Target.parse("46 dB"))


def test_targets_in_decibels_and_speed_may_choose_a_cache(tiny: Tiny, settings: Settings) -> None:
    found = measure_front(
        tiny.pipe,
        settings,
        ["a cat"],
        call=call_of(tiny),
        sparse=(0.5,),
        dense_steps=(0.15,),
        caches=(ALWAYS,),
        holds=(),
    )
    fast = {"seconds": 1.0, "dense_seconds": 10.0, "psnr": 31.0}
    slow = {"seconds": 5.0, "dense_seconds": 10.0, "psnr": 40.0}
    front = [run.model_copy(update=fast if run.cache else slow) for run in found.front]
    made = settings.model_copy(update={"front": front})
    chosen = choose_for(made, Target.parse("27 dB"))
    assert chosen.cache == ALWAYS and chosen.speedup == pytest.approx(10)
    assert choose_for(made, Target.parse("35 dB")).cache is None
    plain = tiny.run(**CALL)
    diffpatch.patch(tiny.pipe, settings=made, target="27 dB")
    config = tiny.pipe.transformer._cache_config
    assert type(config).__name__ == "FirstBlockCacheConfig" and config.threshold == ALWAYS
    assert not torch.equal(tiny.run(**CALL), plain)
    report = diffpatch.report(tiny.pipe)
    assert report.calls < 2 * 6 * 2
    assert any("chosen for '27 dB': cache 1e+09" in note for note in report.notes)
    diffpatch.unpatch(tiny.pipe)
    assert tiny.pipe.transformer._cache_config is None
    assert torch.equal(tiny.run(**CALL), plain)
    with pytest.raises(BadParameter, match=r"the best that is faster than dense has 36\.4 dB"):
        choose_for(made, Target.parse("50 dB"))


def test_a_target_may_choose_held_steps(
    tiny: Tiny, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    found = measure_front(
        tiny.pipe, settings, ["a cat"], call=call_of(tiny), sparse=(0.5,), dense_steps=(0.5,),
        caches=(), holds=(ALWAYS,),
    )  # fmt: skip
    assert found.steps == CALL["num_inference_steps"]
    points = {point.applied.label: point for point in measured_points(found.front)}
    both = "attention 50% after 50% + hold 1e+09"
    assert set(points) == {"hold 1e+09", "attention 50% after 50%", both}
    for label in ("hold 1e+09", both):  # two steps are computed
        assert points[label].calls == pytest.approx(2 / CALL["num_inference_steps"])
    fast = {"seconds": 1.0, "dense_seconds": 10.0, "psnr": 31.0}
    slow = {"seconds": 5.0, "dense_seconds": 10.0, "psnr": 40.0}
    front = [run.model_copy(update=fast if run.hold else slow) for run in found.front]
    made = found.model_copy(update={"front": front})
    chosen = choose_for(made, Target.parse("27 dB"))
    assert chosen.hold == ALWAYS and chosen.cache is None and "hold" in str(chosen)
    assert choose_for(made, Target.parse("35 dB")).hold is None
    plain = tiny.run(**CALL)
    diffpatch.patch(tiny.pipe, settings=made, target="27 dB")
    assert not torch.equal(tiny.run(**CALL), plain)
    report = diffpatch.report(tiny.pipe)
    assert report.held_steps == CALL["num_inference_steps"] - 2
    assert any("chosen for '27 dB': hold 1e+09" in note for note in report.notes)
    other = "measured in runs of 6 steps, and this one has 5"
    assert other not in str(report)
    tiny.run(**CALL | {"num_inference_steps": 5})
    assert other in str(diffpatch.report(tiny.pipe)) and other in caplog.text
    tiny.run(**CALL | {"num_inference_steps": 1})
    assert other.replace("5", "1") in str(diffpatch.report(tiny.pipe))
    diffpatch.unpatch(tiny.pipe)
    assert torch.equal(tiny.run(**CALL), plain)
    with pytest.raises(BadParameter, match="leave out hold"):
        diffpatch.patch(tiny.pipe, settings=made, target="27 dB", hold=0.1)


def test_settings_of_another_grid_are_refused_at_the_first_forward(
    tiny: Tiny, settings: Settings
) -> None:
    with diffpatch.patched(tiny.pipe, settings=settings, target="kept 0.8"):
        with pytest.raises(BadParameter, match="tune at this size"):
            tiny.run(**CALL | {"height": 256, "width": 256, "num_inference_steps": 2})
        tiny.run(**CALL | {"height": 160})
        assert any("carried to" in note for note in diffpatch.report(tiny.pipe).notes)
        tiny.run(**CALL)
        assert not any("carried to" in note for note in diffpatch.report(tiny.pipe).notes)


def test_what_was_chosen_is_checked_on_fresh_prompts(
    tiny: Tiny, settings: Settings, tmp_path: Path
) -> None:
    path = tmp_path / "wan.json"
    options: dict[str, Any] = {"call": call_of(tiny), "path": path}
    found = check_prompts(tiny.pipe, settings, "kept 0.8", ["a fox", "a bird"], **options)
    assert [one.prompt for one in found.checked] == ["a fox", "a bird"]
    assert all(one.psnr > 5 and one.target == "kept 0.8" for one in found.checked)
    assert Settings.load(path) == found
    with pytest.raises(BadParameter, match=r"prompts=\['a cat'\]: give some that were not"):
        check_prompts(tiny.pipe, settings, "kept 0.8", ["a cat", "a fox"], **options)


def test_a_level_of_quality_is_dealt_out_over_the_heads(tiny: Tiny, settings: Settings) -> None:
    with diffpatch.patched(tiny.pipe, settings=settings, quality="high"):
        tiny.run(**CALL)
        report = diffpatch.report(tiny.pipe)
    first = 1 / CALL["num_inference_steps"]  # 15 % of six steps
    assert report.kept <= first + (1 - first) * 0.5 + 0.02
    assert any("chosen for 'high': kept" in note for note in report.notes)
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"quality": "low"}, "unknown quality 'low'"),
        ({"quality": "high", "target": "30 dB"}, "not beside quality='high'"),
        ({"target": "kept 0.8", "cache": 0.1}, "leave out cache"),
    )
    for options, message in wrong:
        with pytest.raises(BadParameter, match=message):
            diffpatch.patch(tiny.pipe, settings=settings, **options)


def test_a_bare_transformer_cannot_take_a_choice_with_a_cache(
    tiny: Tiny, settings: Settings
) -> None:
    run: dict[str, Any] = {
        "prompt": "a cat", "sparse": 1.0, "dense_steps": 0.0, "cache": 0.1, "kept": 1.0,
        "calls": 0.5, "psnr": 31.0, "seconds": 1.0, "dense_seconds": 2.0,
    }  # fmt: skip
    made = settings.model_copy(update={"front": [Measured(**run)]})
    with pytest.raises(BadParameter, match="patch the pipeline"):
        diffpatch.patch(tiny.pipe.transformer, settings=made, target="27 dB")


def test_a_model_is_tuned_once(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "SIZES", (0.3, 0.6))
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *_, **__: str(tmp_path))
    options: dict[str, Any] = {
        "call": call_of(tiny),
        "sparse": (0.5,),
        "dense_steps": (0.5,),
        "caches": (),
        "holds": (),
    }
    first = diffpatch.tuned(tiny.pipe, ["a cat"], **options)
    (file,) = (tmp_path / "settings").iterdir()
    monkeypatch.setattr(fronts, "sample", None)  # nothing is rendered again
    assert diffpatch.tuned(tiny.pipe, ["a cat"], **options) == first
    with pytest.raises(TypeError):  # other prompts are something else, and would be rendered
        diffpatch.tuned(tiny.pipe, ["a dog"], **options)
    monkeypatch.undo()
    file.write_text("{", encoding="utf-8")
    monkeypatch.setattr(tuning, "SIZES", (0.3, 0.6))
    again = diffpatch.tuned(tiny.pipe, ["a cat"], folder=file.parent, **options)
    assert again.curves == first.curves and Settings.load(file) == again
    file.unlink()
    curves = file.with_suffix(".curves.json")
    curves.write_text("{", encoding="utf-8")  # cut off: found out again as well
    again = diffpatch.tuned(tiny.pipe, ["a cat"], folder=file.parent, **options)
    assert again.curves == first.curves and file.is_file() and not curves.exists()
    with pytest.raises(BadParameter, match="unknown argument 'kept'"):
        diffpatch.tuned(tiny.pipe, ["a cat"], kept=0.5)


def test_bad_requests_are_refused(tiny: Tiny, settings: Settings) -> None:
    with pytest.raises(BadParameter, match="nothing to render"):
        measure_front(tiny.pipe, settings, sparse=(), caches=(), holds=())
    with pytest.raises(BadParameter, match="other weights"):
        measure_front(wan(layers=2, heads=3).pipe, settings)
    with pytest.raises(BadParameter, match="fractions of a run, below 1"):
        measure_front(tiny.pipe, settings, dense_steps=(0.15, 1.0))
