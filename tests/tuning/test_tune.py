"""Tuning a tiny model: its curves against attention by hand, resuming, and using the result."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

import diffpatch
from diffpatch import BadParameter
from diffpatch.kernels.dense import attend_dense
from diffpatch.methods.base import AttentionCall
from diffpatch.methods.dynamic import Dynamic
from diffpatch.patterns.grid import TokenGrid
from diffpatch.targets.choice import choose_for
from diffpatch.targets.settings import Settings
from diffpatch.targets.target import Target
from diffpatch.tuning import tune as tuning
from diffpatch.tuning.probe import Candidate, Probe, sampled_steps
from diffpatch.tuning.tune import psnr, tune
from tests.tiny import Tiny, wan, wan22

CALL: dict[str, Any] = {"height": 128, "width": 128, "num_frames": 9, "num_inference_steps": 4}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Tiny:
    monkeypatch.setattr(tuning, "SIZES", (0.3, 0.6))
    monkeypatch.setattr(tuning, "PAIRS", (0.3, 0.6))
    return wan()


def call_of(tiny: Tiny) -> dict[str, Any]:
    return {k: v for k, v in tiny.call.items() if k not in ("prompt", "output_type")} | CALL


def test_errors_are_those_of_each_head() -> None:
    grid = TokenGrid(3, 8, 16)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, grid.num_tokens, 3, 8, generator=generator).unbind(0)
    method = Dynamic(kept=0.4, tile=32, strip=16, pool=16, refresh=1)
    probe = Probe.of((Candidate("virtual", method),), 0.0)
    pattern = method.pattern(grid)
    for step in range(8):
        out = probe.attend(q, k, v, AttentionCall(pattern, step=step, total=8, layer=2)).out
    exact = attend_dense(q, k, v, None, None)
    torch.testing.assert_close(out, exact)
    tried = method.attend(q, k, v, AttentionCall(pattern, layer=2))
    curves = probe.curves("transformer")
    assert set(curves) == {f"transformer.2.{head}" for head in range(3)}
    for head in range(3):
        ((kept, error),) = curves[f"transformer.2.{head}"]["virtual"]
        wrong = (tried.out - exact)[:, :, head].abs().sum() / exact[:, :, head].abs().sum()
        assert error == pytest.approx(float(wrong), rel=1e-4)
        assert kept == pytest.approx(float(torch.as_tensor(tried.kept)), rel=1e-5)
    assert len(probe.errors[2, 0]) == 3 and probe.grids == {grid}


def test_steps_are_sampled_in_the_middle_of_the_parts() -> None:
    assert sampled_steps(8, 0.25) == {3, 5, 7}
    assert sampled_steps(30, 0.0) == {5, 15, 25}
    assert sampled_steps(1, 0.9) == {0} and sampled_steps(None, 0.5) == {0}


def test_a_model_is_tuned_checked_and_run(small: Tiny, tmp_path: Path) -> None:
    path, told = tmp_path / "wan.json", []
    before = small.run()
    settings = tune(
        small.pipe, ["a cat", "a dog"], call=call_of(small), pairs=1, path=path,
        on_progress=lambda prompt, done, of: told.append((prompt, done, of)),
    )  # fmt: skip
    assert told == [("a cat", 1, 2), ("a dog", 2, 2)]
    assert Settings.load(path) == settings and [p.name for p in tmp_path.iterdir()] == ["wan.json"]
    layers = len(diffpatch.patch(small.pipe, "window").transformer._diffpatch.modules)
    diffpatch.unpatch(small.pipe)
    heads = small.pipe.transformer.config.num_attention_heads
    assert len(settings.curves) == layers * heads
    for rules in settings.curves.values():
        for rest in ("virtual", "drop"):
            (low, wrong), (high, right) = rules[rest]
            assert 0 < low < high <= 1 and wrong > 0 and right >= 0
    assert len(settings.rendered) == 2 and all(p.psnr > 5 for p in settings.rendered)
    assert settings.measured_on.steps == 4 and settings.floor is not None
    assert torch.equal(small.run(), before), "tuning left something behind"

    chosen = choose_for(settings, Target.parse("kept 0.8"))
    diffpatch.patch(small.pipe, settings=path, target="kept 0.8")
    small.run(**CALL)
    report = diffpatch.report(small.pipe)
    assert report.kept <= 0.8 + 1e-6 and report.kept == pytest.approx(chosen.kept, abs=0.1)
    with pytest.raises(BadParameter, match="cannot be reached"):
        diffpatch.patch(small.pipe, settings=settings, target="kept 0.1")
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"target": "30 dB"}, "needs settings="),
        ({"settings": path}, "needs target="),
        ({"settings": path, "target": "fast"}, "must be a text such as"),
        ({"settings": path, "target": "kept 0.8", "decay": 1.0}, "leave out decay"),
        ({"settings": path, "target": "kept 0.8", "method": "window"}, "leave out method='window'"),
    )
    for options, message in refused:
        with pytest.raises(BadParameter, match=message):
            diffpatch.patch(small.pipe, **options)


def test_a_model_that_is_offloaded_by_parts_comes_to_the_same(small: Tiny) -> None:
    call = call_of(small)
    there = tune(small.pipe, ["a cat"], call=call, pairs=0)
    accelerate.cpu_offload(small.pipe.transformer, execution_device=torch.device("cpu"))
    away = tune(small.pipe, ["a cat"], call=call, pairs=0)
    assert away.measured_on.model == there.measured_on.model and away.curves == there.curves
    diffpatch.patch(small.pipe, settings=there, target="kept 0.8")
    small.run(**CALL)
    assert diffpatch.report(small.pipe).kept <= 0.8 + 1e-6


def test_two_experts_are_tuned_as_one(small: Tiny) -> None:
    tiny = wan22()
    call = call_of(tiny)
    settings = tune(tiny.pipe, ["a cat"], call=call, pairs=0)
    on = settings.measured_on
    assert set(on.transformers) == {"transformer", "transformer_2"}
    assert {unit.split(".")[0] for unit in settings.curves} == {"transformer"}
    one = tiny.pipe.transformer_2
    with torch.no_grad():  # errors are those of both: another second expert has others
        for value in one.parameters():
            value.mul_(3)
    other = tune(tiny.pipe, ["a cat"], call=call, pairs=0)
    assert other.curves != settings.curves and other.measured_on.model != on.model
    diffpatch.patch(tiny.pipe, settings=other, target="kept 0.8")
    tiny.run(**CALL)
    layers = {name.split(".")[0] for name in diffpatch.report(tiny.pipe).kept_per_layer}
    assert layers == {"transformer", "transformer_2"}
    assert diffpatch.report(tiny.pipe).kept <= 0.8 + 1e-6
    with pytest.raises(BadParameter, match="other weights"):
        diffpatch.patch(tiny.pipe, settings=settings, target="kept 0.8")


def test_experts_that_differ_are_refused(small: Tiny) -> None:
    tiny = wan22()
    tiny.pipe.transformer_2 = wan(layers=3).pipe.transformer
    with pytest.raises(BadParameter, match="experts that are alike"):
        tune(tiny.pipe, ["a cat"], call=call_of(tiny))


def test_a_stopped_tuning_goes_on_where_it_was(
    small: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "wan.json"
    whole = tune(small.pipe, ["a cat", "a dog"], call=call_of(small), pairs=0, path=path)
    path.unlink()

    def stop(prompt: str, done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(small.pipe, ["a cat", "a dog"], call=call_of(small), pairs=0, path=path,
             on_progress=stop)  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["wan.json.part"]
    seen: list[str] = []
    real = tuning._of_prompt

    def noted(pipe: Any, prompt: str, *rest: Any) -> Any:
        seen.append(prompt)
        return real(pipe, prompt, *rest)

    monkeypatch.setattr(tuning, "_of_prompt", noted)
    again = tune(small.pipe, ["a cat", "a dog"], call=call_of(small), pairs=0, path=path)
    assert seen == ["a dog"]
    assert again.curves == whole.curves


def test_a_damaged_or_foreign_part_is_measured_again(small: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "wan.json"
    for content in ("{", json.dumps({"ties": "of something else", "found": {}, "place": {}})):
        (tmp_path / "wan.json.part").write_text(content)
        assert tune(small.pipe, ["a cat"], call=call_of(small), pairs=0, path=path).curves


def test_bad_requests_are_refused(small: Tiny, tmp_path: Path) -> None:
    for path in ("", ".", tmp_path):
        said = f"path='{path}' must be the path of a file, not of a folder"
        with pytest.raises(BadParameter, match=re.escape(said)):
            tune(small.pipe, ["a"], path=path)
    for wrong in ([], [3]):
        with pytest.raises(BadParameter, match="prompts="):
            tune(small.pipe, wrong)  # type: ignore[arg-type]
    with pytest.raises(BadParameter, match=r"'aaaa.*'… has 20,001 letters, .* 20,000: shorten it"):
        tune(small.pipe, ["a cat", 20_001 * "a"])  # no file would hold it
    with pytest.raises(BadParameter, match=r"dense_steps=1\.5"):
        tune(small.pipe, ["a"], dense_steps=1.5)


def test_psnr_is_the_mean_over_frames() -> None:
    reference = torch.full((2, 3, 4, 4), 0.5)
    frames = reference.clone()
    frames[1] += 0.1
    assert psnr(frames, reference) == pytest.approx((100 + 20) / 2, abs=1e-4)
