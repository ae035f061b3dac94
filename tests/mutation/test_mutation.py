"""The tool that makes small wrong edits: what it edits, what it leaves alone, what it sums up."""

from __future__ import annotations

import importlib.util
import weakref
from collections import Counter
from pathlib import Path

import pytest

from tests.mutation.known import Known
from tests.mutation.mutants import (
    Exchange,
    Mutant,
    by_hand,
    changed,
    edit_of,
    function_at,
    mutants,
)
from tests.mutation.parts import OUTSIDE, targets
from tests.mutation.session import within
from tests.mutation.summary import judged, shares
from tests.mutation.warm import Seen, exchange, exchangeable, functions

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
    for file, test in (one.split("::") for one in OUTSIDE):
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8")
    for file, _, _ in judged():
        assert (ROOT / "diffpatch" / file).is_file(), file


def test_shares_are_of_those_that_matter() -> None:
    ends = Counter({"noticed": 6, "hung": 1, "equal": 2, "unnoticed": 3})
    assert shares(ends) == {"tried": 12, **ends, "share": 0.7}
    assert shares(ends + Counter({"unclear": 4}))["share"] == 0.5  # at least
    assert shares(Counter({"equal": 1}))["share"] == 0


def test_edits_by_hand_are_whole_and_differ() -> None:
    found = by_hand()
    assert len(found) > 100 and len(set(found)) == len(found)
    for one in found:
        assert one.before != one.after and (ROOT / "diffpatch" / one.file).is_file(), one
        assert edit_of(one.key) == one
    sources = {one.file: (ROOT / "diffpatch" / one.file).read_text("utf-8") for one in found}
    gone = [one for one in found if one.applied(sources[one.file]) is None]
    assert len(gone) < len(found) / 20, f"bring these up to the sources: {gone}"
    assert Exchange("a.py", "2", "3").applied("1 + 2") == "1 + 3"
    assert Exchange("a.py", "2", "3").applied("2 + 2") is None  # not there once any more
    assert edit_of(["a.py", "core/AddNot", 3]) == Mutant("a.py", "core/AddNot", 3)


CODE = """
def outer(x):
    def inner(y):
        return y * 2
    return inner
class Box:
    @property
    def side(self):
        return 1
double = outer(0)
"""


def test_functions_that_are_loaded_get_the_code_of_an_edit(tmp_path: Path) -> None:
    """Those within others too, and those of classes; nothing is loaded anew."""
    path = tmp_path / "loaded.py"
    path.write_text(CODE)
    spec = importlib.util.spec_from_file_location("loaded", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    box = module.Box()
    gone = weakref.proxy(module.Box())  # others leave such things behind; asked anything, it raises
    assert (module.double(4), box.side) == (8, 1)
    for edited, expected in (
        (CODE.replace("y * 2", "y * 3"), (12, 1)), (CODE.replace("return 1", "return 5"), (8, 5)),
    ):  # fmt: skip
        assert exchangeable(CODE, edited)
        exchange(path, CODE, edited, functions(str(path))[str(path)])
        assert (module.double(4), box.side) == expected
        exchange(path, edited, CODE, functions(str(path))[str(path)])
    assert not exchangeable(CODE, CODE.replace("y * 2", "(lambda: y)()"))
    with pytest.raises(ReferenceError):
        gone.side  # noqa: B018


def test_likely_tests_come_first(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text("")
    known = Known(tmp_path / "lines", tmp_path)
    rows = [
        ("tests/test_b.py::far", "passed", 2.0, ["m.py:f"]),
        ("tests/test_a.py::near", "passed", 3.0, ["m.py:f"]),
        ("tests/test_a.py::slow", "passed", 9.0, ["m.py:f"]),
        ("tests/test_a.py::failing", "failed", 1.0, ["m.py:f"]),
        ("tests/test_a.py::elsewhere", "passed", 1.0, ["m.py:g"]),
    ]  # fmt: skip
    for test, outcome, seconds, touched in rows:
        known.add(Seen(test, outcome, seconds, tuple(touched)))
    names = [t.partition("::")[2] for t, _ in known.entering("m.py:f", ["test_a.py"])]
    assert names == ["near", "far", "slow"]
    assert len(known.entering("m.py:", ["test_a.py"])) == 4
    assert list(within(known.entering("m.py:f", ["test_a.py"]), 6.0)) == [
        "tests/test_a.py::near", "tests/test_b.py::far"
    ]  # fmt: skip
    again = Known(tmp_path / "lines", tmp_path)
    assert again.slowest(1) == [(9.0, "tests/test_a.py::slow")] and "tests/test_b.py::far" in again
    (tmp_path / "tests" / "test_a.py").write_text("# changed")
    assert "tests/test_a.py::slow" not in Known(tmp_path / "lines", tmp_path)


def test_what_a_fixture_of_a_file_enters_all_its_tests_enter(tmp_path: Path) -> None:
    known = Known(tmp_path / "lines", tmp_path)
    known.add(Seen("t.py::first", "passed", 1.0, ("m.py:f", "m.py:made"), ("m.py:made",)))
    known.add(Seen("t.py::second", "passed", 1.0, (), ("m.py:nothing",)))
    known.add(Seen("t.py::without", "passed", 1.0, ()))
    found = {t for t, _ in known.entering("m.py:made", [])}
    assert found == {"t.py::first", "t.py::second"}


def test_what_a_function_has_made_enters_it_and_constants_are_looked_at(tmp_path: Path) -> None:
    known = Known(tmp_path / "lines", tmp_path)
    known.add(Seen("tests/t.py::made", "passed", 1.0, ("m.py:f.<locals>.check",)))
    known.add(Seen("tests/t.py::looks", "passed", 1.0, ()))
    known.add(Seen("tests/u.py::far", "passed", 1.0, ()))

    def tests(where: str) -> list[str]:
        return [test for test, _ in known.entering(where, ["t.py"])]

    assert tests("m.py:f") == ["tests/t.py::made"] and tests("m.py:g") == []
    assert tests("m.py:") == ["tests/t.py::looks", "tests/t.py::made"]
