"""How a plan writes numbers down."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def operations(flops: float) -> str:
    """A number of floating-point operations in the unit that suits it.

    >>> operations(1.304e16), operations(2.5e12)
    ('13.04 PFLOP', '2.5 TFLOP')
    """
    unit, size = ("PFLOP", 1e15) if flops >= 1e15 else ("TFLOP", 1e12)
    return f"{flops / size:,.4g} {unit}"


def runs(values: Sequence[float], most: int = 4) -> str:
    """Equal neighbours counted; only the range, where they change often.

    >>> runs([1.0, 1.0, 0.25]), runs([0.2, 0.3] * 4)
    ('2 × 100.0%, 1 × 25.0%', '8 × 20.0% to 30.0%')
    """
    groups = [
        (len(list(same)), text) for text, same in itertools.groupby(f"{v:.1%}" for v in values)
    ]
    if len(groups) <= most:
        return ", ".join(f"{count} × {text}" for count, text in groups)
    lead = f"{groups[0][0]} × {groups[0][1]}, " if groups[0][0] > 1 else ""
    rest = values[groups[0][0] :] if lead else values
    return f"{lead}{len(rest)} × {min(rest):.1%} to {max(rest):.1%}"
