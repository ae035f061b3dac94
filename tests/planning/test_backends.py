"""What a backend computes for nothing, and what it costs in accuracy, is said before and after."""

from __future__ import annotations

import pytest

import diffpatch
from diffpatch.cli import main
from diffpatch.kernels.block_sparse.api import work_of
from diffpatch.kernels.block_sparse.backends import ROWS
from tests import tiny

SIZE = {"height": 480, "width": 832, "num_frames": 17}


def test_padding_and_what_it_costs() -> None:
    """Small tiles in blocks of 128 are padding for the most part, and the plan says so."""
    plan = diffpatch.plan("wan-1.3b", "neighborhood", **SIZE, backend="flex")  # type: ignore[arg-type]
    blocks = plan.patterns[-1].blocks
    computed = work_of(blocks, "flex").computed / blocks.num_tokens**2
    assert plan.computed == pytest.approx(computed)
    assert plan.visited is not None and plan.visited < computed
    assert plan.padding == pytest.approx(1 - plan.visited / computed)
    assert f"padding    {plan.padding:.0%}" in str(plan)
    assert f"{plan.computed_speedup:.2f}× for the transformer" in str(plan)


def test_scores_in_8_bits_are_told_with_their_error(capsys: pytest.CaptureFixture[str]) -> None:
    error = ROWS["torch-int8"].error
    assert "1 %" in error and not ROWS["torch"].error
    words = ["plan", "--model", "wan-1.3b", "--method", "neighborhood", "--num-frames", "17"]
    words += ["--height", "480", "--width", "832"]
    for name in ("triton-int8", "triton-fp8"):
        assert main([*words, "--backend", name]) == 0
        assert f"8 bits     {ROWS[name].error}" in capsys.readouterr().out
    model = tiny.wan()
    with diffpatch.patched(model.pipe, "window", window=0.5, dense_steps=0, backend="torch-int8"):
        model.run()
        report = diffpatch.report(model.pipe)
    assert report.notes.count(f"backend 'torch-int8': {error}") == 1
    with diffpatch.patched(model.pipe, "window", window=0.5, dense_steps=0):
        model.run()
        assert not any("8 bits" in note for note in diffpatch.report(model.pipe).notes)
