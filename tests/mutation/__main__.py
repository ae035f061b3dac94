"""How many small wrong edits do the tests notice? ``make mutants MINUTES=30 SEED=1``.

A sample of edits, drawn by a seed in turn from every part of the table, is made one at a time in a
copy of the tree in build/, where links are folders. Each is tried in a fork of one process that has
torch and diffusers loaded: first by the quick tests of its file, then by all of them. What is
found out is kept line by line, so that the next call with the same seed goes on; a file that has
changed since is tried again. The summary goes to eval/results/mutants.json and mutants.md.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.mutation.mutants import Mutant, changed, mutants
from tests.mutation.parts import Target, targets
from tests.mutation.summary import write_summary

ROOT = Path(__file__).parents[2]
COPY = ROOT / "build" / "mutants"
QUICK, ALL = 10.0, 30.0  # seconds of tests that a mutant is tried by, first and if it survives
LONGEST = 40.0  # seconds that the tests of a file may take; those that come later are left out
SLOWER, STUCK = 5.0, 30.0  # times as long as unedited, and seconds more, until it counts as hung
MEMORY = 12 * 2**30


def main() -> None:
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--part", action="append", help="only these parts of the table")
    parser.add_argument("--again", action="store_true", help="try survivors once more")
    args = parser.parse_args()
    until = time.monotonic() + 60 * args.minutes
    tree = make_copy()
    session = Session(COPY / f"seed-{args.seed}.jsonl", tree, args.again)
    _preload()
    for target, mutant in sample(tree, args.seed, args.part):
        if time.monotonic() > until:
            break
        if session.try_out(target, mutant):
            write_summary(session.found, args.seed, ROOT)  # each time: it may be stopped


def make_copy() -> Path:
    """The tracked tree as it is now, links followed, compiled once."""
    tree = COPY / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    new = subprocess.run(
        ["git", "ls-files", "-o", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    tops = sorted({n.split("/")[0] for n in (listed.stdout + new.stdout).splitlines()})
    for top in tops:
        if (ROOT / top).is_dir():
            no_caches = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / top, tree / top, ignore=no_caches)
        elif (ROOT / top).exists():
            tree.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / top, tree / top)
    subprocess.run(
        [sys.executable, "-m", "compileall", "-q", "--invalidation-mode=unchecked-hash",
         "diffpatch", "tests"],
        cwd=tree, check=False,
    )  # fmt: skip
    return tree


def sample(tree: Path, seed: int, parts: Sequence[str] | None) -> list[tuple[Target, Mutant]]:
    """All mutants in random order, one of every part in turn."""
    by_part: defaultdict[str, list[tuple[Target, Mutant]]] = defaultdict(list)
    for target in targets(tree / "diffpatch"):
        if not parts or target.part in parts:
            source = (tree / "diffpatch" / target.file).read_text(encoding="utf-8")
            by_part[target.part] += [(target, one) for one in mutants(target.file, source)]
    for part, them in by_part.items():
        random.Random(f"{seed} {part}").shuffle(them)
    longest = max(map(len, by_part.values()), default=0)
    return [them[i] for i in range(longest) for them in by_part.values() if i < len(them)]


class Session:
    """What has been found out, in a file with a line for every mutant.

    Args:
        file: of the lines.
        tree: the copy.
        again: whether survivors are tried once more.
    """

    def __init__(self, file: Path, tree: Path, again: bool) -> None:
        self._file, self._tree, self._again = file, tree, again
        self._times: dict[str, dict[str, float]] = {}
        self._kept = COPY / "times.json"
        if self._kept.is_file():
            self._times = json.loads(self._kept.read_text(encoding="utf-8"))
        self.found: dict[Mutant, dict[str, Any]] = {}
        if file.is_file():
            for line in file.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # the last may be cut off
                    row = json.loads(line)
                    if (tree / "diffpatch" / row["mutant"][0]).is_file():
                        self.found[Mutant(*row["mutant"])] = row

    def try_out(self, target: Target, mutant: Mutant) -> bool:
        """Make the edit, unless it is known what comes of it; run the tests; take it back.

        Returns:
            Whether anything was found out.
        """
        path = self._tree / "diffpatch" / target.file
        source = path.read_text(encoding="utf-8")
        digest = hashlib.sha256(source.encode()).hexdigest()[:16]
        known = self.found.get(mutant)
        if (
            known
            and known["digest"] == digest
            and not (self._again and known["end"] == "unnoticed")
        ):
            return False
        edited = mutant.applied(source)
        if edited is None:
            return False
        times = self._unedited(target.tests)
        path.write_text(edited, encoding="utf-8")
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
            compiled.unlink()
        try:
            end, by = self._end(times)
        finally:
            path.write_text(source, encoding="utf-8")
        before, after = changed(source, edited)
        row = {
            "mutant": [mutant.file, mutant.operator, mutant.occurrence], "part": target.part,
            "digest": digest, "before": before, "after": after, "end": end, "by": by,
        }  # fmt: skip
        self.found[mutant] = row
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{end:10} {target.file}: {before} -> {after}", file=sys.stderr, flush=True)
        return True

    def _end(self, times: dict[str, float]) -> tuple[str, str]:
        order = sorted(times, key=lambda name: times[name])
        quick = _within(order, times, QUICK)
        for names in (quick, _within(order[len(quick) :], times, ALL - QUICK)):
            if names:
                limit = SLOWER * sum(times[name] for name in names) + STUCK
                code, lines = forked(self._tree, names, limit)
                if code:
                    failed = [name for name, outcome, _ in lines if outcome == "failed"]
                    return ("hung" if code < 0 else "noticed"), (failed or ["loading"])[0]
        return "unnoticed", ""

    def _unedited(self, tests: tuple[str, ...]) -> dict[str, float]:
        """Seconds of each test that passes on the unedited tree."""
        out: dict[str, float] = {}
        for name in tests:
            path = self._tree / "tests" / name
            files = sorted(path.rglob("test_*.py")) if path.is_dir() else [path]
            key = f"{name} {hashlib.sha256(b''.join(f.read_bytes() for f in files)).hexdigest()}"
            if key not in self._times:
                _, lines = forked(self._tree, [f"tests/{name}"], LONGEST, stop=False)
                self._times[key] = {n: s for n, outcome, s in lines if outcome == "passed"}
                self._kept.write_text(json.dumps(self._times), encoding="utf-8")
            out |= self._times[key]
        if not out:
            raise SystemExit(f"no test of {', '.join(tests)} passes on the unedited tree")
        return out


def _within(order: Sequence[str], times: dict[str, float], seconds: float) -> list[str]:
    out: list[str] = []
    for name in order:
        seconds -= times[name]
        if seconds < 0 and out:
            break
        out.append(name)
    return out


def _preload() -> None:
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
    tree: Path, names: Sequence[str], limit: float, stop: bool = True
) -> tuple[int, list[tuple[str, str, float]]]:
    """Run tests in a fork: its exit code (negative: killed), and (test, outcome, seconds)."""
    noted = COPY / "outcomes.jsonl"
    noted.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        os.setsid()
        code = 1
        try:
            code = _pytest(tree, names, noted, stop)
        finally:
            os._exit(code)
    end = time.monotonic() + limit
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
        time.sleep(0.05)
    text = noted.read_text(encoding="utf-8") if noted.exists() else ""
    return code, [tuple(json.loads(line)) for line in text.splitlines()]


def _pytest(tree: Path, names: Sequence[str], noted: Path, stop: bool) -> int:
    import pytest

    class Notes:
        @pytest.hookimpl
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.failed:
                with noted.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([report.nodeid, report.outcome, report.duration]) + "\n")

    os.chdir(tree)
    os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    os.environ["CI"] = "1"  # repeatable examples
    sys.dont_write_bytecode = True
    sys.path[:] = [str(tree), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    for name in [n for n in sys.modules if n.split(".")[0] in ("tests", "diffpatch")]:
        del sys.modules[name]
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    words = ["-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "--rootdir", str(tree)]
    return int(pytest.main([*words, *(["-x"] if stop else []), *names], plugins=[Notes()]))


if __name__ == "__main__":
    main()
