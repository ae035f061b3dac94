"""Pytest in a fork of this process, which collects once and forks again for every edit."""

from __future__ import annotations

import cProfile
import gc
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MEMORY = 12 * 2**30  # bytes
HUNG = 90  # seconds of a processor beyond its budget until a run counts as hung
PASSED, FAILED = 0, 1  # pytest's exit codes
MORE = 77  # the exit code where the budget is spent, nothing has failed and tests are left
WAIT = 20  # times as long may pass on a busy machine
ASLEEP = 3  # seconds of waiting that count as one of a processor


@dataclass(frozen=True)
class Seen:
    """What one run of one test showed.

    Attributes:
        test: its id.
        outcome: "passed", "failed" or "skipped".
        seconds: of a processor.
        touched: the functions of the package that it entered, "file:qualified name".
        shared: those of them that a fixture of the whole file entered.
    """

    test: str
    outcome: str
    seconds: float
    touched: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """Tests to run until one fails.

    Attributes:
        tests: ids, in this order.
        budget: seconds of a processor after which no further one begins.
        path: the edited file, None where nothing is edited.
        source: its text before.
        edited: its text after.
        listen: whether to note which functions are entered; all tests run then.
    """

    tests: tuple[str, ...]
    budget: float
    path: Path | None = None
    source: str = ""
    edited: str = ""
    listen: bool = False


def preload() -> None:
    """What every fork needs and no edit changes."""
    import diffusers
    import diffusers.models.attention_processor
    import hypothesis.strategies
    import numpy
    import pydantic
    import torch
    import transformers

    torch.set_num_threads(1)
    _ = (diffusers, hypothesis, numpy, pydantic, transformers)


class Warm:
    """A process that has collected tests of a tree.

    Args:
        tree: the copy to run in.
        files: test files and folders, below the tree.

    Attributes:
        tests: the ids of the tests; None where a file cannot be loaded.
    """

    def __init__(self, tree: Path, files: Sequence[str]) -> None:
        self._connection, other = multiprocessing.Pipe()
        self._process = os.fork()
        if self._process == 0:
            self._connection.close()
            try:
                _pytest(tree, files, Driver(tree, other))
            finally:
                os._exit(FAILED)
        other.close()
        self.tests: list[str] | None = self._heard(None)

    def ask(self, question: Question) -> tuple[int, list[Seen]]:
        """The exit code (`MORE`: the budget was spent; negative: killed), and what was seen."""
        self._connection.send(question)
        answer: tuple[int, list[Seen]] = self._heard((FAILED, []))
        return answer

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        os.waitpid(self._process, 0)

    def _heard(self, otherwise: Any) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, ConnectionResetError):
            return otherwise


class Driver:
    """A plugin of pytest that answers questions instead of running what was collected.

    Args:
        tree: the copy.
        connection: to the one who asks.
    """

    def __init__(self, tree: Path, connection: Connection) -> None:
        self._package = str(tree / "diffpatch") + os.sep
        self._connection = connection
        self._noted = tree.parent / f"seen-{os.getpid()}.jsonl"
        self._codes: dict[int, CodeType] = {}  # what threads of a test have entered
        self._profile = cProfile.Profile()
        self._prepared: tuple[str, ...] = ()
        self._functions: dict[str, list[FunctionType]] = {}

    def pytest_runtestloop(self, session: Any) -> bool:
        """Serve until the other side has closed."""
        if session.testsfailed:
            self._connection.send(None)
            return True
        items = {item.nodeid: item for item in session.items}
        # Once: to look at every object in a fork copies the memory of all.
        self._functions = functions(self._package)
        gc.freeze()
        self._connection.send(list(items))
        while True:
            try:
                question = self._connection.recv()
            except EOFError:
                return True
            self._connection.send(self._answer(question, items))

    def _answer(self, question: Question, items: dict[str, Any]) -> tuple[int, list[Seen]]:
        self._noted.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            os.setsid()
            code = FAILED
            try:
                code = self._run(question, [items[t] for t in question.tests if t in items])
            finally:
                os._exit(code)
        code = _waited(child, WAIT * (question.budget + HUNG))
        lines = self._noted.read_text("utf-8").splitlines() if self._noted.exists() else []
        self._noted.unlink(missing_ok=True)
        rows = [json.loads(line) for line in lines]
        seen = [
            Seen(test, outcome, cost, tuple(touched), tuple(shared))
            for test, outcome, cost, touched, shared in rows
        ]
        return code, seen

    def _run(self, question: Question, items: Sequence[Any]) -> int:
        from _pytest.runner import runtestprotocol

        limit = int(spent() + question.budget) + HUNG
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        if question.path is not None:
            loaded = self._functions.get(str(question.path), [])
            exchange(question.path, question.source, question.edited, loaded)
        if question.listen:
            threading.settrace(self._enter)
        first = spent()
        for item, following in zip(items, [*items[1:], None], strict=True):
            self._codes.clear()
            began, clock = spent(), time.monotonic()
            self._profile = cProfile.Profile(subcalls=False, builtins=False)
            if question.listen:
                self._profile.enable()
            reports = runtestprotocol(item, nextitem=following, log=False)
            self._profile.disable()
            cost = max(spent() - began, (time.monotonic() - clock) / ASLEEP)
            outcomes = {report.outcome for report in reports}
            outcome = next((o for o in ("failed", "skipped") if o in outcomes), "passed")
            shared = self._prepared if _shares(item) else ()
            self._note([item.nodeid, outcome, cost, self._touched(), shared])
            if outcome == "failed" and not question.listen:
                return FAILED
            if spent() - first > question.budget:
                return MORE if following is not None else PASSED
        return PASSED

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item: Any) -> None:
        """What a fixture of the file entered is entered for all of its tests."""
        self._prepared = self._touched()

    def _note(self, row: list[Any]) -> None:
        with self._noted.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _enter(self, frame: Any, event: str, argument: Any) -> None:
        self._codes[id(frame.f_code)] = frame.f_code

    def _touched(self) -> tuple[str, ...]:
        entered = [row.code for row in self._profile.getstats()]
        codes = [c for c in (*entered, *list(self._codes.values())) if isinstance(c, CodeType)]
        cut = len(self._package)
        names = {
            f"{code.co_filename[cut:]}:{code.co_qualname}"
            for code in codes
            if code.co_filename.startswith(self._package)
        }
        return tuple(sorted(names))


def functions(folder: str) -> dict[str, list[FunctionType]]:
    """The functions that are loaded, by the file below a folder that they stand in."""
    found: defaultdict[str, list[FunctionType]] = defaultdict(list)
    for one in gc.get_objects():  # isinstance asks a weak proxy for what may be gone
        if type(one) is FunctionType and one.__code__.co_filename.startswith(folder):
            found[one.__code__.co_filename].append(one)
    return found


def exchange(path: Path, source: str, edited: str, loaded: Sequence[FunctionType]) -> None:
    """Give every function of a loaded file the code that it has in the edited one.

    Args:
        path: of the file.
        source: its text as it was loaded.
        edited: the same with an edit inside of functions.
        loaded: the functions.
    """
    old, new = (list(_codes(compile(text, str(path), "exec"))) for text in (source, edited))
    after: dict[tuple[str, int], CodeType] = {}
    for one, other in zip(old, new, strict=True):
        after[one.co_qualname, one.co_firstlineno] = other
    for function in loaded:
        code = function.__code__
        function.__code__ = after[code.co_qualname, code.co_firstlineno]


def exchangeable(source: str, edited: str) -> bool:
    """Whether the functions of two texts correspond one to one."""
    old, new = (
        [(code.co_qualname, code.co_freevars) for code in _codes(compile(text, "", "exec"))]
        for text in (source, edited)
    )
    return old == new


def _codes(code: CodeType) -> Iterator[CodeType]:
    """All code objects within one, itself first."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def spent() -> float:
    """Seconds of a processor, with those of processes that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _shares(item: Any) -> bool:
    """Whether a test uses a fixture that serves the whole file."""
    fixtures = item._fixtureinfo.name2fixturedefs.values()
    return any(one.scope != "function" for them in fixtures for one in them)


def _waited(child: int, seconds: float) -> int:
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -signal.SIGKILL
        time.sleep(0.005)


def _pytest(tree: Path, files: Sequence[str], driver: Driver) -> int:
    os.chdir(tree)
    os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    os.environ["CI"] = "1"  # repeatable examples
    sys.dont_write_bytecode = True
    sys.path[:] = [str(tree), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    ours = [name for name in sys.modules if name.split(".")[0] in ("tests", "diffpatch")]
    for name in ours:
        if not name.startswith("tests.mutation."):  # what is sent to and fro
            del sys.modules[name]
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    words = ["-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "--rootdir"]
    return int(pytest.main([*words, str(tree), *files], plugins=[driver]))
