"""Machine code is read as it is: loops, pipes and shapes of products; the table is what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from diffpatch.kernels.compile import bounds
from diffpatch.kernels.compile.cases import CompileCase, configuration
from diffpatch.kernels.gpu.common import padded

ROOT = Path(bounds.__file__).resolve().parents[2]
SASS = """\
.L_x_2:
        /*0010*/                   MOV R1, R2 ;
.L_x_0:
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR24], RZ, !UPT ;
        /*0030*/              @!P1 MUFU.EX2 R1, R2 ;
        /*0040*/                   FFMA R1, R2, R3, R4 ;
        /*0050*/             @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;
        /*0060*/                   LDS R1, [R2] ;
        /*0070*/               @P1 BRA `(.L_x_0) ;
        /*0080*/               @P2 BRA `(.L_x_2) ;
        /*0090*/                   BRA `(.L_x_3) ;
.L_x_3:
        /*00a0*/                   FMUL R1, R2, R3 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   BRA `(.L_x_0) ;
"""


def test_the_innermost_loop_with_a_product_is_found_and_its_pipes_counted() -> None:
    (loop,) = bounds.loops(SASS)
    assert len(loop) == 6 and loop[1] == "MUFU.EX2 R1, R2"
    found = bounds.bound(loop, 90)
    assert found["by_pipe"] == {
        "control": 1, "fma": 1, "memory": 1, "special": 1, "tensor": 1, "uniform": 1
    }  # fmt: skip
    # A warpgroup's product of 64 x 64 x 16 is a quarter of it for each warp.
    assert found["tensor_clocks"] == 2 * 64 * 64 * 16 / 4 / 4096
    assert found["busiest_other"] == "special" and found["other_clocks"] == 2
    assert found["bound_overlapped"] == 1 and found["bound_serial"] == 8 / 10


@pytest.mark.parametrize(
    ("instruction", "operations"),
    [
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32 R4, R8, R12, R4", 2 * 16 * 8 * 8),
        ("IMMA.16832.S8.S8 R4, R8, R12, R4", 2 * 16 * 8 * 32),
        ("HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR20], R24", 2 * 64 * 128 * 16 / 4),
    ],
)
def test_products_of_every_shape(instruction: str, operations: float) -> None:
    assert bounds._operations(instruction) == operations


def test_an_unknown_product_is_not_guessed_at() -> None:
    with pytest.raises(ValueError, match="unknown shape"):
        bounds._operations("HMMA.NEW R4, R8")


def test_a_compiled_loop_has_the_products_of_its_step() -> None:
    """Two products of a step, counted from the blocks and from the machine code."""
    case = CompileCase(89, "forward", "bf16", 64, 128, False)
    config = configuration(case)
    row = bounds.row_of(case)
    assert len(row["loops"]) == 2
    for loop in row["loops"]:
        clocks = loop["tensor_clocks"] * config.num_warps
        products = 2 * 2 * config.block_m * config.block_n * padded(64)
        assert clocks == pytest.approx(products / bounds.TENSOR[89])


def test_the_committed_table_has_every_shipped_case_and_the_page_shows_it() -> None:
    written = json.loads((ROOT / "eval/results/static_bounds.json").read_text())
    assert written["model"] is True
    keys = ("arch", "kernel", "dtype", "size", "tile", "key_mask", "loads", "specialize")
    found = {tuple(row[key] for key in keys): row for row in written["rows"]}
    for case in bounds.shown(tuple(bounds.ARCHS)):
        row = found[tuple(getattr(case, key) for key in keys)]
        assert row["config"] == configuration(case)._asdict(), "write the table again"
        assert row["loops"] and all(loop["tensor_clocks"] > 0 for loop in row["loops"])
    assert {row["kernel"] for row in written["rows"]} >= {"dense", "gluon", "forward", "score"}
    page = (ROOT / "kernels/static_bounds.md").read_text(encoding="utf-8")
    assert page == bounds.PAGE + bounds.table(written["rows"]) + "\n"
    assert "A model, not a measurement" in page
