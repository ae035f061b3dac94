"""The benchmark of the kernels runs to its end with every option, here without a GPU."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffpatch import Neighborhood, TokenGrid
from diffpatch.cli import main
from diffpatch.cli.options import names
from diffpatch.eval import environment
from diffpatch.eval.bench import timing as bench_timing
from diffpatch.eval.bench.case import Tensors
from diffpatch.eval.bench.kernels import bench as bench_kernels
from diffpatch.eval.bench.kernels import measurements as bench_measurements
from diffpatch.eval.bench.kernels import rivals as bench_rivals
from diffpatch.eval.bench.kernels import row as bench_row
from diffpatch.eval.bench.kernels import variants as bench_variants
from diffpatch.eval.bench.kernels import watch as bench_watch
from diffpatch.eval.bench.kernels.shapes import SHAPES, Shape
from diffpatch.eval.bench.timing import Call
from diffpatch.kernels.block_sparse.api import block_sparse_attention
from tests.kernels.random_blocks import random_blocks

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    window = Neighborhood(window=(1, 5, 9), stride=(1, 1, 1))
    monkeypatch.setattr(names, "SHAPES", (*names.SHAPES, "tiny", "tiny-last"))  # of the parser
    for name, last in (("tiny", False), ("tiny-last", True)):
        shape = Shape(TokenGrid(1, 8, 32, text_after=20), 1, 64, window, last)
        monkeypatch.setitem(SHAPES, name, shape)


def measured(shapes: tuple[str, ...] = ("tiny",), **options: Any) -> dict[str, Any]:
    options = {"repeats": 1, "dtypes": ["fp32"], **options}
    return bench_kernels.bench_kernels("cpu", shapes, **options)


def test_every_variant_is_checked_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from diffpatch.kernels.block_sparse.gpu import triton_forward as block_sparse_triton
    from diffpatch.kernels.gpu import support
    from tests.kernels.gpu.triton_interpreter import interpreted

    def reason(q: torch.Tensor, blocks: Any, backend: str) -> str | None:
        return "no interpreter knows it" if backend == "gluon" else None

    for module in (block_sparse_triton, support):
        monkeypatch.setattr(module, "arch", lambda device: 90)
    for module in (bench_row, bench_variants):
        monkeypatch.setattr(module, "unsupported_reason", reason)
    monkeypatch.setattr(support, "unsupported_reason", lambda device: None)
    layouts, loads = bench_variants.LAYOUTS, bench_variants.LOADS
    with interpreted():
        result = measured(dtypes=["bf16"], layouts=layouts, loads=loads, int8=True, gluon=True)
    (row,) = result["rows"]
    kernels = ("triton", "triton-int8", "triton-fp8")
    expected = {f"{name}{load}{place}" for name in kernels for load in ("", " pointer", " tma")
                for place in ("", " ordered")}  # fmt: skip
    assert set(row["sparse"]) == expected | {"triton gather", "torch", "torch ordered"}
    errors = {name: entry["error"] for name, entry in row["sparse"].items()}
    assert max(errors[name] for name in errors if "8" not in name) < 5e-3
    of_int8 = [errors[name] for name in errors if "int8" in name]
    of_fp8 = [errors[name] for name in errors if "fp8" in name]
    assert min(of_int8) > 5e-3 and min(of_fp8) > 2 * max(of_int8) and max(of_fp8) < 8e-2
    assert row["kept"] < row["visited"] <= 1
    assert row["unsupported"] == {"triton": None, "gluon": "no interpreter knows it"}


def test_the_command_runs_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--shapes", "tiny", "--dtype", "fp32", "--repeats", "1", "--int8"]
    assert main(["bench", "kernels", *options, "--layout", "permuted", "ordered", "gather"]) == 0
    table = capsys.readouterr().out
    assert "torch ordered" in table and "triton" not in table
    assert main(["bench", "kernels", *options, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    entry = row["sparse"]["torch"]
    flops = 4 * 64 * row["visited"] * row["tokens"] ** 2
    assert entry["tflops"] == pytest.approx(flops / entry["seconds"]["median"] / 1e12)
    assert row["permuting"]["median"] > 0
    assert "q is on the cpu" in row["unsupported"]["triton"]


def broken(reason: Exception) -> Call:
    def call() -> torch.Tensor:
        raise reason

    return call


def test_what_is_wrong_or_fails_has_no_speed_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def variants(qkv: Tensors, *_: object) -> dict[str, Call]:
        failing = broken(torch.OutOfMemoryError("no memory\nof 7 GiB"))
        return {"torch ordered": lambda: qkv[0], "hungry": failing}

    monkeypatch.setattr(bench_row, "variant_calls", variants)
    options = ["--device", "cpu", "--shapes", "tiny", "--dtype", "fp32", "--repeats", "1"]
    assert main(["bench", "kernels", *options, "--kept", "0.5"]) == 1
    told = capsys.readouterr()
    assert told.out.count("failed: OutOfMemoryError: no memory of 7 GiB") == 2
    assert told.out.count("failed: wrong: relative error ") == 2
    for row in measured(kept=[0.5])["rows"]:
        entries = row["sparse"]
        assert entries["torch"]["speedup"]["median"] > 0 and entries["torch"]["error"] < 1e-5
        assert entries["torch ordered"].keys() == {"error", "failed"}
        assert entries["hungry"].keys() == {"failed"}


def test_windows_come_first_and_those_of_others_last() -> None:
    plan = list(bench_kernels._plan(("tiny-last", "small-10%", "tiny"), ("bf16", "fp16"), (0.5,)))
    names = [(name, wanted) for name, dtype, wanted in plan if dtype == "fp16"]
    windows = [("small-10%", None), ("tiny", None)]
    halves = [("small-10%", 0.5), ("tiny", 0.5)]
    assert names == [*windows, *halves, ("tiny-last", None)]
    assert len(plan) == 2 * len(names)


def test_what_there_is_no_time_for_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: sum(seconds))
    monkeypatch.setattr(bench_measurements, "time", clock)

    def slow(*_: object) -> dict[str, Any]:
        seconds.append(40.0)
        return {"sparse": {}}

    monkeypatch.setattr(bench_kernels, "measure", slow)
    result = measured(kept=[0.5, 0.25, 0.15, 0.05], limit_seconds=130.0)
    reasons = [row.get("not_measured", "") for row in result["rows"]]
    # Three rows of 40 seconds fit into 130.
    assert reasons[:3] == ["", "", ""] and result["seconds"] == 120.0
    assert reasons[3:] == ["120 of 130 seconds are over"] * 2


def test_fractions_that_text_makes_unreachable_are_not_measured() -> None:
    (_, row) = measured(kept=[0.05])["rows"]
    assert "no window here keeps less than" in row["not_measured"] and "sparse" not in row


def test_a_run_that_is_killed_has_written_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Iterator[dict[str, Call]] = iter([{}])

    def variants(*_: object) -> dict[str, Call]:
        try:
            return next(made)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(bench_row, "variant_calls", variants)
    options = ["--device", "cpu", "--shapes", "tiny", "--dtype", "fp32", "--repeats", "1"]
    assert (
        main(["bench", "kernels", *options, "--kept", "0.5", "--json", str(tmp_path / "rows.json")])
        == 130
    )
    written = json.loads((tmp_path / "rows.json").read_text())
    (row,) = written["rows"]
    assert row["sparse"]["torch"]["tflops"] > 0 and written["environment"]["versions"]["torch"]


class PretendAccelerator:
    """What is asked of a GPU; its work takes 3 seconds."""

    def __init__(self) -> None:
        self.answers, self.queued, self.now = True, 0, 0.0

    def synchronize(self, device: torch.device) -> None:
        if not self.answers:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        self.now += 3.0 * self.queued
        self.queued = 0

    def empty_cache(self) -> None: ...

    def launch(self) -> torch.Tensor:
        self.queued += 1
        self.now += 0.5
        return torch.zeros(1)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> PretendAccelerator:
    gpu = PretendAccelerator()
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.accelerator, name, getattr(gpu, name))
    return gpu


def test_times_of_a_gpu_wait_for_it_and_those_of_the_host_do_not(
    gpu: PretendAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (bench_row, bench_timing):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: gpu.now))
    device = torch.device("cuda", 0)
    assert bench_row.host_seconds(gpu.launch, device) == 0.5
    times = bench_timing.interleaved({"one": gpu.launch}, 2, device)
    assert times == {"one": [3.5, 3.5]}
    assert bench_row.host_seconds(gpu.launch, CPU) is None


def test_a_gpu_that_answers_no_more_fails_all_that_follows(
    gpu: PretendAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda", 0)
    assert bench_measurements.failure(ValueError("once"), device) == "ValueError: once"

    def ends(*_: object) -> dict[str, Any]:
        gpu.answers = False
        bench_measurements.failure(RuntimeError("in the kernel"), device)
        return {}

    monkeypatch.setattr(bench_kernels, "measure", ends)
    rows = measured(("tiny", "tiny-last"))["rows"]
    assert [row["failed"] for row in rows] == [
        "the GPU answers no more: RuntimeError: in the kernel"
    ] * 2


def test_what_hangs_is_named_before_the_process_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()

    def exit_process(code: int) -> None:
        if code == 1:
            ended.set()

    def hangs() -> torch.Tensor:
        assert ended.wait(60)
        raise KeyboardInterrupt  # the process would be over

    class PatientTimer(threading.Timer):
        """Nothing but the kernel is late, however busy the machine is."""

        def __init__(self, seconds: float, function: Any, args: list[str]) -> None:
            super().__init__(seconds if args[0].startswith("gluon") else 3600, function, args)

    monkeypatch.setattr(bench_watch, "HANGS_AFTER", {"cpu": 0.5})
    monkeypatch.setattr(threading, "Timer", PatientTimer)
    monkeypatch.setattr(os, "_exit", exit_process)
    monkeypatch.setattr(bench_row, "variant_calls", lambda *_: {"gluon": hangs})
    options = ["--device", "cpu", "--shapes", "tiny", "tiny-last", "--dtype", "fp32"]
    assert main(["bench", "kernels", *options, "--json", str(tmp_path / "rows.json")]) == 130
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["shape"] == "tiny" and "hangs: gluon: no end after 0.5 s" in row["failed"]


def test_the_kernel_made_for_hopper_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_variants, "unsupported_reason", lambda q, blocks, name: None)
    blocks, q = random_blocks([64, 37]), torch.randn(1, 101, 1, 64)
    variants = bench_variants.Variants(("permuted", "ordered"), (), int8=False, gluon=True)
    calls = bench_variants.variant_calls((q, q, q), blocks, variants)
    others = {"gluon no turns", "gluon 64 keys", "gluon 64 keys, no turns"}
    assert set(calls) == {"gluon", "gluon ordered", "torch ordered", *others}
    without = dataclasses.replace(variants, gluon=False)
    assert set(bench_variants.variant_calls((q, q, q), blocks, without)) == {"torch ordered"}


def test_flex_stays_compiled_from_shape_to_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch compiles a function eight times and then runs it as it is: unfused, at these sizes
    without any memory left."""
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Any:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    for count in range(1, 10):
        blocks = random_blocks([64] * count + [37], seed=count)
        q, k, v = (torch.randn(1, blocks.num_tokens, 1, 16) for _ in range(3))
        call = bench_rivals.flex_call((q, k, v), blocks, compiled=True)
        for _ in range(2):
            out = call()
        assert len(compiled) == count
    expected = block_sparse_attention(q, k, v, blocks, backend="reference")
    torch.testing.assert_close(out, expected)


def test_rivals_are_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_row, "flex_call", lambda *_, compiled: "flex" if compiled else "")
    shape, blocks = SHAPES["small-sliding"], random_blocks([64, 37])
    with FakeTensorMode():
        far = torch.empty(1, 101, 1, 64, device="cuda")
    near = torch.empty(1, 101, 1, 64)
    assert bench_row.rival_calls((near, near, near), blocks, shape) == {}
    # NATTEN is not installed here.
    rivals: dict[str, Any] = bench_row.rival_calls((far, far, far), blocks, shape)
    assert rivals == {"flex": "flex"}


def test_the_unfused_dense_is_not_tried_where_a_fused_one_runs() -> None:
    q = torch.randn(1, 64, 2, 32)
    tried = bench_row.dense_times((q, q, q), repeats=2)
    assert set(tried) == {"FLASH_ATTENTION", "FLASH_ATTENTION, by head"}
    for name, times in tried.items():
        assert len(times) == 2 and min(times) > 0
        out = bench_timing.dense_call(name, (q, q, q))()
        x = q.transpose(1, 2)
        expected = torch.nn.functional.scaled_dot_product_attention(x, x, x)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("answer", ["580.95.05, 700.00 W, 1980 MHz, 3201 MHz", None])
def test_the_environment_names_the_gpu(answer: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(
        major=9, minor=0, uuid="4d3c", multi_processor_count=132, total_memory=2**37
    )
    run = subprocess.run

    def smi(command: list[str], **options: Any) -> Any:
        if command[0] != "nvidia-smi":
            return run(command, **options)
        if answer is None:
            raise FileNotFoundError
        return SimpleNamespace(stdout=f"GPU-1a2b, 1, 2 W, 3, 4\nGPU-4d3c, {answer}\n")

    monkeypatch.setattr(subprocess, "run", smi)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setenv("DIFFPATCH_COMMIT", "98fd370")
    found = environment.environment("cuda:0")
    assert found["device"] == "NVIDIA H200" and found["commit"] == "98fd370"
    assert found["gpu"]["capability"] == "9.0" and found["gpu"]["multiprocessors"] == 132
    assert found["gpu"]["driver_version"] == (answer and "580.95.05")
    assert found["gpu"]["power.limit"] == (answer and "700.00 W")


def test_visited_pairs_are_those_of_the_tiles() -> None:
    blocks = random_blocks([5, 3, 8], kept=0.5, partial=0.5, seed=1)
    sizes = torch.tensor([5, 3, 8])
    pairs = 0
    for tile in range(3):
        for key in blocks.cols[blocks.row_ptr[tile] : blocks.row_ptr[tile + 1]].tolist():
            pairs += int(sizes[tile] * sizes[key])
    assert bench_row.visited_pairs(blocks) == pairs


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--repeats", "0", "a whole number of at least 1"),
        ("--limit-seconds", "-5", "a number of at least 1"),
        ("--kept", "1.5", "a fraction of the pairs in (0, 1]"),
        ("--kept", "half", "a fraction of the pairs in (0, 1]"),
        ("--shapes", "nope", "'nope': known"),
    ],
)
def test_options_that_cannot_work_are_refused(
    option: str, value: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "kernels", option, value]) == 2
    assert words in capsys.readouterr().err
