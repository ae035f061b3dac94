"""Faults in sweeps, calibration and result files: nothing is lost, nothing is done twice.

What a model would do takes no time here; the files are written by the product's own code, and every
operation on them fails once, in each of the ways that disks and people make it fail.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import diffpatch
from diffpatch import Dense, Temporal
from diffpatch.errors import DiffpatchError
from diffpatch.eval.media import save_frames
from diffpatch.eval.processes import Process
from diffpatch.eval.sweep import drive
from diffpatch.eval.sweep.plan import Rendering, plan_sweep
from diffpatch.eval.sweep.spec import SweepSpec, check_spec
from diffpatch.eval.sweep.store import Store
from diffpatch.files import DamagedFile, DiskFull, read_json, write_json
from tests.proof.faults.injected import At, full, killed_at, note, noted, read_only
from tests.tiny import wan

SWEEP = {
    "model": "demo", "prompts": ["a cat"], "steps": 2, "noise_floor": [],
    "methods": ["window"],
}  # fmt: skip


class Quick:
    """In place of a session: runs that take no time, noted in a file when they are rendered."""

    fault: Callable[[Rendering], None] = staticmethod(lambda run: None)

    def __init__(self, store: Store, spec: Any, model: str, process: Process, *_: Any) -> None:
        self.store, self.process = store, process

    def check(self, runs: list[Rendering]) -> None:
        pass

    def facts(self, run: Rendering) -> dict[str, Any]:
        return {"name": run.name, "label": run.way.label}

    def do(self, run: Rendering) -> dict[str, Any]:
        type(self).fault(run)
        with self.store.stage(run) as stage:
            save_frames(torch.zeros(1, 3, 2, 2), stage / "frames.npz")
            result = self.facts(run) | {"quality": {}}
            self.store.finish(run, result, stage)
        note(self.store.root, run.name)
        return result


@pytest.fixture(scope="module")
def plan() -> tuple[SweepSpec, Mapping[str, list[Rendering]]]:
    spec = check_spec(dict(SWEEP), Path.cwd())
    return spec, plan_sweep(spec)


@pytest.fixture
def sweep(
    plan: tuple[SweepSpec, Mapping[str, list[Rendering]]], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Callable[..., list[Rendering]]:  # fmt: skip
    """Sweep into a folder below the test's; returns what has failed."""
    monkeypatch.setattr(drive, "Session", Quick)
    monkeypatch.setattr(Quick, "fault", staticmethod(lambda run: None))

    def run(folder: str = "runs", say: Callable[[str], None] = lambda text: None) -> Any:
        store = Store(tmp_path / folder)
        try:
            return drive.run_sweep(*plan, store, Process(0, 1), say)
        finally:
            store.close()

    return run


def assert_whole(root: Path, count: int = 2) -> None:
    """That every run is there once, whole, and nothing else."""
    listed = read_json(root / "sweep.json")["runs"]
    runs = sorted(path.name for path in (root / "runs").iterdir())
    assert sorted(listed) == runs and len(runs) == count
    for name in runs:
        assert read_json(root / "runs" / name / "run.json")["name"] == name
        assert (root / "runs" / name / "frames.npz").is_file()
    assert not list((root / "failed").iterdir()) and not list(root.glob(".*"))


def test_a_sweep_killed_at_any_operation_goes_on(
    sweep: Callable[..., list[Rendering]], tmp_path: Path
) -> None:
    number = 0
    while killed_at(number, functools.partial(sweep, f"{number}")):
        root = tmp_path / f"{number}"
        before = {path: path.stat().st_mtime_ns for path in root.glob("runs/*/run.json")}
        done = {path.parent.name for path in before}
        assert sweep(f"{number}") == []
        for path in root.glob(".*.json.*"):  # the half of a file, which no name points to
            path.unlink()
        assert_whole(root)
        assert {path: path.stat().st_mtime_ns for path in before} == before
        lines = noted(root)
        # A run that was there is never done again; one without its file is, once more at most.
        assert all(lines.count(name) <= 1 for name in done) and len(lines) >= 1
        number += 1
    assert number > 15, "the faults met nothing"


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("fault", [full, read_only])
def test_a_sweep_goes_on_after_any_operation_failed(
    sweep: Callable[..., list[Rendering]], tmp_path: Path, fault: Callable[[], None], lasting: bool
) -> None:
    number, met = 0, True
    while met:
        root, failed = tmp_path / f"{number}", []
        with At(number, fault, lasting) as at:
            try:
                failed = sweep(f"{number}")
            except (OSError, DiffpatchError) as error:
                text = str(error)
                assert "space" in text or "Read-only" in text or "written to" in text, text
        met = at.count > number
        for run in failed:  # said, with the reason
            why = read_json(root / "failed" / f"{run.name}.json")["error"]
            assert "Read-only" in why or "space" in why
            (root / "failed" / f"{run.name}.json").unlink()
        assert sweep(f"{number}") == []
        for path in [*root.glob(".*.json.*"), *root.glob(".partial-*")]:
            path.unlink() if path.is_file() else None
        assert_whole(root)
        assert max(map(noted(root).count, noted(root))) <= 2
        number += 1
    assert number > 15


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("out of memory"), RuntimeError("the forward failed"),
     OSError("a codec"), RecursionError()],
    ids=lambda e: type(e).__name__,
)  # fmt: skip
def test_a_run_that_fails_leaves_the_others_alone(
    sweep: Callable[..., list[Rendering]], tmp_path: Path, error: Exception,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail(run: Rendering) -> None:
        if run.way.kind == "method":
            raise error

    monkeypatch.setattr(Quick, "fault", staticmethod(fail))
    said: list[str] = []
    [failed] = sweep(say=said.append)
    root = tmp_path / "runs"
    found = read_json(root / "failed" / f"{failed.name}.json")
    assert found["error"].startswith(type(error).__name__) and "Traceback" in found["traceback"]
    assert sum("FAILED" in line for line in said) == 1 and len(noted(root)) == 1
    assert len(sweep()) == 1 and len(noted(root)) == 1  # not tried again by itself
    monkeypatch.setattr(Quick, "fault", staticmethod(lambda run: None))
    store = Store(root)
    assert store.forget_failures(before=2**40) == 1
    store.close()
    assert sweep() == [] and len(noted(root)) == 2
    assert_whole(root)


def test_a_clock_that_was_put_back_does_not_keep_failures(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for name, when in (("old", 1000.0), ("now", None), ("future", 2.0**33)):
        write_json(store.failures / f"{name}.json", {})
        if when is not None:
            os.utime(store.failures / f"{name}.json", (when, when))
    assert store.forget_failures(before=2000.0) == 2  # "now" is of a process that still works
    assert [path.stem for path in store.failures.iterdir()] == ["now"]
    store.close()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("run.json", b""), ("run.json", b'{"name": '), ("run.json", b"[1]"),
        ("run.json", b"\xff\xfe"), ("frames.npz", b""), ("frames.npz", b"PK\x03\x04 cut"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_damaged_is_done_again_and_said(
    sweep: Callable[..., list[Rendering]], tmp_path: Path, file: str, content: bytes
) -> None:
    sweep()
    root = tmp_path / "runs"
    victim = sorted((root / "runs").iterdir())[1]
    (victim / file).write_bytes(content)
    said: list[str] = []
    assert sweep(say=said.append) == []
    [about] = [line for line in said if "is damaged" in line]
    assert about.startswith(str(victim / file)) and about.endswith("is done again")
    assert noted(root).count(victim.name) == 2 and len(noted(root)) == 3
    assert_whole(root)


def test_damaged_lists_and_failures_are_written_anew(
    sweep: Callable[..., list[Rendering]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run: Rendering) -> None:
        raise RuntimeError

    monkeypatch.setattr(Quick, "fault", staticmethod(fail))
    assert len(sweep()) == 2
    root = tmp_path / "runs"
    monkeypatch.setattr(Quick, "fault", staticmethod(lambda run: None))
    for path in (root / "sweep.json", *(root / "failed").iterdir()):
        path.write_bytes(path.read_bytes()[:7])
    with pytest.raises(DamagedFile, match=r"sweep\.json is damaged: it is not JSON; delete it"):
        read_json(root / "sweep.json")
    assert sweep() == []
    assert_whole(root)


def test_two_sweeps_of_one_folder_share_its_runs(
    sweep: Callable[..., list[Rendering]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = os.fork(), 0
    if first:
        second = os.fork()
    if not first or not second:  # two processes: locks tell processes apart
        try:
            sweep()
        finally:
            os._exit(0)
    for child in (first, second):
        assert os.waitpid(child, 0)[1] == 0
    assert_whole(tmp_path / "runs")
    assert sorted(noted(tmp_path / "runs")) == sorted(set(noted(tmp_path / "runs")))


def test_a_model_of_nan_is_named_by_calibration() -> None:
    tiny = wan()
    with torch.no_grad():
        tiny.pipe.transformer.blocks[0].attn1.to_v.weight.fill_(float("nan"))
    call = {k: v for k, v in tiny.call.items() if k != "prompt"} | {"output_type": "latent"}
    with pytest.raises(DiffpatchError, match="holds NaN or infinity in the first third"):
        diffpatch.calibrate(
            tiny.pipe, Temporal(over=Dense(tile=16), mode="skip"), prompt="a cat", call=call,
            max_error=0.9, spread=0.0, dense_steps=0,
        )  # fmt: skip


def test_a_forward_that_raises_leaves_the_pipeline_as_it_was() -> None:
    tiny = wan()
    before = tiny.run()
    block = tiny.pipe.transformer.blocks[1]
    hook = block.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError("one")))
    call = {k: v for k, v in tiny.call.items() if k != "prompt"}
    for work in (
        lambda: diffpatch.calibrate(tiny.pipe, "dense+temporal", prompt="a", call=call),
        lambda: diffpatch.tune(tiny.pipe, ["a"], call=call),
    ):
        with pytest.raises(MemoryError, match="one"):
            work()
    hook.remove()
    assert torch.equal(tiny.run(), before)


def test_no_space_is_named_with_its_path(tmp_path: Path) -> None:
    with At(0, full, lasting=True), pytest.raises(OSError, match="space"):
        tmp_path.joinpath("x").mkdir()
    path = tmp_path / "result.json"
    write_json(path, {"old": 1})
    for number in range(1, 6):
        with At(number, full) as at:
            try:
                write_json(path, {"new": number})
            except DiskFull as error:
                assert str(path) in str(error)
            except OSError as error:
                assert "space" in str(error)
        assert list(read_json(path)) in (["old"], ["new"])  # one of the two, whole
        if at.count <= number:
            break
