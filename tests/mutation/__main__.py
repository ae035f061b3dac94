"""How many small wrong edits do the tests notice? ``make mutants MINUTES=30 SEED=1``.

A sample of edits, drawn by a seed in turn from every part of the table, and those that people have
made by hand, are tried one at a time in a copy of the tree in build/, where links are folders. One
process has loaded and collected the tests; first it notes once of each which functions it enters
and what it costs. Then it forks for every edit, exchanges the code of the edited function, and runs
the tests that enter it, the quickest first, until one fails. What runs while a file is loaded is
edited in a new process. One that none has noticed when its time is up is unclear, and tried with
more time by the next call. What is found out is kept line by line, so that the next call with the
same seed goes on; a file that has changed since is tried again. The summary goes to
eval/results/mutants.json and mutants.md.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from tests.mutation.mutants import Edit, by_hand, mutants
from tests.mutation.parts import COLLECTED, Target, targets
from tests.mutation.session import Session
from tests.mutation.summary import write_summary
from tests.mutation.warm import ROOT, preload

BUILD = ROOT / "build" / "mutants"


def main() -> None:
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--part", action="append", help="only these parts of the table")
    parser.add_argument("--again", action="store_true", help="try survivors once more")
    parser.add_argument("--learn", action="store_true", help="only note what the tests enter")
    parser.add_argument("--by-hand", type=Path, help="only the edits of this file; no summary")
    args = parser.parse_args()
    until = time.monotonic() + 60 * args.minutes
    name = args.by_hand.stem if args.by_hand else f"seed-{args.seed}"
    tree = make_copy(BUILD / name)
    preload()
    session = Session(BUILD / name / "found.jsonl", BUILD / "tests.jsonl", tree, args.again)
    session.learn(COLLECTED, until)
    wanted = [] if args.learn else sample(tree, args.seed, args.part, args.by_hand)
    for target, edit in wanted:
        if time.monotonic() > until:
            break
        if session.try_out(target, edit) and not args.by_hand:
            write_summary(session.found, args.seed, ROOT)  # each time: it may be stopped


def make_copy(folder: Path) -> Path:
    """The tree as it is now, without what git ignores, links followed, compiled."""
    tree = folder / "tree"
    names = ["git", "ls-files", "-c", "-o", "--exclude-standard"]
    listed = subprocess.run(names, cwd=ROOT, capture_output=True, text=True, check=True)
    for top in sorted({name.split("/")[0] for name in listed.stdout.splitlines()}):
        tree.mkdir(parents=True, exist_ok=True)
        if (ROOT / top).is_dir():
            no_caches = shutil.ignore_patterns("__pycache__")
            shutil.copytree(
                ROOT / top, tree / top, ignore=no_caches, copy_function=_copy, dirs_exist_ok=True
            )
        elif (ROOT / top).exists():
            _copy(ROOT / top, tree / top)
    for left in [
        path for path in tree.rglob("*.py") if not (ROOT / path.relative_to(tree)).exists()
    ]:
        left.unlink()
    compiling = [sys.executable, "-m", "compileall", "-q", "diffpatch", "tests"]
    subprocess.run(compiling, cwd=tree, check=False)
    return tree


def _copy(source: str | Path, target: str | Path) -> None:
    """Copy a file, unless it is there as it is here."""
    here, there = Path(source).stat(), Path(target)
    same = there.exists() and (there.stat().st_mtime, there.stat().st_size) == (
        here.st_mtime, here.st_size
    )  # fmt: skip
    if not same:
        shutil.copy2(source, target)


def sample(
    tree: Path, seed: int, parts: Sequence[str] | None, file: Path | None
) -> list[tuple[Target, Edit]]:
    """Edits made by hand and all mutants in random order, one of every part in turn."""
    by_file = {target.file: target for target in targets(tree / "diffpatch")}
    hand = [(by_file.get(e.file) or Target("by hand", e.file, ()), e) for e in by_hand(file)]
    by_part: defaultdict[str, list[tuple[Target, Edit]]] = defaultdict(list)
    for target, edit in hand:
        by_part["by hand"].append((Target("by hand", target.file, target.tests), edit))
    for target in () if file else by_file.values():
        source = (tree / "diffpatch" / target.file).read_text(encoding="utf-8")
        by_part[target.part] += [(target, one) for one in mutants(target.file, source)]
    for part, them in by_part.items():
        random.Random(f"{seed} {part}").shuffle(them)
    chosen = [them for part, them in by_part.items() if not parts or part in parts]
    longest = max(map(len, chosen), default=0)
    return [them[i] for i in range(longest) for them in chosen if i < len(them)]


if __name__ == "__main__":
    main()
