"""Faults while a model is tuned and its front is rendered: what is done is never done again."""

from __future__ import annotations

import errno
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffpatch.errors import DiffpatchError
from diffpatch.files import DiskFull
from diffpatch.methods.learned import files as learned
from diffpatch.targets.settings import Settings
from diffpatch.tuning import front as fronts
from diffpatch.tuning import tune as tuning
from tests.proof.faults.injected import At, full, killed_at, note, noted, read_only
from tests.targets.test_settings import made

PROMPTS = ["a", "bb", "ccc"]
Job = Callable[[Path], Settings]


def curves(mark: float) -> tuple[Any, dict[str, Any]]:
    each = {rule: [(0.2, mark), (0.5, mark / 2)] for rule in tuning.RULES}
    return tuning._Found({"transformer.0.0": each}, [], 100.0), {"grid": (1, 8, 8, 0), "steps": 4}


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Job:
    """Tune into a file, three prompts that take no time."""

    def of_prompt(pipe: Any, prompt: str, *_: Any) -> Any:
        note(tmp_path, prompt)
        return curves(float(len(prompt)) / 10)

    model = {"fingerprint": "0" * 16, "dtype": "float32", "classes": {"transformer": ("A", 1)}}
    monkeypatch.setattr(tuning, "_model", lambda pipe: model)
    monkeypatch.setattr(tuning, "_of_prompt", of_prompt)
    return lambda path: tuning.tune(None, PROMPTS, pairs=0, path=path)


@pytest.fixture
def front(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Job:
    """Render a front into a file, dense and sparse, in no time."""

    def sample(self: Any, prompt: str, chosen: Any, own: Any = None) -> Any:
        note(tmp_path, f"{prompt} {chosen and chosen.label}")
        frames = torch.full((2, 3, 4, 4), 0.25 + (chosen is not None) / (8 + len(prompt)))
        return fronts._Clip(frames, 10, 0.5, 2.0)

    monkeypatch.setattr(fronts, "transformers", lambda *_: [])
    monkeypatch.setattr(fronts._Job, "_sample", sample)
    monkeypatch.setattr(Settings, "check_model", lambda *_: None)
    monkeypatch.setattr(fronts, "chosen_for", lambda _, applied: applied)
    settings = Settings.model_validate(made())
    options: dict[str, Any] = {"sparse": (0.5,), "dense_steps": (0.15,), "caches": (), "holds": ()}
    return lambda path: fronts.measure_front(None, settings, PROMPTS[:1], path=path, **options)


@pytest.fixture(params=["tune", "front"])
def job(request: pytest.FixtureRequest) -> tuple[Job, int]:
    """One of the two, and how many units it has."""
    return request.getfixturevalue(request.param), {"tune": 3, "front": 3}[request.param]


def found(settings: Settings) -> tuple[Any, ...]:
    """What was found out, without the time at which."""
    return settings.curves, settings.front, settings.floor


def left(path: Path) -> list[Path]:
    """What stands beside a result."""
    return [p for p in path.parent.glob(f"*{path.name}*") if p != path]


def test_a_job_killed_at_any_operation_loses_one_unit_at_most(
    job: tuple[Job, int], tmp_path: Path
) -> None:
    run, units = job
    expected, number = found(run(tmp_path / "whole.json")), 0
    while True:
        (tmp_path / "noted").unlink()
        path = tmp_path / f"{number}.json"
        killed = killed_at(number, functools.partial(run, path))
        assert found(run(path)) == found(Settings.load(path)) == expected
        assert not [p for p in left(path) if not p.name.startswith(".")]
        if not killed:
            break
        # Times are compared within a process: the dense clip is rendered again, too.
        assert len(noted(tmp_path)) <= units + 2
        number += 1
    assert number > 6


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("fault", [full, read_only])
def test_a_job_goes_on_after_any_operation_failed(
    job: tuple[Job, int], tmp_path: Path, fault: Callable[[], None], lasting: bool
) -> None:
    run, _ = job
    expected, number, met = found(run(tmp_path / "whole.json")), 0, True
    while met:
        (tmp_path / "noted").unlink()
        path = tmp_path / f"{number}.json"
        stopped, again = "", []
        with At(number, fault, lasting) as at:
            try:
                run(path)
            except (OSError, DiffpatchError) as error:
                stopped = str(error)
        met, before = at.count > number, noted(tmp_path)
        if stopped:
            assert "space" in stopped or "Read-only" in stopped
            run(path)
            again = noted(tmp_path)[len(before) :]
        assert found(Settings.load(path)) == expected
        # Once more at most: the unit that could not be kept, and the dense clip that it needs.
        assert len(set(before) & set(again)) <= 2
        assert not left(path), "the half of a file"
        number += 1
    assert number > 6


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("out of memory")])
def test_a_prompt_out_of_memory_costs_none_of_those_before(
    tune: Job, tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = tuning._of_prompt

    def fails(pipe: Any, prompt: str, *rest: Any) -> Any:
        if prompt == "bb":
            raise error
        return works(pipe, prompt, *rest)

    path = tmp_path / "x.json"
    monkeypatch.setattr(tuning, "_of_prompt", fails)
    with pytest.raises(type(error)):
        tune(path)
    monkeypatch.setattr(tuning, "_of_prompt", works)
    tune(path)
    assert noted(tmp_path) == PROMPTS


def test_two_processes_on_one_job_come_to_what_one_does(
    job: tuple[Job, int], tmp_path: Path
) -> None:
    run, _ = job
    expected, path = found(run(tmp_path / "whole.json")), tmp_path / "x.json"
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = 0 if found(run(path)) == expected else 2
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert found(Settings.load(path)) == expected


@pytest.mark.parametrize("fault", [full, read_only])
def test_what_a_layer_learned_is_written_whole_or_not_at_all(
    tmp_path: Path, fault: Callable[[], None]
) -> None:
    """The file from before stays."""
    path = tmp_path / "l.safetensors"

    def learn(value: float) -> None:
        learned.save(path, {"a": {"x": torch.full((2,), value)}}, "A", {})

    learn(0.0)
    old, number = path.read_bytes(), 0
    while True:
        path.write_bytes(old)
        with At(number, fault) as at:
            try:
                learn(1.0)
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    assert not isinstance(error, DiskFull) or path.name in str(error)
        if at.count <= number:
            break
        [value] = load_file(path).values()
        assert value.tolist() in ([0.0] * 2, [1.0] * 2)
        number += 1
    assert number > 2 and load_file(path).popitem()[1].tolist() == [1.0] * 2
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", '{"ties": 1}', '{"ties": "TIES", "done": []}', '{"ties": "TIES"}',
     '{"ties": "TIES", "done": 3}', '{"ties": "TIES", "done": {"a": 3}}',
     '{"ties": "TIES", "done": {"a": {"found": {}, "place": {}}}}',
     '{"ties": "TIES", "done": {"a": {"found": {"curves": 3, "rendered": [], "floor": 1},'
     ' "place": {"steps": 4}}}}',
     '{"ties": "TIES", "done": {"a": {"found": {"curves": {"a": 1}, "rendered": [], "floor": 1},'
     ' "place": 3}}}', "[" * 20000],
    ids=lambda text: text[:60],
)  # fmt: skip
def test_what_a_tuning_left_damaged_is_measured_again(
    tune: Callable[[Path], Any], tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    monkeypatch.setattr(tuning._Done, "forget", lambda self: None)
    expected = tune(path).curves
    part = path.with_name("x.json.part")
    ties = json.dumps(json.loads(part.read_text())["ties"])
    part.write_text(content.replace('"TIES"', ties))
    (tmp_path / "noted").unlink()
    assert tune(path).curves == expected and noted(tmp_path) == ["a", "bb", "ccc"]
