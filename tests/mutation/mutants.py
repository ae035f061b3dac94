"""The small wrong edits themselves, by cosmic-ray's operators."""

from __future__ import annotations

import ast
import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cosmic_ray.ast import get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator

# Those of cosmic-ray's that a tired hand might do; adding and shifting bits is not among them.
_SWAPS = {
    "BinaryOperator": "Add_Sub Sub_Add Mul_Div Mul_Add Div_Mul FloorDiv_Mul FloorDiv_Div"
    " Mod_FloorDiv Pow_Mul BitOr_BitAnd BitAnd_BitOr",
    "ComparisonOperator": "Eq_NotEq NotEq_Eq Lt_LtE LtE_Lt Gt_GtE GtE_Gt Lt_GtE Gt_LtE Is_IsNot"
    " IsNot_Is",
    "UnaryOperator": "USub_UAdd Delete_USub Delete_Invert Delete_Not",
}
OPERATORS = (
    *(f"core/Replace{kind}_{swap}" for kind, swaps in _SWAPS.items() for swap in swaps.split()),
    *(f"core/{name}" for name in (
        "AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr",
        "ReplaceOrWithAnd", "ReplaceBreakWithContinue", "ReplaceContinueWithBreak",
        "NumberReplacer", "ZeroIterationForLoop",
    )),
)  # fmt: skip


BY_HAND = Path(__file__).with_name("by_hand.json")


class Edit(Protocol):
    """One small wrong edit of a file."""

    @property
    def file(self) -> str:
        """The file, below the package's folder."""

    @property
    def key(self) -> tuple[str, str, str | int]:
        """What to keep of it."""

    def applied(self, source: str) -> str | None:
        """The edited source; None where the edit does not apply or changes nothing that runs."""


@dataclass(frozen=True, order=True)
class Mutant:
    """One edit.

    Attributes:
        file: below the package's folder.
        operator: cosmic-ray's name.
        occurrence: which of the places in the file.
    """

    file: str
    operator: str
    occurrence: int

    @property
    def key(self) -> tuple[str, str, int]:
        """What to keep of it."""
        return self.file, self.operator, self.occurrence

    def applied(self, source: str) -> str | None:
        """The edited source; None where the edit changes nothing that runs."""
        out = mutate_code(source, get_operator(self.operator)(), self.occurrence)
        return None if out is None or _runs(out) in (None, _runs(source)) else out


@dataclass(frozen=True, order=True)
class Exchange:
    """One edit that somebody has made by hand.

    Attributes:
        file: below the package's folder.
        before: a text that stands there once.
        after: what stands there then.
    """

    file: str
    before: str
    after: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What to keep of it."""
        return self.file, self.before, self.after

    def applied(self, source: str) -> str | None:
        """The edited source; None where the text does not stand there once any more."""
        return source.replace(self.before, self.after) if source.count(self.before) == 1 else None


def by_hand(file: Path | None = None) -> list[Exchange]:
    """The edits of a file, or those that are kept with the tests."""
    return [Exchange(**row) for row in json.loads((file or BY_HAND).read_text(encoding="utf-8"))]


def edit_of(key: Sequence[str | int]) -> Mutant | Exchange:
    """The edit that has a key."""
    file, one, other = key
    made = Exchange(str(file), str(one), other) if isinstance(other, str) else None
    return made or Mutant(str(file), str(one), int(other))


def mutants(file: str, source: str) -> Iterator[Mutant]:
    """All that the operators can do to a file."""
    tree = get_ast(source)
    for name in OPERATORS:
        operator = get_operator(name)()
        places, waiting = 0, [tree]
        while waiting:
            node = waiting.pop()
            places += len(list(operator.mutation_positions(node)))
            waiting.extend(getattr(node, "children", ()))
        yield from (Mutant(file, name, i) for i in range(places))


def changed(before: str, after: str) -> tuple[str, str]:
    """The lines that an edit takes away, and those that it puts there."""
    lines = list(difflib.ndiff(before.splitlines(), after.splitlines()))
    return tuple(
        "\n".join(line[2:].strip() for line in lines if line.startswith(sign)) for sign in "-+"
    )  # type: ignore[return-value]


def function_at(before: str, after: str) -> str | None:
    """The qualified name of the function in whose body an edit is; None outside of any.

    Of one within another the outer one, which has to run first. What runs when a function is made
    (decorators, defaults) is outside of it.
    """
    pairs = enumerate(zip(before.splitlines(), after.splitlines(), strict=False), 1)
    line = next(number for number, (one, other) in pairs if one != other)
    body, path = ast.parse(before).body, ""
    while True:
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            first, last = node.body[0].lineno, node.end_lineno or 0
            if first <= line <= last:
                path += node.name
                if isinstance(node, ast.FunctionDef):
                    return path
                body, path = node.body, f"{path}."
                break
        else:
            return None


class _Plain(ast.NodeTransformer):
    """What runs: without annotations, which nothing evaluates, and texts of errors."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        return ast.arg(node.arg)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        return ast.Assign([node.target], node.value or ast.Constant(None), lineno=0)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.returns = None
        return node

    def visit_If(self, node: ast.If) -> ast.AST | None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return None
        return self.generic_visit(node)


def _runs(source: str) -> str | None:
    try:
        return ast.dump(_Plain().visit(ast.parse(source)))
    except SyntaxError:
        return None
