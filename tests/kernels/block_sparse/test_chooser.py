"""Backends that are compared before "auto" takes one, on devices that are pretended."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import diffpatch
from diffpatch.eval.bench import profile as device_costs
from diffpatch.kernels.block_sparse import api as block_sparse
from diffpatch.kernels.block_sparse import backends, chooser
from diffpatch.kernels.block_sparse.backends import choose_backend, passed_over
from diffpatch.kernels.block_sparse.chooser import Chooser, Ranking, Setting
from diffpatch.kernels.block_sparse.operators import BLOCK_SPARSE, LINEAR
from diffpatch.kernels.block_sparse.reference import attend_reference
from diffpatch.kernels.block_sparse.torch_plan.attend import attend_torch
from diffpatch.kernels.block_sparse.trial_blocks import small_blocks, timed_blocks
from tests import tiny
from tests.kernels.random_blocks import random_blocks, random_qkv

HERE = Setting(torch.device("cpu"), torch.float32, 32, (("device", "Pretended 1"), ("torch", "2")))


def row(name: str, attend: Any = attend_torch, reason: str | None = None, **options: Any) -> Any:
    operators = {BLOCK_SPARSE.name: lambda q: None}
    options = {"unasked": False, "measured": True, "error": ""} | options
    return SimpleNamespace(
        name=name, attend=attend, reason=lambda q, blocks: reason, operators=operators, **options
    )


def other_scale(q: Any, k: Any, v: Any, blocks: Any, scale: float, *rest: Any) -> Any:
    return attend_torch(q, k, v, blocks, scale * 1.01, *rest)


def no_key_mask(q: Any, k: Any, v: Any, blocks: Any, scale: float, mask: Any, lse: bool) -> Any:
    return attend_torch(q, k, v, blocks, scale, None, lse)


def wrong_head(q: Any, k: Any, v: Any, *rest: Any) -> Any:
    return attend_torch(q, k.flip(2), v, *rest)


def blind_is_nan(*args: Any) -> Any:
    out, lse = attend_torch(*args)
    assert lse is not None
    return out.masked_fill(lse.isneginf()[..., None], torch.nan), lse


def crashes(*args: Any) -> Any:
    raise RuntimeError("no kernel image is available\nfor execution")


def times(**known: float) -> Any:
    return lambda row, setting: known[row.name]


def never(row: Any, setting: Setting) -> Any:
    pytest.fail(f"{row.name} is tried")


@pytest.mark.parametrize(
    "attend", [other_scale, no_key_mask, wrong_head, blind_is_nan], ids=lambda x: x.__name__
)
def test_a_kernel_that_is_wrong_is_not_taken(
    attend: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row("fast", attend), row("right"), row("definition", attend_reference)]
    found = Chooser(tmp_path, clock=times(fast=1.0, right=2.0, definition=3.0))
    ranking = found.ranking(HERE, rows)
    assert [r.name for r in ranking.order(rows)] == ["right", "definition"]
    assert set(ranking.refused) == {"fast"} and "wrong" in ranking.refused["fast"]
    found.ranking(HERE, rows)
    (record,) = caplog.records  # once
    assert "'fast'" in record.getMessage() and "Pretended 1" in record.getMessage()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_rounding_explains_is_right(dtype: torch.dtype) -> None:
    assert chooser.wrong(row("torch"), HERE._replace(dtype=dtype)) is None
    assert "wrong by" in str(chooser.wrong(row("x", other_scale), HERE._replace(dtype=dtype)))


def test_a_kernel_that_crashes_is_not_taken(tmp_path: Path) -> None:
    rows = [row("broken", crashes, unasked=True), row("torch", unasked=True)]
    ranking = Chooser(tmp_path).ranking(HERE, rows)
    assert [r.name for r in ranking.order(rows)] == ["torch"]
    expected = "it fails here: RuntimeError: no kernel image is available for execution"
    assert ranking.refused == {"broken": expected}
    # While timed, too.
    ranking = Chooser(tmp_path / "other", clock=times(torch=1.0)).ranking(
        HERE, [*rows[1:], row("x")]
    )
    assert set(ranking.seconds) == {"torch"} and "KeyError" in ranking.refused["x"]


def test_a_slow_kernel_is_not_taken_and_what_gains_little_neither(tmp_path: Path) -> None:
    rows = [row("usual", unasked=True), row("other"), row("refuses", reason="another GPU")]
    for nth, (seconds, first) in enumerate([(2.0, "usual"), (0.97, "usual"), (0.9, "other")]):
        found = Chooser(tmp_path / str(nth), clock=times(usual=1.0, other=seconds))
        ranking = found.ranking(HERE, rows)
        assert ranking.order(rows)[0].name == first
        assert not ranking.refused  # what refuses by itself is no surprise
        assert found.ranking(HERE, rows) is ranking


def test_one_candidate_is_not_measured(tmp_path: Path) -> None:
    ranking = Chooser(tmp_path, check=never, clock=never).ranking(HERE, [row("torch")])
    assert set(ranking.seconds) == {"torch"}


def test_what_was_found_is_kept_for_what_it_is_about(tmp_path: Path) -> None:
    rows = [row("a"), row("b", crashes)]
    first = Chooser(tmp_path, clock=times(a=1.0)).ranking(HERE, rows)
    again = Chooser(tmp_path, check=never, clock=never)
    assert again.ranking(HERE, rows) == first
    for other in (
        HERE._replace(size=64),
        HERE._replace(dtype=torch.bfloat16),
        HERE._replace(around=(("device", "Pretended 2"), ("torch", "2"))),
        HERE._replace(around=(("device", "Pretended 1"), ("torch", "3"))),
    ):
        anew = Chooser(tmp_path, check=lambda row, setting: f"{row.name} is tried")
        assert set(anew.ranking(other, rows).refused) == {"a", "b"}
    assert Chooser(tmp_path, clock=times(a=5.0)).ranking(HERE, rows, redo=True).seconds == {
        "a": 5.0
    }


@pytest.mark.parametrize(
    "kept", ["", "[1]", "{}", '{"seconds": 3}', "null", '{"seconds": {"a": "x"}, "refused": {}}']
)
def test_a_file_that_makes_no_sense_is_measured_again(kept: str, tmp_path: Path) -> None:
    rows = [row("a"), row("b")]
    clock = times(a=1.0, b=2.0)
    Chooser(tmp_path, clock=clock).ranking(HERE, rows)
    (file,) = tmp_path.iterdir()
    good = file.read_text()
    file.write_text(kept)
    assert Chooser(tmp_path, clock=clock).ranking(HERE, rows).seconds == {"a": 1.0, "b": 2.0}
    assert file.read_text() == good
    for key, value in (("seconds", {"a": -1.0, "b": 2.0}), ("seconds", {"c": 1.0})):
        file.write_text(json.dumps(json.loads(good) | {key: value}))
        assert Chooser(tmp_path, clock=clock).ranking(HERE, rows).seconds == {"a": 1.0, "b": 2.0}


def test_a_folder_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "file").write_text("in the way")
    found = Chooser(tmp_path / "file" / "backends", clock=times(a=1.0, b=2.0))
    assert found.ranking(HERE, [row("a"), row("b")]).seconds == {"a": 1.0, "b": 2.0}
    assert "not kept" in caplog.text


def _measure(folder: str, name: str) -> dict[str, float]:
    rows = [row("a"), row("b")]
    return dict(Chooser(Path(folder), clock=times(a=1.0, b=2.0)).ranking(HERE, rows).seconds)


def test_two_processes_leave_one_whole_file(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.starmap(_measure, [(str(tmp_path), str(i)) for i in range(4)])
    assert all(x == {"a": 1.0, "b": 2.0} for x in found)
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["seconds"] == {"a": 1.0, "b": 2.0}


def test_memory_that_ran_out_is_not_remembered(tmp_path: Path) -> None:
    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    ranking = Chooser(tmp_path, clock=times(a=1.0)).ranking(HERE, [row("a"), row("b", full)])
    assert set(ranking.refused) == {"b"} and not list(tmp_path.iterdir())


def test_auto_takes_what_was_found_and_says_what_it_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the CPU as the pretended device, and the rest of the way real."""
    rows = [row("usual", crashes, unasked=True), row("other"), row("torch", unasked=True)]
    clock = times(usual=1.0, other=2.0, torch=3.0)
    made = Chooser(tmp_path, clock=clock)
    monkeypatch.setattr(backends, "ROWS", {r.name: r for r in rows})
    monkeypatch.setattr(backends, "BACKENDS", ("auto", *(r.name for r in rows)))
    for module in (chooser, backends):
        monkeypatch.setattr(module, "chooser", lambda: made)
    monkeypatch.setattr(chooser, "DEVICES", ("cpu",))
    blocks = random_blocks([8, 8])
    q, k, v = random_qkv(1, 16, 1, 32)
    assert os.environ["DIFFPATCH_CHOOSER"] == "off"
    assert choose_backend(BLOCK_SPARSE, "auto", blocks, q, k, v) == "usual"  # nothing is compared
    assert passed_over(q) == {}
    monkeypatch.setenv("DIFFPATCH_CHOOSER", "on")
    assert choose_backend(BLOCK_SPARSE, "auto", blocks, q, k, v) == "other"
    assert set(passed_over(q)) == {"usual"}
    assert choose_backend(BLOCK_SPARSE, "usual", blocks, q, k, v) == "usual"  # asked for by name
    monkeypatch.setattr(made, "_measure", pytest.fail)  # never again
    assert choose_backend(BLOCK_SPARSE, "auto", blocks, q, k, v) == "other"
    assert choose_backend(LINEAR, "auto", blocks, q, k, v) == "torch"


def test_a_cpu_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFPATCH_CHOOSER", "on")
    monkeypatch.setattr(Chooser, "_measure", pytest.fail)
    blocks = random_blocks([8, 8])
    q, k, v = random_qkv(1, 16, 1, 32)
    assert choose_backend(BLOCK_SPARSE, "auto", blocks, q, k, v) == "torch"


def test_the_indexes_to_try_on_are_valid_and_tell_backends_apart() -> None:
    for blocks in (small_blocks(), timed_blocks()):
        blocks.validate()
    small = small_blocks()
    assert (small.full_end.diff() >= 0).all() and small.num_tokens % 128
    kept = len(timed_blocks().cols) / timed_blocks().num_tiles ** 2
    assert 0.2 < kept < 0.3
    assert isinstance(Ranking({}, {}).order([]), list)


def test_the_report_says_what_was_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of a patched model, on a CPU that stands for a device with several backends."""
    rows = {r.name: r for r in (row("broken", crashes, unasked=True), row("fine"))}
    made = Chooser(tmp_path)
    for module in (chooser, backends):
        monkeypatch.setattr(module, "chooser", lambda: made)
    for module in (backends, block_sparse):
        monkeypatch.setattr(module, "ROWS", backends.ROWS | rows)
    monkeypatch.setattr(chooser, "DEVICES", ("cpu",))
    monkeypatch.setattr(made, "clock", times(fine=1.0, torch=2.0, triton=9.0, flex=9.0))
    monkeypatch.setattr(made, "check", lambda r, s: "wrong" if r.name == "broken" else None)
    monkeypatch.setenv("DIFFPATCH_CHOOSER", "on")
    monkeypatch.setattr(backends, "BACKENDS", ("auto", *backends.ROWS))
    model = tiny.wan()
    with diffpatch.patched(model.pipe, "window", window=0.5, dense_steps=0):
        model.run()
        report = diffpatch.report(model.pipe)
    assert set(report.backends) == {"fine"}
    assert report.notes.count("backend 'broken' is not taken: wrong") == 1


def test_comparing_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [row("usual", unasked=True), row("other")]
    made = Chooser(tmp_path, clock=times(usual=1.0, other=2.0))
    monkeypatch.setattr(backends, "ROWS", {r.name: r for r in rows})
    monkeypatch.setattr(backends, "chooser", lambda: made)
    here = torch.device("cpu"), torch.float32, 32
    monkeypatch.setenv("DIFFPATCH_CHOOSER", "on")
    assert backends.compare_again(*here) is None  # a CPU
    monkeypatch.setattr(chooser, "DEVICES", ("cpu",))
    first = backends.compare_again(*here)
    assert first is not None and list(first.seconds) == ["usual", "other"]
    made.clock = times(usual=2.0, other=1.0)
    again = backends.compare_again(*here)
    assert again is not None and list(again.seconds) == ["other", "usual"]
    assert device_costs._order(again) == "other (1e+03 ms), usual (2e+03 ms)"
