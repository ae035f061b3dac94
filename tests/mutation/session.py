"""Edits tried one after the other, and what came of each, kept in a file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.mutation.known import Known
from tests.mutation.mutants import Edit, changed, edit_of, function_at
from tests.mutation.parts import OUTSIDE, Target
from tests.mutation.warm import MORE, Question, Seen, Warm, exchangeable

BUDGET = 30.0  # seconds of a processor for the tests of an edit, the first time
LONGER = 4  # as much, each time that it was not enough
AT_ONCE = 60.0  # seconds of listening in one fork


@dataclass(frozen=True)
class End:
    """What came of an edit.

    Attributes:
        end: "noticed", "hung", "unnoticed" or "unclear".
        by: the test that noticed it.
        seconds: of a processor that its tests took.
    """

    end: str
    by: str
    seconds: float


class Session:
    """What has been found out, in a file with a line for every edit.

    Args:
        file: of the lines.
        tests: the file of what is known about tests.
        tree: the copy.
        again: whether survivors are tried once more.
    """

    def __init__(self, file: Path, tests: Path, tree: Path, again: bool) -> None:
        self._file, self._tree, self._again = file, tree, again
        self._known = Known(tests, tree)
        self._warm: Warm | None = None
        self._alone: dict[str, bool] = {}  # whether a test passes by itself on the unedited tree
        self.found: dict[Edit, dict[str, Any]] = {}
        if file.is_file():
            for line in file.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # the last may be cut off
                    row = json.loads(line)
                    if (tree / "diffpatch" / row["mutant"][0]).is_file():
                        self.found[edit_of(row["mutant"])] = row

    def learn(self, files: Sequence[str], until: float) -> None:
        """Collect tests, and note of those of which nothing is known what they enter."""
        self._warm = Warm(self._tree, files)
        if self._warm.tests is None:
            raise SystemExit("the tests cannot be collected: does `make test` pass?")
        unknown = [test for test in self._warm.tests if test not in self._known]
        while unknown and time.monotonic() < until:
            file = unknown[0].split("::")[0]
            these = tuple(test for test in unknown if test.split("::")[0] == file)
            _, seen = self._warm.ask(Question(these, AT_ONCE, listen=True))
            for one in seen:
                self._known.add(one)
            if not seen:  # it ended the whole process
                self._known.add(Seen(these[0], "failed", AT_ONCE))
            unknown = [test for test in unknown if test not in self._known]
            print(f"{len(unknown)} tests to learn of", file=sys.stderr, flush=True)

    def try_out(self, target: Target, edit: Edit) -> bool:
        """Make the edit, unless it is known what comes of it; run the tests; take it back.

        Returns:
            Whether anything was found out.
        """
        path = self._tree / "diffpatch" / target.file
        source = path.read_text(encoding="utf-8")
        digest = hashlib.sha256(source.encode()).hexdigest()[:16]
        known = self.found.get(edit)
        budget = BUDGET
        if known and known["digest"] == digest:
            if known["end"] == "unclear":
                budget = LONGER * known.get("budget", BUDGET)
            elif not (self._again and known["end"] == "unnoticed"):
                return False
        edited = edit.applied(source)
        if edited is None:
            return False
        end = self._end(path, source, edited, target, budget)
        before, after = changed(source, edited)
        row = {
            "mutant": list(edit.key), "part": target.part, "digest": digest, "before": before,
            "after": after, "end": end.end, "by": end.by, "budget": budget,
            "seconds": round(end.seconds, 2),
        }  # fmt: skip
        self.found[edit] = row
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        said = f"{end.end:10} {end.seconds:5.1f} s {target.file}: {before} -> {after}"
        print(said, end.by, file=sys.stderr, flush=True)
        return True

    def _end(self, path: Path, source: str, edited: str, target: Target, budget: float) -> End:
        function = function_at(source, edited)
        inside = function is not None and exchangeable(source, edited)
        likely = self._likely(f"{target.file}:{function}", target) if inside else []
        if not likely:  # perhaps what loading runs
            inside, likely = False, self._likely(f"{target.file}:", target)
        tests = tuple(test for test, _ in likely)
        if not inside:  # collecting costs time too
            tests = (*OUTSIDE, *within(likely, budget))
        with self._edited(path, source, edited):
            if inside:
                assert self._warm is not None
                code, seen = self._warm.ask(Question(tests, budget, path, source, edited))
            else:
                code, seen = self._cold(tests, budget)
        took = sum(one.seconds for one in seen)
        if code < 0:
            return End("hung", "", took)
        if code == MORE or (code == 0 and not {test for test, _ in likely} <= {*tests}):
            return End("unclear", "", took)
        if inside and code and not seen:
            raise RuntimeError(f"no test could begin with {changed(source, edited)}")
        if code == 0:
            return End("unnoticed", "", took)
        failed = next((one.test for one in seen if one.outcome == "failed"), "loading")
        if failed != "loading" and not self._passes(failed):
            return self._end(path, source, edited, target, budget)
        return End("noticed", failed, took)

    def _likely(self, where: str, target: Target) -> list[tuple[str, float]]:
        found = self._known.entering(where, target.tests)
        return [(test, cost) for test, cost in found if self._alone.get(test, True)]

    def _cold(self, tests: tuple[str, ...], budget: float) -> tuple[int, list[Seen]]:
        """Ask a process that loads the edited file."""
        process = Warm(self._tree, sorted({test.split("::")[0] for test in tests}))
        try:
            return process.ask(Question(tests, budget)) if process.tests is not None else (1, [])
        finally:
            process.close()

    def _passes(self, test: str) -> bool:
        """Whether a test passes by itself on the unedited tree."""
        if test not in self._alone:
            assert self._warm is not None
            code, _ = self._warm.ask(Question((test,), BUDGET * LONGER))
            self._alone[test] = code == 0
        return self._alone[test]

    @contextlib.contextmanager
    def _edited(self, path: Path, source: str, edited: str) -> Iterator[None]:
        """The file with the edit, for processes that load it."""
        path.write_text(edited, encoding="utf-8")
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
            compiled.unlink()
        try:
            yield
        finally:
            path.write_text(source, encoding="utf-8")


def within(likely: Sequence[tuple[str, float]], seconds: float) -> Iterator[str]:
    """The first of some tests with their seconds that fit into a time, one at least."""
    spent = 0.0
    for test, cost in likely:
        if spent and spent + cost > seconds:
            return
        spent += cost
        yield test
