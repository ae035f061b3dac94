"""The benchmark of the kernels runs to its end with every option, here without a GPU."""

from __future__ import annotations

import json

import pytest
import torch

from diffpatch import Neighborhood, TokenGrid
from diffpatch.eval import bench_kernels, bench_variants
from diffpatch.eval.bench_attention import WrongResult
from diffpatch.kernels import block_sparse
from tests.random_blocks import random_blocks


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    window = Neighborhood(window=(1, 5, 9), stride=(1, 1, 1))
    shape = bench_kernels.Shape(TokenGrid(1, 8, 32, text_after=20), 1, 64, window)
    monkeypatch.setitem(bench_kernels.SHAPES, "tiny", shape)


def test_every_variant_is_checked_and_measured(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from diffpatch.kernels import block_sparse_triton
    from tests.triton_interpreter import interpreted

    monkeypatch.setattr(block_sparse_triton, "arch", lambda device: 90)
    for module in (bench_kernels, bench_variants, block_sparse):
        monkeypatch.setattr(module, "unsupported_reason", lambda q, blocks, backend: None)
    with interpreted():
        result = bench_kernels.bench_kernels(
            "cpu",
            ["tiny"],
            layouts=bench_variants.LAYOUTS,
            loads=bench_variants.LOADS,
            int8=True,
            repeats=1,
        )
    (row,) = result["rows"]
    kernels = ("triton", "triton-int8")
    expected = {f"{name}{load}{place}" for name in kernels for load in ("", " pointer", " tma")
                for place in ("", " ordered")}  # fmt: skip
    assert set(row["sparse"]) == expected | {"triton gather", "torch", "torch ordered"}
    errors = {name: entry["error"] for name, entry in row["sparse"].items()}
    assert max(errors[name] for name in errors if "int8" not in name) < 5e-3
    assert min(errors[name] for name in errors if "int8" in name) > 5e-3
    assert row["kept"] < row["visited"] <= 1


def test_the_command_runs_on_a_cpu(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--shapes", "tiny", "--dtype", "fp32", "--repeats", "1", "--int8"]
    assert bench_kernels.main([*options, "--layout", "permuted", "ordered", "gather"]) == 0
    table = capsys.readouterr().out
    assert "torch ordered" in table and "triton" not in table
    assert bench_kernels.main([*options, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    entry = row["sparse"]["torch"]
    flops = 4 * 64 * row["visited"] * row["tokens"] ** 2
    assert entry["tflops"] == pytest.approx(flops / entry["seconds"]["median"] / 1e12)
    assert row["permuting"]["median"] > 0


def test_a_wrong_variant_has_no_speed(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(qkv: bench_variants.Tensors, *_: object) -> dict[str, bench_variants.Call]:
        return {"torch ordered": lambda: qkv[0]}

    monkeypatch.setattr(bench_kernels, "variant_calls", wrong)
    with pytest.raises(WrongResult, match="torch ordered is wrong"):
        bench_kernels.bench_kernels("cpu", ["tiny"], dtypes=["fp32"], repeats=1)


def test_visited_pairs_are_those_of_the_tiles() -> None:
    blocks = random_blocks([5, 3, 8], kept=0.5, partial=0.5, seed=1)
    sizes = torch.tensor([5, 3, 8])
    pairs = 0
    for tile in range(3):
        for key in blocks.cols[blocks.row_ptr[tile] : blocks.row_ptr[tile + 1]].tolist():
            pairs += int(sizes[tile] * sizes[key])
    assert bench_kernels.visited_pairs(blocks) == pairs
