"""How many small wrong edits do the tests notice? ``make mutants MINUTES=30 SEED=1``.

A sample of edits, drawn by a seed in turn from every part of the table, is made one at a time in a
copy of the tree in build/, where links are folders. Each is tried in a fork of one process that has
torch and diffusers loaded, by the tests that enter the edited function, the quickest first, and
then by those of which it is not known yet whether they do; every run notes that. One that none has
noticed when its time is up is unclear, and tried again by the next call. What is found out is kept
line by line, so that the next call with the same seed goes on; a file that has changed since is
tried again. The summary goes to eval/results/mutants.json and mutants.md.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.mutation.forks import MORE, ROOT, Seen, forked, preload
from tests.mutation.mutants import Mutant, changed, function_at, mutants
from tests.mutation.parts import Target, targets
from tests.mutation.summary import write_summary

COPY = ROOT / "build" / "mutants"
NO_TESTS = 5  # pytest's exit code where none was to run
NO_TESTS = 5  # pytest's exit code where none was to run
BUDGET, ROUNDS = 12.0, 6  # seconds of a processor for tests of a mutant, and how often at most


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
    preload()
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


class Known:
    """What runs of tests have shown about tests, in a file with a line for each.

    Args:
        file: of the lines.
        tree: the copy.
    """

    def __init__(self, file: Path, tree: Path) -> None:
        self._file, self._tree = file, tree
        self._digests: dict[str, str] = {}
        self._tests: dict[str, tuple[float, frozenset[str]]] = {}
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
            with contextlib.suppress(ValueError):  # the last may be cut off
                digest, test, seconds, touched = json.loads(line)
                if digest == self._digest(test):
                    self._tests[test] = seconds, frozenset(touched)

    def _digest(self, test: str) -> str:
        path = self._tree / test.split("::")[0]
        if str(path) not in self._digests:
            text = path.read_bytes() if path.is_file() else b""
            self._digests[str(path)] = hashlib.sha256(text).hexdigest()[:16]
        return self._digests[str(path)]

    def tests(self) -> set[str]:
        """Those of which it is known what they enter."""
        return set(self._tests)

    def entering(self, function: str | None, files: Sequence[str]) -> dict[str, float]:
        """Tests of files that enter a function, or anything at all where it is None -> seconds."""
        return {
            test: seconds
            for test, (seconds, touched) in self._tests.items()
            if test.split("::")[0] in files and (function is None or function in touched)
        }

    def add(self, seen: Seen) -> None:
        """Note what a test that passed has entered."""
        if seen.test not in self._tests:
            self._tests[seen.test] = seen.seconds, frozenset(seen.touched)
            row = [self._digest(seen.test), seen.test, seen.seconds, seen.touched]
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


class Session:
    """What has been found out, in a file with a line for every mutant.

    Args:
        file: of the lines.
        tree: the copy.
        again: whether survivors are tried once more.
    """

    def __init__(self, file: Path, tree: Path, again: bool) -> None:
        self._file, self._tree, self._again = file, tree, again
        self._known = Known(COPY / "tests.jsonl", tree)
        self._fails: set[str] = set()  # on the unedited tree
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
        again = known is not None and (
            known["end"] == "unclear" or (self._again and known["end"] == "unnoticed")
        )
        if known and known["digest"] == digest and not again:
            return False
        edited = mutant.applied(source)
        if edited is None:
            return False
        function = function_at(source, edited)
        end, by = self._end(
            path, source, edited, target.tests, function and f"{target.file}:{function}"
        )
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

    def _end(
        self, path: Path, source: str, edited: str, tests: Sequence[str], function: str | None
    ) -> tuple[str, str]:
        """What comes of an edit, and the test that notices it."""
        files, done = self._files(tests), set(self._fails)
        for _ in range(ROUNDS):
            wanted = self._known.entering(function, files)
            wanted = {test: cost for test, cost in wanted.items() if test not in done}
            known = self._known.tests() | done
            path.write_text(edited, encoding="utf-8")
            for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
                compiled.unlink()
            try:
                code, seen = forked(self._tree, files, wanted, known, BUDGET)
            finally:
                path.write_text(source, encoding="utf-8")
            done |= {one.test for one in seen}
            for one in seen:
                if one.outcome == "passed":
                    self._known.add(one)
            failed = next((one.test for one in seen if one.outcome == "failed"), None)
            if failed is not None and failed not in wanted and not self._passes(failed):
                self._fails.add(failed)
                failed, code = None, MORE
            elif code != MORE:
                break
        if code < 0:
            return "hung", failed or ""
        if failed is not None or code not in (0, NO_TESTS, MORE):
            return "noticed", failed or "loading"
        return ("unclear" if code == MORE else "unnoticed"), ""

    def _passes(self, test: str) -> bool:
        """Whether a test of which nothing is known passes on the unedited tree."""
        _, seen = forked(self._tree, [test], {}, set(), BUDGET)
        return any(one.outcome == "passed" for one in seen)

    def _files(self, tests: Sequence[str]) -> list[str]:
        paths = [self._tree / "tests" / name for name in tests]
        found = [sorted(p.rglob("test_*.py")) if p.is_dir() else [p] for p in paths]
        return [p.relative_to(self._tree).as_posix() for them in found for p in them]


if __name__ == "__main__":
    main()
