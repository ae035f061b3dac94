"""What ships compiles for GPUs that are not here: some of it now, all of it in the table."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import triton

from diffpatch.kernels.compile import check as compile_check
from diffpatch.kernels.compile.cases import CompileCase, cases, configuration
from diffpatch.kernels.gpu.support import GPUS

TABLE = Path(compile_check.__file__).resolve().parents[2] / "eval/results/compile_table.json"
FIELDS = [field.name for field in dataclasses.fields(CompileCase)]
SAMPLE = {
    "what most GPUs run": CompileCase(90, "forward", "bf16", 128, 128, False),
    "a smaller GPU": CompileCase(89, "forward", "fp16", 96, 128, False),
    "as on 8.9": CompileCase(86, "forward", "bf16", 128, 128, False),
    "as on 10.0": CompileCase(103, "forward", "bf16", 128, 128, False),
    "a key mask": CompileCase(100, "forward", "bf16", 128, 128, True),
    "loads by warps of their own": CompileCase(
        100, "forward", "bf16", 128, 128, False, "tma", True
    ),
    "keys where they are": CompileCase(90, "forward", "bf16", 128, 128, False, "gather"),
    "scheduled by hand": CompileCase(90, "gluon", "bf16", 128, 128, False),
    "by hand with a key mask": CompileCase(90, "gluon", "fp16", 128, 128, True),
    "scores in 8 bits": CompileCase(90, "int8", "bf16", 128, 128, False),
    "keys to 8 bits": CompileCase(90, "quantize", "bf16", 128, 128, True),
    "weights and values in 8 bits": CompileCase(90, "fp8", "bf16", 128, 128, False),
    "tiles for the next step": CompileCase(90, "skip", "bf16", 128, 128, False),
    "virtual tokens with what they miss": CompileCase(90, "corrected", "bf16", 64, 128, False),
    "what virtual tokens miss": CompileCase(90, "missed", "bf16", 64, 128, True),
    "gradient of queries": CompileCase(90, "queries", "bf16", 128, 128, False),
    "gradient of keys": CompileCase(90, "keys", "bf16", 128, 128, False),
}


@pytest.mark.parametrize("name", SAMPLE)
def test_compiles_into_registers_and_tensor_cores(name: str) -> None:
    result, kernel = compile_check.compiled(SAMPLE[name])
    assert result.problems == ()
    assert result.stack == 0
    assert (result.tensor_cores > 0) == (result.case.kernel != "quantize")
    offsets = offsets_of_stores(kernel.asm.get("ttir") or kernel.asm["ttgir"])
    assert offsets and all("i64" in each for each in offsets)


def test_the_hopper_kernel_computes_weights_while_tensor_cores_sum() -> None:
    """On every supported Triton: the assembler may otherwise move the wait for the sums up."""
    _, kernel = compile_check.compiled(CompileCase(90, "gluon", "bf16", 64, 128, False))
    assert 64 <= compile_check._overlapped(kernel.asm["cubin"]) < 2 * 64 + 8
    _, plain = compile_check.compiled(CompileCase(90, "quantize", "bf16", 128, 128, False))
    assert compile_check._overlapped(plain.asm["cubin"]) == 0


def offsets_of_stores(ttir: str) -> list[set[str]]:
    """For each store, the types of the offsets that are added to its tensor's address."""
    made = dict(re.findall(r"(%[\w#]+)(?::\d+)? = (tt\.(?:addptr|splat|broadcast) .*)", ttir))
    found = []
    for pointer in re.findall(r"tt\.store (%\w+),", ttir):
        types: set[str] = set()
        while pointer in made:
            made_by = made[pointer]
            if made_by.startswith("tt.addptr"):
                types.add(re.findall(r"i\d+", made_by)[-1])
            pointer = re.findall(r"%\w+", made_by)[0]
        found.append(types)
    return found


def test_offsets_are_read_as_written() -> None:
    wide = "%2 = tt.addptr %1, %0 : tensor<8x!tt.ptr<bf16>>, tensor<8xi64>"
    ttir = f"%1 = tt.splat %arg0 : x\n{wide}\ntt.store %2, %9 : y\ntt.store %1, %9 : y"
    assert offsets_of_stores(ttir) == [{"i64"}, set()]


def table() -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = json.loads(TABLE.read_text())
    return found


def test_everything_compiled_on_the_oldest_supported_triton_and_a_current_one() -> None:
    versions = table()
    assert "3.6.0" in versions and len(versions) > 1
    shipped = {case: configuration(case)._asdict() for case in cases(compile_check.ARCHS)}
    for rows in versions.values():
        compiled = {
            CompileCase(**{name: row[name] for name in FIELDS}): row["config"] for row in rows
        }
        assert compiled == shipped, "run python -m diffpatch.kernels.compile.check --missing"
        assert not [row for row in rows if row["problems"]]
        for row in rows:
            spilled = 0 if row["arch"] in (80, 90, 100) else 32
            assert row["stack"] <= spilled
            assert row["shared"] <= GPUS[row["arch"]].shared
            sums = row["kernel"] in ("quantize", "values", "list", "pool", "moments")
            multiplies = row["dtype"] != "fp32" and not sums
            assert row["tensor_cores"] > 0 or not multiplies


def test_the_table_keeps_other_versions(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text('{"3.0.0": [{"arch": 80}]}')
    case = CompileCase(90, "quantize", "bf16", 128, 128, False)
    config = configuration(case)
    compile_check.write([compile_check.CompileResult(case, config, 1, 2, 3, 4, 5)], path)
    written = json.loads(path.read_text())
    (row,) = written.pop(triton.__version__)
    assert row["arch"] == 90 and row["shared"] == 3 and row["config"]["block_m"] == config.block_m
    assert written == {"3.0.0": [{"arch": 80}]}


def test_spills_and_missing_instructions_are_problems() -> None:
    case = CompileCase(90, "forward", "bf16", 128, 128, False)
    bad = compile_check.CompileResult(case, configuration(case), 255, 8, 300000, 0, 1)
    problems = " ".join(compile_check._problems(bad, "wgmma"))
    assert "8 bytes of stack" in problems and "no wgmma" in problems
    assert "300000 bytes of shared memory" in problems and "1 buffers" in problems
