"""The tool that makes small wrong edits: what it edits, what it leaves alone, what it sums up."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.mutation.mutants import Mutant, changed, function_at, mutants
from tests.mutation.parts import targets
from tests.mutation.summary import judged, shares

ROOT = Path(__file__).parents[2]
SOURCE = '''"""A module."""
from __future__ import annotations


def area(width: int | None, height: int = 2) -> int | None:
    if width is None or width <= 0:
        return None
    return width * height
'''


def test_every_edit_is_one_line_that_runs_otherwise() -> None:
    found = [(one, one.applied(SOURCE)) for one in mutants("area.py", SOURCE)]
    edits = {changed(SOURCE, after) for _, after in found if after is not None}
    assert ("return width * height", "return width / height") in edits
    asked = "if width is None or width <= 0:"
    for after in ("is not None or width <= 0", "is None and width <= 0", "is None or width < 0",
                  "is None or width <= 1"):  # fmt: skip
        assert (asked, f"if width {after}:") in edits
    assert all(before.count("\n") == after.count("\n") == 0 for before, after in edits)
    # What nothing evaluates is left alone.
    assert not any("int &" in after for _, after in edits)
    assert len({one for one, _ in found}) == len(found)
    assert Mutant("area.py", "core/AddNot", 99).applied(SOURCE) is None


INNER = """
LIMIT = 1
class Box:
    side = 2
    @cached(3)
    def area(self, a=4,
             b=5):
        def half(x):
            return x / 6
        return half(7)
"""


def test_an_edit_belongs_to_the_function_that_has_to_run_for_it() -> None:
    where = {n: function_at(INNER, INNER.replace(str(n), "9")) for n in range(1, 8)}
    assert where == dict.fromkeys(range(1, 6)) | dict.fromkeys((6, 7), "Box.area")


def test_every_row_of_the_table_names_files_and_tests_that_exist() -> None:
    found = list(targets(ROOT / "diffpatch"))
    assert len(found) > 60 and len({one.file for one in found}) == len(found)
    for one in found:
        assert all((ROOT / "tests" / name).exists() for name in one.tests), one
    for file, _, _ in judged():
        assert (ROOT / "diffpatch" / file).is_file(), file


def test_shares_are_of_those_that_matter() -> None:
    ends = Counter({"noticed": 6, "hung": 1, "equal": 2, "unnoticed": 3})
    assert shares(ends) == {"tried": 12, **ends, "share": 0.7}
    assert shares(ends + Counter({"unclear": 4}))["share"] == 0.5  # at least
    assert shares(Counter({"equal": 1}))["share"] == 0
