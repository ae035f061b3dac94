"""Tests run in a fork of this process, which has torch loaded, and what is seen there."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MEMORY = 12 * 2**30  # bytes
HUNG = 90  # seconds of a processor beyond its budget until a run counts as hung
MORE = 77  # the exit code where the budget is spent, nothing has failed and tests are left
WAIT = 20  # times as long may pass on a busy machine


@dataclass(frozen=True)
class Seen:
    """What one run of one test showed.

    Attributes:
        test: its id.
        outcome: "passed", "failed" or "skipped".
        seconds: of a processor.
        touched: the functions of the package that it entered, "file:qualified name".
    """

    test: str
    outcome: str
    seconds: float
    touched: tuple[str, ...]


def preload() -> None:
    """What every fork needs and no mutant changes."""
    import diffusers
    import diffusers.models.attention_processor
    import hypothesis.strategies
    import numpy
    import pydantic
    import pytest
    import torch
    import transformers

    torch.set_num_threads(1)
    _ = (diffusers, hypothesis, numpy, pydantic, pytest, transformers)


def forked(
    tree: Path, files: Sequence[str], wanted: Mapping[str, float], known: set[str], budget: float
) -> tuple[int, list[Seen]]:
    """Run tests in a fork until one fails, or they have taken their time.

    Args:
        tree: the copy to run in.
        files: test files, below the tree.
        wanted: the tests to run first -> in which order.
        known: tests that need not run, unless they are wanted.
        budget: seconds of a processor.

    Returns:
        The exit code of pytest or `MORE`, negative if it was killed, and what was seen.
    """
    noted = tree.parent / "outcomes.jsonl"
    noted.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        os.setsid()
        code = 1
        try:
            code = _pytest(tree, files, Notes(tree, noted, wanted, known, budget))
        finally:
            os._exit(code)
    end = time.monotonic() + WAIT * (budget + HUNG)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            code = -signal.SIGKILL
            break
        time.sleep(0.02)
    lines = noted.read_text(encoding="utf-8").splitlines() if noted.exists() else []
    rows = [json.loads(line) for line in lines]
    return code, [Seen(test, end, cost, tuple(touched)) for test, end, cost, touched in rows]


class Notes:
    """A plugin of pytest: chooses, stops in time, and writes down what it sees."""

    def __init__(
        self, tree: Path, noted: Path, wanted: Mapping[str, float], known: set[str], budget: float
    ) -> None:
        self._package = str(tree / "diffpatch") + os.sep
        self._noted, self._wanted, self._known, self._budget = noted, wanted, known, budget
        self._codes: dict[int, Any] = {}
        self._imported: set[str] = set()
        self._began = 0.0

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Those that are wanted, then those about which nothing is known."""
        last = float("inf")
        run = [x for x in items if x.nodeid in self._wanted or x.nodeid not in self._known]
        items[:] = sorted(run, key=lambda item: self._wanted.get(item.nodeid, last))
        self._imported = set(self._touched())

    def pytest_runtest_setup(self, item: Any) -> None:
        self._codes.clear()
        self._began = time.process_time()
        self.listen()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            seconds = time.process_time() - self._began
            touched = sorted(self._imported | set(self._touched()))
            row = [report.nodeid, report.outcome, seconds, touched]
            with self._noted.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if time.process_time() > self._budget:
            os._exit(MORE)

    def listen(self) -> None:
        """Note the functions that are entered from now on, in all threads."""
        threading.settrace(self._enter)
        sys.settrace(self._enter)

    def _enter(self, frame: Any, event: str, argument: Any) -> None:
        self._codes[id(frame.f_code)] = frame.f_code

    def _touched(self) -> list[str]:
        codes = [c for c in list(self._codes.values()) if c.co_filename.startswith(self._package)]
        return [f"{c.co_filename.removeprefix(self._package)}:{c.co_qualname}" for c in codes]


def _pytest(tree: Path, files: Sequence[str], notes: Notes) -> int:
    import pytest

    os.chdir(tree)
    os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    os.environ["CI"] = "1"  # repeatable examples
    sys.dont_write_bytecode = True
    sys.path[:] = [str(tree), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    for name in [n for n in sys.modules if n.split(".")[0] in ("tests", "diffpatch")]:
        del sys.modules[name]
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    spent = int(time.process_time() + notes._budget) + HUNG
    resource.setrlimit(resource.RLIMIT_CPU, (spent, spent + 5))
    notes._budget += time.process_time()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    notes.listen()
    words = ["-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "--rootdir"]
    return int(pytest.main([*words, str(tree), *files], plugins=[notes]))
