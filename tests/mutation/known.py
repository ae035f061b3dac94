"""What is known about tests: what they cost, and which functions of the package they enter."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from tests.mutation.warm import Seen

FAR = 3.0  # a test that the table does not name comes as late as one that costs so many times more


class Known:
    """What runs of tests have shown about tests, in a file with a line for each.

    Args:
        file: of the lines.
        tree: the copy. What was noted of a test file that has changed since does not count.
    """

    def __init__(self, file: Path, tree: Path) -> None:
        self._file, self._tree = file, tree
        self._digests: dict[str, str] = {}
        self._tests: dict[str, Seen] = {}
        self._shared: defaultdict[str, set[str]] = defaultdict(set)
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
            with contextlib.suppress(ValueError):  # the last may be cut off
                digest, test, outcome, seconds, touched, shared = json.loads(line)
                if digest == self._digest(test):
                    self._keep(Seen(test, outcome, seconds, tuple(touched), tuple(shared)))

    def __contains__(self, test: str) -> bool:
        return test in self._tests

    def entering(self, where: str, near: Sequence[str]) -> list[tuple[str, float]]:
        """Tests that enter a function or anything of a file, and their seconds; likeliest first.

        Quick ones come first, then further cases of tests that come before, and those of other
        files than the near ones.

        Args:
            where: "file:qualified name", or "file:" for anything in it.
            near: test files and folders, below the folder of tests.
        """
        places = tuple(f"tests/{name}" for name in near)
        cases: Counter[str] = Counter()
        found: list[tuple[float, str, float]] = []
        for seen in sorted(self._tests.values(), key=lambda seen: seen.seconds):
            is_near = seen.test.startswith(places)
            # One that enters nothing looks at what stands outside of functions.
            looks = is_near and where.endswith(":") and not seen.touched
            if seen.outcome != "passed" or not (looks or self._enters(seen, where)):
                continue
            function = seen.test.split("[")[0]
            cases[function] += 1
            far = 1.0 if is_near else FAR
            found.append((seen.seconds * cases[function] * far, seen.test, seen.seconds))
        return [(test, seconds) for _, test, seconds in sorted(found)]

    def add(self, seen: Seen) -> None:
        """Note a run of a test on the unedited tree."""
        self._keep(seen)
        row = [self._digest(seen.test), seen.test, seen.outcome, round(seen.seconds, 3)]
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps([*row, seen.touched, seen.shared]) + "\n")

    def slowest(self, count: int) -> list[tuple[float, str]]:
        """Seconds and ids of the tests that cost most."""
        costs = ((seen.seconds, seen.test) for seen in self._tests.values())
        return sorted(costs, reverse=True)[:count]

    def _keep(self, seen: Seen) -> None:
        self._tests[seen.test] = seen
        self._shared[seen.test.split("::")[0]].update(seen.shared)

    def _enters(self, seen: Seen, where: str) -> bool:
        shared = self._shared[seen.test.split("::")[0]] if seen.shared else ()
        touched = (*seen.touched, *shared)
        if where.endswith(":"):
            return any(name.startswith(where) for name in touched)
        within = f"{where}.<locals>."  # what it has made may run without it
        return where in touched or any(name.startswith(within) for name in touched)

    def _digest(self, test: str) -> str:
        path = self._tree / test.split("::")[0]
        if str(path) not in self._digests:
            text = path.read_bytes() if path.is_file() else b""
            self._digests[str(path)] = hashlib.sha256(text).hexdigest()[:16]
        return self._digests[str(path)]
