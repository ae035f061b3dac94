"""Where the tokens of a call stand: the integers that travel with it, and the layout they mean.

A family reads either one grid, (num_frames, height, width, before, after), or the spans of a
packed sequence off the arguments of a forward. Both travel through compiled graphs as integers;
what they mean is only decided in the call, whose number of tokens fills in what the forward left
open and must fit the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffpatch.patterns.grid import BETWEEN, Grid, PackedGrid, TokenGrid
from diffpatch.pipelines.families.grids import REST, GridReading

Numbers = tuple[int, ...]
NO_GRID: Numbers = (0, 0, 0, 0, 0)
UNKNOWN = (0, 0)  # of queries and keys: any call with fewer queries, to be counted as dense


def numbers(reading: GridReading | PackedGrid) -> Numbers:
    """The integers of a reading: five of one grid; of spans the rule, then three for each."""
    spans = reading.spans if isinstance(reading, PackedGrid) else reading
    rule = BETWEEN.index(reading.between) if isinstance(reading, PackedGrid) else 0
    flat = [span if isinstance(span, tuple) else (0, 0, span) for span in spans]
    if all(frames == 0 for frames, _, _ in flat):
        return tuple(number for _, _, number in flat)
    return (rule, *(n for three in flat for n in three))


def layout(given: Sequence[int], tokens: int) -> Grid | str:
    """What the integers mean in a call of that many tokens, or why they do not fit it."""
    if len(given) != len(NO_GRID):
        rule, *flat = given
        threes = zip(*[iter(flat)] * 3, strict=True)
        spans = tuple(n if f == 0 else (f, h, n) for f, h, n in threes)
        packed = PackedGrid(spans, BETWEEN[rule]).simplest()
        if packed.num_tokens != tokens:
            return f"a sequence of {tokens} tokens does not hold the spans {packed}"
        return packed
    frames, height, width, before, after = given
    rest = tokens - frames * height * width
    if before == REST:
        before = rest - after
    elif after == REST:
        after = rest - before
    if min(before, after) < 0 or before + after != rest or min(frames, height, width) < 1:
        return f"a sequence of {tokens} tokens does not hold the grid {tuple(given)}"
    return TokenGrid(frames, height, width, before, after)


def silent_tokens(grid: Grid, text: str) -> range:
    """The tokens that have keys and no queries, in a model of which its text has none."""
    total = grid.num_tokens
    if isinstance(grid, PackedGrid):
        edge = grid.spans[0 if text == "before" else -1]
        count = edge if isinstance(edge, int) else 0
    else:
        count = grid.text_before if text == "before" else grid.text_after
    return range(count) if text == "before" else range(total - count, total)


def call_shape(given: Sequence[int], text: str) -> tuple[int, int]:
    """(queries, keys) of a call over a layout whose text, before or after, has no queries.

    Without a grid they are `UNKNOWN`.
    """
    if len(given) == len(NO_GRID):
        frames, height, width, before, after = given
        total = frames * height * width + before + after
        return total - (before if text == "before" else after), total
    sizes = [n if f == 0 else f * h * n for f, h, n in zip(*[iter(given[1:])] * 3, strict=True)]
    return sum(sizes) - sizes[0 if text == "before" else -1], sum(sizes)


def is_own_call(shape: tuple[int, int] | None, queries: int, keys: int) -> bool:
    """Whether a call over so many queries and keys is the one that a patch is about.

    Args:
        shape: (queries, keys) of such calls, or `UNKNOWN`; None where they are as many.
        queries: of this call.
        keys: of this call.
    """
    if shape is None:
        return queries == keys
    return shape == (queries, keys) or (shape == UNKNOWN and queries < keys)


def with_silent(q: torch.Tensor, silent: range) -> tuple[torch.Tensor, slice]:
    """Rows in place of the queries that some tokens do not have, and where the others stand."""
    if not silent:
        return q, slice(None)
    if silent.start == 0:
        return torch.nn.functional.pad(q, (0, 0, 0, 0, len(silent), 0)), slice(len(silent), None)
    return torch.nn.functional.pad(q, (0, 0, 0, 0, 0, len(silent))), slice(silent.start)
