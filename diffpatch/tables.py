"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Aligned columns without lines: the first `left` of them to the left, the others right."""
    align = ["left" if column < left else "right" for column in range(len(rows[0]))]
    text = tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=align)
    return "\n".join(line.rstrip() for line in text.splitlines())
