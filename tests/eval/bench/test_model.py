"""`diffpatch bench model`: random models have the published sizes; one step of them is timed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from diffpatch.cli import main
from diffpatch.eval.bench import model as bench_model
from diffpatch.pipelines.shapes import random_models
from diffpatch.pipelines.shapes.table import MODELS, ModelShape, shape_of

META = torch.device("meta")  # sizes without memory
# Billions of parameters of the published transformers.
PUBLISHED = {
    "wan-1.3b": 1.42, "wan-14b": 14.29, "wan2.2-a14b": 14.29, "wan-5b": 5.0, "hunyuan-video": 12.8,
    "cogvideox-2b": 1.7, "cogvideox-5b": 5.57, "mochi": 10.0, "ltx-video": 1.92, "flux": 11.9,
    "sd3.5-large": 8.06, "qwen-image": 20.4,
}  # fmt: skip
SMALL = [
    "bench", "model", "--model", "wan-1.3b", "--layers", "1", "--height", "64", "--width", "96",
    "--num-frames", "13", "--device", "cpu", "--repeats", "1", "--quiet",
]  # fmt: skip


@pytest.fixture(autouse=True)
def few_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_model, "OVERHEAD_SECONDS", 0.0)


@pytest.mark.parametrize(
    "shape", [x for x in MODELS if x.name in PUBLISHED], ids=lambda shape: shape.name
)
def test_a_random_model_is_the_published_one_and_takes_its_inputs(shape: ModelShape) -> None:
    build: dict[str, Any] = {"dtype": torch.bfloat16, "device": META}
    whole = random_models.build(shape, layers=None, **build)
    size = sum(parameter.numel() for parameter in whole.parameters())
    assert size / 1e9 == pytest.approx(PUBLISHED[shape.name], rel=0.02)
    if shape.name == "mochi":  # needs a real device: its forward asks for autocast
        return
    frames = 2 * shape.time + 1 if shape.kind == "video" else 1
    call = random_models.inputs(
        shape, num_frames=frames, height=128, width=256, batch=2, **build
    )  # fmt: skip
    with torch.no_grad():
        out = random_models.build(shape, layers=2, **build)(**call)[0]
    assert out.shape == call["hidden_states"].shape


def test_a_step_is_checked_and_timed(capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["--method", "neighborhood", "--method", "linear", "--kept", "0.5"]
    assert main([*SMALL, *methods, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["case"]["grid"] == "4×4×6" and result["case"]["layers"] == 1
    assert result["dense"]["seconds"]["median"] == min(result["dense"]["seconds"].values()) > 0
    assert 0.1 < result["overhead"]["median"] < 10  # a machine at work proves no more
    for entry in result["methods"].values():
        assert 0 <= entry["error"] < 1e-4 and 0.2 < entry["kept"] < 0.8
        ratio = result["dense"]["seconds"]["median"] / entry["seconds"]["median"]
        assert entry["speedup"]["median"] == pytest.approx(ratio)


def test_the_table_shows_what_a_patch_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--method", "window"]) == 0
    [row] = [line for line in capsys.readouterr().out.splitlines() if "all kept" in line]
    assert 0.1 < float(row.split()[4]) < 10 and "100.0%" in row


def test_short_forwards_have_longer_and_more_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    case = bench_model.ModelCase(shape_of("wan-1.3b"), 13, 64, 96, layers=1, dtype=torch.float32)
    seen: list[int] = []

    def busy(self: Any, count: int) -> float:
        seen.append(count)
        return 0.001 * count

    monkeypatch.setattr(bench_model._Stage, "_busy", busy)
    monkeypatch.setattr(bench_model, "OVERHEAD_SECONDS", 6.0)
    window = {"window": {"window": 0.5}}
    result = bench_model.bench_model(case, window, repeats=1, dense=bench_model.DEFAULT)
    assert seen == [1] + 2 * 10 * [300] and result["overhead"]["median"] == 1


def test_what_needs_several_steps_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--method", "radial+temporal"]) == 2
    assert "diffpatch bench render" in capsys.readouterr().err


def test_a_wrong_result_has_no_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffpatch.methods.base import Method

    real = Method.attend

    def wrong(self: Any, q: Any, k: Any, v: Any, call: Any) -> Any:
        return real(self, q, k, v.roll(1, dims=1), call)

    monkeypatch.setattr(Method, "attend", wrong)
    assert main([*SMALL, "--method", "window"]) == 1
    shown = capsys.readouterr()
    assert "window is wrong" in shown.err and shown.out == ""


def test_a_model_beyond_the_memory_is_refused_with_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_model, "free_bytes", lambda device: 8 * 2**30)
    words = ["bench", "model", "-m", "wan-14b", "--num-frames", "5", "--device", "cpu", "--quiet"]
    assert main([*words, "--dtype", "bf16"]) == 2
    error = capsys.readouterr().err
    assert "wan-14b with 40 layers needs about 2" in error and "8.0 GiB are free" in error
    assert "fewer layers (" in error and len(error.splitlines()) == 1
    case = bench_model.ModelCase(shape_of("wan-14b"), 5, 480, 832)
    weights, rest = bench_model.needed_bytes(case)
    assert weights == pytest.approx(2 * 14.29e9, rel=0.01) and 0 < rest < weights
