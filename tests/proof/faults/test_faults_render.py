"""Faults while `diffpatch render` works through prompts: what is whole stays, the rest is resumed.

What a model would do takes no time here; the files are written by the product's own code.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffpatch import internals
from diffpatch.cli import generation, main
from diffpatch.cli import render as command
from diffpatch.cli.render.resume import is_finished
from diffpatch.files import staged
from diffpatch.pipelines.running.sampling import Sample
from tests.proof.faults.injected import At, full, killed_at, note, noted, read_only

PROMPTS = ["a cat", "a dog", "a hen"]
FILES = {"window.webp", "render.json"}
Render = Callable[..., int]


@pytest.fixture
def renders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Render:
    """The command on a model that takes no time: (folder, options) -> exit code."""

    def timed(job: Any, pipe: Any, variant: Any, call: dict[str, Any], device: Any) -> Any:
        fault(call["prompt"])
        note(tmp_path, call["prompt"])
        frames = torch.full((2, 3, 16, 16), len(call["prompt"]) / 10)
        entry = {"seconds": {"total": 1.0, "denoising": 0.5, "steps": []}, "kept": 0.5, "load": {},
                 "options": variant.options}  # fmt: skip
        return Sample(frames, 1.0, [0.5], None), entry

    def fault(prompt: str) -> None:
        for error in faults.pop(prompt, ()):
            raise error

    faults: dict[str, tuple[BaseException, ...]] = {}
    monkeypatch.setattr(generation, "load", lambda *_: SimpleNamespace(dtype=torch.float32))
    monkeypatch.setattr(generation, "check_fit", lambda *_: None)  # which loads the model
    monkeypatch.setattr(command, "fitted_call", lambda call, pipe: call)
    monkeypatch.setattr(command, "_warm_up", lambda *_: None)
    monkeypatch.setattr(command, "_timed", timed)
    monkeypatch.setattr(command, "environment", lambda device: {})
    monkeypatch.setattr(internals, "execution_device", lambda pipe: torch.device("cpu"))
    words = ["render", "-m", "demo", "--method", "window", "--format", "webp", "--quiet"]
    words += [word for prompt in PROMPTS for word in ("--prompt", prompt)]

    def run(folder: str, *more: str, errors: dict[str, BaseException] | None = None) -> int:
        faults.update({prompt: (error,) for prompt, error in (errors or {}).items()})
        return main([*words, "-o", str(tmp_path / folder), *more])

    return run


def results(root: Path) -> dict[str, str]:
    """Prompt -> the folder that holds its files, all of them whole."""
    found = {}
    for path in root.glob("*/render.json"):
        data = json.loads(path.read_text())
        assert {p.name for p in path.parent.iterdir() if not p.name.startswith(".")} == FILES
        assert (path.parent / "window.webp").read_bytes()[:4] == b"RIFF"
        found[data["prompt"]] = path.parent.name
    return found


ALL = {"a cat": "001-a-cat", "a dog": "002-a-dog", "a hen": "003-a-hen"}


def test_killed_at_any_operation_it_goes_on(renders: Render, tmp_path: Path) -> None:
    number = 0
    while killed_at(number, functools.partial(renders, f"{number}")):
        root = tmp_path / f"{number}"
        before, first = results(root), noted(tmp_path)
        assert renders(f"{number}", "--resume") == 0 and results(root) == ALL
        again = noted(tmp_path)[len(first) :]
        assert not set(before) & set(again) and len(first) + len(again) <= 4
        (tmp_path / "noted").unlink(missing_ok=True)
        number += 1
    assert number > 12, "the faults met nothing"


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("fault", [full, read_only])
def test_after_any_operation_failed_it_goes_on(
    renders: Render, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    fault: Callable[[], None], lasting: bool,
) -> None:  # fmt: skip
    number, met = 0, True
    while met:
        root = tmp_path / f"{number}"
        with At(number, fault, lasting) as at:
            code = renders(f"{number}")
        said, met = capsys.readouterr().err.splitlines(), at.count > number
        before, first = results(root), noted(tmp_path)
        if code:
            assert len(said) == 1 and ("space" in said[0] or "Read-only" in said[0])
        assert renders(f"{number}", "--resume") == 0 and results(root) == ALL
        again = noted(tmp_path)[len(first) :]
        assert not set(before) & set(again) and (code or before == ALL)
        (tmp_path / "noted").unlink(missing_ok=True)
        number += 1
    assert number > 12


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("out of memory"), RuntimeError("the forward failed"),
     KeyboardInterrupt()],
    ids=lambda e: type(e).__name__,
)  # fmt: skip
def test_a_prompt_that_fails_costs_none_of_those_before(
    renders: Render, tmp_path: Path, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    try:
        code = renders("out", errors={"a dog": error})
    except type(error):  # a fault of a model's own code keeps its traceback
        code = 1
    assert code and results(tmp_path / "out") == {"a cat": ALL["a cat"]}
    assert renders("out", "--resume") == 0 and results(tmp_path / "out") == ALL
    assert sorted(noted(tmp_path)) == PROMPTS
    assert renders("out", "--resume") == 0 and sorted(noted(tmp_path)) == PROMPTS


def test_two_processes_that_render_the_same_come_to_whole_files(
    renders: Render, tmp_path: Path
) -> None:
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = renders("out", "--overwrite")
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 3
    assert results(tmp_path / "out") == ALL


def render(folder: Path, mark: str) -> None:
    """Write what a rendering writes, all of one mark."""
    with staged(folder, last="render.json") as stage:
        for name in ("card.png", "dense.mp4", "window.mp4"):
            (stage / name).write_text(mark)
        (stage / "render.json").write_text(json.dumps({"prompt": mark, "runs": {}}))


def test_a_rendering_killed_at_any_operation_is_never_half_of_two(tmp_path: Path) -> None:
    number = 0
    while True:
        folder = tmp_path / f"{number}"
        render(folder, "old")
        files = {p.stem if p.suffix != ".json" else "result": p for p in folder.iterdir()}
        killed = killed_at(number, functools.partial(render, folder, "new"))
        for mark in ("old", "new"):
            try:
                finished = is_finished(files, {"prompt": mark}, {})
            except Exception:  # of another request: that is said, and nothing is done
                continue
            marks = {p.read_text() for n, p in files.items() if n != "result" and p.exists()}
            assert not finished or marks == {mark}, (number, mark)
        if not killed:
            break
        number += 1
    assert number > 6


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"runs": 3}', '{"runs": [1]}'])
def test_a_damaged_result_is_rendered_again(tmp_path: Path, content: str) -> None:
    (tmp_path / "render.json").write_text(content)
    assert not is_finished({"result": tmp_path / "render.json"}, {"prompt": "a cat"}, {})
