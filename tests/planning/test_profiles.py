"""Device profiles: predictions against measurements, fits, files that hold none."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

import diffpatch
from diffpatch import BadParameter
from diffpatch.cli import main
from diffpatch.eval.bench import profile as device_costs
from diffpatch.eval.bench.profile import CHECKED, ON_CPU, Sizes
from diffpatch.kernels.block_sparse.work import Work
from diffpatch.planning.profiles import DEVICES, DeviceProfile, load_profile, profile_names

COMMITTED = resources.files("diffpatch.eval") / "results" / "profile_cpu.json"
TINY = Sizes(((2, 8, 8), (3, 8, 10), (4, 8, 8)), ((3, 9, 10),), 2)


def test_predictions_are_within_15_percent_of_measurements_they_were_not_fitted_to() -> None:
    result = json.loads(COMMITTED.read_text(encoding="utf-8"))
    checks = device_costs.check(result)
    # demo-long's grid and an odd one, both dtypes, two head sizes, the demo's methods
    assert len(checks) == len(ON_CPU.held_out) * 2 * 2 * len(CHECKED)
    assert (33, 16, 16) in {tuple(row["grid"]) for row in checks}
    fitted = {tuple(row["grid"]) for row in result["rows"] if not row["held_out"]}
    assert not fitted & {tuple(row["grid"]) for row in checks}
    off = {
        (row["method"], *row["grid"], row["dtype"], row["head_dim"]): round(error, 3)
        for row in checks
        if abs(error := row["predicted"] / row["measured"] - 1) > 0.15
    }
    assert not off, "measure again with `diffpatch bench profile` if the torch backend changed"


def test_the_committed_profile_is_what_its_rows_give() -> None:
    result = json.loads(COMMITTED.read_text(encoding="utf-8"))
    fitted = [row for row in result["rows"] if not row["held_out"]]
    again = device_costs.fit(fitted, "torch")
    committed = result["profile"]["coefficients"]
    assert again.keys() == committed.keys()
    for key, costs in again.items():
        assert costs == pytest.approx(committed[key], rel=1e-3)
    assert result["environment"]["versions"]["torch"] and result["environment"]["device"]


def test_a_fit_finds_the_costs_that_made_the_times() -> None:
    true = {
        "calls": 2e-4, "keys": 2e-7, "rows": 9e-8, "masked": 3e-10, "virtual": 9e-9, "pooled": 6e-7,
        "pairs": 2e-9, "pairs_of_many": 2.6e-9, "pairs_of_few": 3e-9, "dense": 2e-9,
    }  # fmt: skip
    device = DeviceProfile("made up", "torch", {"fp32": 1e12}, 1e10, {"fp32/64": true})
    rows: list[dict[str, Any]] = []
    for shape in ((8, 16, 16), (7, 18, 20), (11, 14, 18)):
        for name, params in (("dense", {}), *device_costs.METHODS):
            row: dict[str, Any] = {"dtype": "fp32", "head_dim": 64, "heads": 3, "held_out": False}
            row |= {"method": name, "params": params, "grid": list(shape)}
            done = device_costs.work(row, "torch")
            tokens = diffpatch.TokenGrid(*shape).num_tokens
            dense = device.dense_seconds(tokens, 3, 64, "fp32")
            seconds = dense if name == "dense" else device.seconds(done, 3, 64, "fp32")
            rows.append(row | {"seconds": seconds})
    found = DeviceProfile("fit", "torch", {}, 1.0, device_costs.fit(rows, "torch"))
    for row in device_costs.predictions(rows, found):
        assert row["predicted"] == pytest.approx(row["measured"], rel=0.08), row["method"]


def test_a_published_device_is_a_roofline_and_says_so() -> None:
    assert {device.name for device in DEVICES} | {"cpu"} == set(profile_names())
    h100 = load_profile("H100")
    assert not h100.calibrated("bf16")
    # 4 · S² · H · D operations at 989.4 TFLOP/s
    assert h100.dense_seconds(32_760, 12, 128, "bf16") == pytest.approx(
        4 * 32_760**2 * 12 * 128 / 989.4e12
    )
    # 16 tokens are bound by memory: q, k, v and the output, 2 bytes each
    assert h100.dense_seconds(16, 1, 64, "bf16") == pytest.approx(4 * 16 * 64 * 2 / 3.35e12)
    size: dict[str, Any] = {"height": 480, "width": 832, "num_frames": 81}
    plan = diffpatch.plan("wan-1.3b", "neighborhood", profile="h100", **size)
    made = plan.predicted
    assert made is not None and plan.computed is not None and plan.visited is not None
    assert made.call_speedup == pytest.approx(1 / plan.computed)
    assert plan.kept_sparse <= plan.visited <= plan.computed
    assert 1 < made.step_speedup < made.attention_speedup <= plan.attention_speedup
    assert made.step_seconds == pytest.approx(made.dense_step_seconds / made.step_speedup)
    assert "UNCALIBRATED" in str(plan) and not made.calibrated
    dense = diffpatch.plan("wan-1.3b", "dense", profile="h100", dense_steps=1.0, **size).predicted
    assert dense is not None and dense.step_seconds == made.dense_step_seconds
    assert (dense.call_speedup, dense.attention_speedup, dense.step_speedup) == (1, 1, 1)
    measured = diffpatch.plan("wan-1.3b", "window", profile="cpu", **size).predicted
    assert measured is not None and measured.calibrated and measured.dtype == "fp32"
    assert "UNCALIBRATED" not in str(measured)


@pytest.mark.parametrize("dtype", ["bf16", "fp4"])
def test_a_dtype_has_to_be_known_to_the_device_and_to_diffpatch(dtype: str) -> None:
    size: dict[str, Any] = {"height": 96, "width": 160, "num_frames": 9, "dtype": dtype}
    device = replace(load_profile("h100"), peak={"fp32": 1e12, "fp4": 8e12})
    with pytest.raises(BadParameter, match=rf"dtype='{dtype}' on h100: .*fp32"):
        diffpatch.plan("wan-1.3b", "window", profile=device, **size)


def test_costs_of_another_head_size_follow_the_nearest() -> None:
    costs = dict.fromkeys(("calls", "keys", "rows", "pooled"), 0.0) | dict.fromkeys(
        ("pairs", "pairs_of_many", "pairs_of_few", "masked", "virtual", "dense"), 1e-9
    )
    device = DeviceProfile("made up", "torch", {}, 1.0, {"fp32/64": costs})
    assert device.dense_seconds(1000, 2, 80, "fp32") == pytest.approx(2 * 1000**2 * 1e-9 * 80 / 64)
    assert device.seconds(Work(pairs=1e6, calls=5), 2, 64, "fp32") == pytest.approx(2e-3)
    assert not device.calibrated("bf16")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no device profile .*known: 4090, a100, cpu"),
        ("nonsense", "is not a device profile"),
        ("{}", "is not a device profile"),
        ('{"profile": {"name": "x"}}', "is not a device profile"),
    ],
)
def test_what_is_no_profile_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "card.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(BadParameter, match=message):
        load_profile(path)


def test_the_command_writes_a_profile_that_a_plan_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device_costs, "ON_CPU", TINY)
    monkeypatch.setattr(device_costs, "METHODS", (("window", {}), ("linear", {})))
    monkeypatch.setattr("diffpatch.eval.bench.timing.SHORTEST", 0.0)
    path = str(tmp_path / "here.json")
    command = ["bench", "profile", "--json", path, "--dtype", "fp32", "--head-dim", "64",
               "--repeats", "1", "--device", "cpu", "--quiet"]  # fmt: skip
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "sliding_tile" in out and "3×9×10" in out and "off" in out
    size = ["--height", "480", "--width", "832", "--num-frames", "33"]
    plan = ["plan", "-m", "wan-1.3b", *size, "--method", "window", "--device-profile", path]
    assert main([*plan, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)["predicted"]
    assert made["calibrated"] and made["dtype"] == "fp32" and made["step_seconds"] > 0
    assert main([*plan, "--dtype", "fp16"]) == 2
    assert "dtype='fp16'" in capsys.readouterr().err
