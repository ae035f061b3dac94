"""A day on a GPU, rehearsed: all of `diffpatch bench kernels` at small shapes, kernels interpreted.

What stands in is the card alone: a CPU is said to be an H100, and the kernels run as written.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from diffpatch import Neighborhood, TokenGrid
from diffpatch.cli import main
from diffpatch.cli.bench import kernels as command
from diffpatch.cli.options import names
from diffpatch.eval.bench import timing as bench_timing
from diffpatch.eval.bench.kernels import bench as bench_kernels
from diffpatch.eval.bench.kernels import choices, steps
from diffpatch.eval.bench.kernels import measurements as bench_measurements
from diffpatch.eval.bench.kernels.choices import ChosenCall
from diffpatch.eval.bench.kernels.measurements import Measurements
from diffpatch.eval.bench.kernels.shapes import LARGE, SHAPES, Shape
from diffpatch.eval.bench.kernels.steps import STEPS, Step
from diffpatch.eval.bench.kernels.watch import Watch
from diffpatch.kernels.block_sparse import backends, chooser
from diffpatch.kernels.block_sparse.gpu import triton_forward
from diffpatch.kernels.block_sparse.operators import OPERATORS
from diffpatch.kernels.gpu import support
from diffpatch.kernels.selection.api import select
from tests.kernels.gpu.triton_interpreter import interpreted
from tests.kernels.random_blocks import random_blocks

COMMAND = ["bench", "kernels", "--device", "cpu", "--repeats", "1", "--quiet"]
EVERYTHING = [*COMMAND, "--parts", *bench_kernels.PARTS, "--int8", "--shapes", "tiny"]


INTERPRETED = ("checks", "choices")  # the other rows run in minutes: PyTorch stands in for them


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that stands for one, and small shapes."""
    kinds, add = [""], Measurements.add

    def noted(self: Measurements, kind: str, *rest: Any) -> None:
        kinds.append(kind)
        add(self, kind, *rest)

    def reason(*_: Any) -> str | None:
        return None if kinds[-1] in INTERPRETED else "not in the rehearsal"

    monkeypatch.setattr(Measurements, "add", noted)
    for module in (triton_forward, support):
        monkeypatch.setattr(module, "arch", lambda device: 90)
        monkeypatch.setattr(module, "unsupported_reason", reason)
    for name, value in (("BATCH", 2), ("HEADS", 2), ("KEY_HEADS", 1)):
        monkeypatch.setattr(chooser, name, value)
    for name in ("gluon", "flex"):  # no interpreter knows the one, the other compiles for minutes
        absent = backends.ROWS[name]._replace(reason=lambda q, blocks: "left out of the rehearsal")
        monkeypatch.setitem(backends.ROWS, name, absent)
    blocks = random_blocks([16, 7], kept=0.6)
    monkeypatch.setattr(chooser, "small_blocks", lambda: blocks)
    window = Neighborhood(window=(1, 5, 9), stride=(1, 1, 1))
    monkeypatch.setattr(names, "SHAPES", (*names.SHAPES, "tiny"))  # of the parser
    monkeypatch.setitem(SHAPES, "tiny", Shape(TokenGrid(1, 8, 16), 1, 64, window))
    monkeypatch.setattr(bench_timing, "SHORTEST", 0.0)
    for name in list(choices.CHOICES):
        monkeypatch.delitem(choices.CHOICES, name)
    small = ChosenCall(TokenGrid(1, 8, 16, text_after=3), 1, 64, 0.3, tile=32, strip=16)
    monkeypatch.setitem(choices.CHOICES, "tiny", small)
    for name in list(STEPS):
        monkeypatch.delitem(STEPS, name)
    monkeypatch.setitem(STEPS, "tiny", Step("wan-1.3b", 5, 64, 64, 0.6, 0.0, layers=1))


@pytest.mark.usefixtures("h100")
def test_everything_runs_to_its_end_and_nothing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, written = tmp_path / "day.json", []
    write = command._write

    def save(path: Path, result: dict[str, Any]) -> None:
        write(path, result)
        written.append(json.loads(path.read_text()))

    monkeypatch.setattr(command, "_write", save)
    with interpreted():
        code = main([*EVERYTHING, "--kept", "0.6", "--json", str(file)])
    shown = capsys.readouterr().out
    assert code == 0, shown
    result = json.loads(file.read_text())
    checked = {(row["operator"], row["backend"], row["head_dim"]) for row in result["checks"]}
    right = [row for row in result["checks"] if "unsupported" not in row]
    names = [operator.name for operator in OPERATORS]
    assert {(name, "triton", size) for name in names for size in (64, 128)} <= checked
    assert {row["backend"] for row in right} == {"triton", "torch"}
    assert [row["wanted"] for row in result["rows"]] == [None, 0.6]
    for row in result["rows"]:
        assert row["sparse"]["torch"]["seconds"]["median"] > 0
    (choice,) = result["choices"]
    assert choice["agreement"] >= 0.99 and choice["error"] < 5e-3 and choice["share"] > 0
    assert set(choice["backends"].values()) == {"triton"}
    (step,) = result["steps"]
    assert set(step["methods"]) == {"radial", "neighborhood"}
    assert all(entry["speedup"]["median"] > 0 for entry in step["methods"].values())
    count = sum(len(result[kind]) for kind in command.KINDS)
    assert len(written) == count  # after every row, and the last one is all
    assert (
        written[-1] == result and sum(len(written[0].get(kind, ())) for kind in command.KINDS) == 1
    )
    for heading in ("head_dim", "of bound", "choosing", "1.00×"):
        assert heading in shown


@pytest.mark.usefixtures("h100")
def test_what_fails_or_has_no_time_left_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Memory runs out in the choice; a window takes long; the step, which takes longer, is left
    out, and what is shorter is still measured."""
    now = [0.0]
    monkeypatch.setattr(bench_measurements, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def window(*args: Any) -> Any:
        now[0] += 100.0
        return {"method": "x", "sparse": {}}

    monkeypatch.setattr(bench_kernels, "measure_choice", full)
    monkeypatch.setattr(bench_kernels, "measure", window)
    monkeypatch.setitem(STEPS, "tiny", Step("wan-1.3b", 5, 64, 64, 0.6, 250.0, layers=1))
    options = ["--parts", "kernels", "choices", "steps", "--shapes", "tiny", "--kept", "0.6"]
    file = tmp_path / "day.json"
    monkeypatch.setattr(command, "describe", str)
    assert main([*COMMAND, *options, "--limit-seconds", "300", "--json", str(file)]) == 1
    result = json.loads(file.read_text())
    assert "OutOfMemoryError" in result["choices"][0]["failed"]
    assert result["steps"][0]["not_measured"] == "100 of 300 seconds are over"
    assert [row["row_seconds"] for row in result["rows"]] == [100.0, 100.0]


def test_a_wrong_choice_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = select

    def other_for_auto(tiles: Any, rule: str, *rest: Any) -> Any:
        found = real(tiles, rule, *rest)
        return [~x for x in found] if tiles.backend == "auto" else found

    monkeypatch.setattr(choices, "select", other_for_auto)
    case = ChosenCall(TokenGrid(2, 8, 16), 1, 32, 0.3, tile=32, strip=16)
    qkv = tuple(torch.randn(1, 256, 1, 32) for _ in range(3))
    watch = Watch(torch.device("cpu"), lambda text: None, lambda text: None)
    found = choices.measure_choice(case, qkv, "MATH", 1, watch)  # type: ignore[arg-type]
    assert found["failed"].startswith("wrong: ") and "seconds" not in found


def test_the_published_shapes_are_those_of_the_day() -> None:
    kept = {name: choices.CHOICES[name].kept for name in choices.CHOICES}
    assert kept["wan-720p"] == 0.1 and max(kept[n] for n in kept if n.startswith("h3")) <= 0.22
    tokens = {name: choices.CHOICES[name].grid.num_tokens for name in choices.CHOICES}
    assert tokens == {"wan-720p": 75600, "h3-38k": 37700, "h3-104k": 104000}
    for name in ("h3-38k", "h3-104k"):
        shape = SHAPES[name]
        assert name in LARGE and shape.grid == choices.CHOICES[name].grid
    assert {step.model for step in STEPS.values()} == {"wan-1.3b", "wan-14b"}
    assert sum(step.expected for step in steps.STEPS.values()) < 460 / 2
