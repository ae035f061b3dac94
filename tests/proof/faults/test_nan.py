"""A model or a method that yields NaN is named, wherever pictures or numbers are made of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import diffpatch
from diffpatch import Window
from diffpatch.cli import main
from diffpatch.errors import DiffpatchError
from diffpatch.eval.quality import evaluate as evaluation
from diffpatch.eval.quality.evaluate import evaluate_model
from diffpatch.files import read_json
from diffpatch.methods.base import Attended, AttentionCall
from diffpatch.tuning.probe import Candidate, Probe
from tests.tiny import Tiny, wan

SIZE = ["--height", "32", "--width", "64", "--num-frames", "9", "--steps", "2"]


@dataclass(frozen=True)
class Broken(Window):
    """Windows that yield NaN in one head."""

    name = "broken"
    only_skips = False

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall
    ) -> Attended:
        done = super().attend(q, k, v, call)
        out = done.out.clone()
        out[:, :, 1] = torch.nan
        return Attended(out, done.kept, done.backend)


BROKEN = Broken(window=(-1, 1, 2), shift="none")


def nan_model() -> Tiny:
    tiny = wan()
    tiny.pipe.transformer.proj_out.weight.data.fill_(float("nan"))
    return tiny


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    nan_model().pipe.save_pretrained(tmp_path / "nan")
    return tmp_path / "nan"


def test_rows_of_an_evaluation_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the prompt and the seed, and before anything is averaged."""
    nothing: Any = None  # no network is asked
    tiny, call = wan(), {"height": 32, "width": 64, "num_frames": 9, "max_sequence_length": 16}
    methods: dict[str, Any] = {"window": {"window": (-1, 1, 2), "dense_layers": 0}}

    def evaluate(pipe: Any) -> None:
        steps = {"num_inference_steps": 2}
        evaluate_model(pipe, call | steps, ["a cat"], methods, nothing, seed=3)

    with pytest.raises(DiffpatchError, match=r"^warming up window: prompt 'a cat', seed 3: step 1"):
        evaluate(nan_model().pipe)
    calls = iter(range(100))
    monkeypatch.setattr(evaluation, "warm_up", lambda *_: None)
    weight = tiny.pipe.transformer.proj_out.weight.data

    def breaks(*_: Any) -> None:
        if next(calls) == 2:  # the first forward of the second step
            weight.fill_(float("nan"))

    tiny.pipe.transformer.register_forward_pre_hook(breaks)
    with pytest.raises(DiffpatchError, match=r"^dense: prompt 'a cat', seed 3: step 2 yields NaN"):
        evaluate(tiny.pipe)


@pytest.mark.parametrize(
    "words",
    [["render", "--prompt", "a cat", "-o"], ["eval", "--prompt", "a cat", "--json"],
     ["tune", "--prompt", "a cat", "-o"]],
    ids=lambda words: words[0],
)  # fmt: skip
def test_commands_say_it_in_one_line_and_write_nothing(
    words: list[str], saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / ("out" if words[0] == "render" else "out.json")
    extra = ["--method", "window"] if words[0] != "tune" else []
    capsys.readouterr()
    code = main([*words, str(out), "-m", str(saved), *SIZE, *extra, "--quiet"])
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 1 and "Traceback" not in "".join(said)
    assert "', seed 0: step 1 yields NaN or infinity" in said[-1] and "prompt 'a " in said[-1]
    left = list(out.rglob("*")) if out.is_dir() else [out] if out.exists() else []
    assert not [path for path in left if path.is_file()]


def test_a_sweep_names_the_runs_that_yield_nan(saved: Path, tmp_path: Path) -> None:
    spec = {
        "model": str(saved), "prompts": ["a cat"], "steps": 2, "noise_floor": [],
        "methods": ["window"], "sizes": [{"height": 32, "width": 64, "num_frames": 9}],
    }  # fmt: skip
    path, out = tmp_path / "spec.json", tmp_path / "runs"
    path.write_text(json.dumps(spec))
    assert main(["sweep", str(path), "-o", str(out), "--quiet"]) == 1
    dense, window = (read_json(one) for one in sorted((out / "failed").glob("*.json")))
    assert dense["error"].startswith("NonFiniteOutput: prompt 'a cat', seed 0: step 1 yields NaN")
    assert window["error"].startswith("DenseFailed: dense has failed")
    assert not (out / "runs").exists() or not list((out / "runs").iterdir())


def test_a_setting_that_yields_nan_is_named_by_its_head() -> None:
    """The picture is that of dense attention and shows nothing."""
    tiny = wan()
    probe = Probe.of((Candidate("drop", BROKEN),), 0.0)
    with diffpatch.patched(tiny.pipe, probe, dense_steps=0, dense_layers=0):
        assert torch.isfinite(tiny.run()).all()
    with pytest.raises(DiffpatchError, match=r"layer 0, head 1 of transformer: .*Broken.* is nan"):
        probe.curves("transformer")


def test_errors_of_attention_that_hold_nan_are_nan() -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, BROKEN, dense_steps=0)
    with diffpatch.attention_error(tiny.pipe) as errors:
        tiny.run()
    for number in (errors.mean, *errors.per_layer.values(), *errors.per_step.values()):
        assert number != number
