"""The spans of sequences that pack several videos, read off the arguments of the forward."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

from diffpatch.pipelines.families.grids import Arguments, GridReading, Spans, once

Shape = tuple[int, int, int]  # (num_frames, height, width)
SHORT = 3  # frames from which on a reference is a video, with a grid of its own


def prompt_and_media(model: Any, args: Arguments) -> GridReading | str:
    """A prompt without queries, then videos or images, then sound and actions (Cosmos 3)."""
    if torch.compiler.is_compiling():
        return "the order of a packed sequence cannot be read inside a compiled graph"
    videos = [tuple(shape) for shape in args["vision_token_shapes"]]
    more = [args.get(f"{name}_token_shapes") or [] for name in ("sound", "action")]
    tokens, count = args["und_len"], sum(f * h * w for f, h, w in videos)
    if once(args["vision_sequence_indexes"], _stretch) != [tokens, count, 1]:
        return "the videos do not follow the prompt in one stretch"
    after = sum(shape[0] for shapes in more for shape in shapes)
    if len(videos) == 1:
        return (*videos[0], tokens, after)
    return (tokens, *videos, *([after] if after else []))


def _stretch(index: torch.Tensor) -> list[int]:
    """[first, count, whether the numbers rise by one] of the places of tokens."""
    rising = (index.diff() == 1).all()
    return [int(index[0]), len(index), int(rising)]


def packed_rows(model: Any, args: Arguments) -> GridReading | str:
    """Rows of text, references, audio and videos with ``position_ids`` (S, 3) (MiniMax-H3).

    The video to generate is the last grid. Images and keyframes, grids of one or two frames before
    it, have so few tokens that they stay exact, as do text and audio.
    """
    if torch.compiler.is_compiling():
        return "the rows of a packed sequence cannot be read inside a compiled graph"
    rows = args["video_indices"]
    return once(args["position_ids"], lambda ids: _spans_of_rows(ids.cpu(), rows.cpu()))


def _spans_of_rows(ids: torch.Tensor, rows: torch.Tensor) -> GridReading | str:
    """The spans of a sequence with coordinates (S, 3), of which some rows are frames of video."""
    frames = _frames_of_rows(ids[rows], rows)
    found: list[list[int]] = []  # [first row, frames, height, width] of each grid
    end, clock = -1, math.inf
    for first, time, height, width in frames:
        if first == end and time > clock and found[-1][2:] == [height, width]:
            found[-1][1] += 1
        else:
            found.append([first, 1, height, width])
        end, clock = first + height * width, time
    if not found or sum(f * h * w for _, f, h, w in found) != len(rows):
        return "the video rows are not whole frames"
    parts: list[int | Shape] = []
    at = 0
    for first, count, height, width in found:
        parts += [first - at, (count, height, width)]
        at = first + count * height * width
    return joined([*parts, len(ids) - at])


def joined(parts: Sequence[int | Shape]) -> Spans:
    """The spans of a sequence of parts, each a number of tokens or a grid.

    Grids of fewer than `SHORT` frames, but the last one, count as tokens without a grid, and such
    neighbours are one span.
    """
    last = max(i for i, part in enumerate(parts) if isinstance(part, tuple))
    spans: list[int | Shape] = []
    for i, part in enumerate(parts):
        if isinstance(part, tuple) and part[0] < SHORT and i != last:
            part = math.prod(part)
        if isinstance(part, int) and spans and isinstance(spans[-1], int):
            spans[-1] += part
        elif part:
            spans.append(part)
    return tuple(spans)


def _frames_of_rows(ids: torch.Tensor, rows: torch.Tensor) -> list[tuple[int, float, int, int]]:
    """(first row, time, height, width) of each frame: rows in raster order at one time."""
    if not len(rows):
        return []
    time, row, column = ids.unbind(1)
    new_row = (row.diff() > 0) & (time.diff() == 0)
    inside = (row.diff() == 0) & (column.diff() > 0) & (time.diff() == 0)
    inside = (inside | new_row) & (rows.diff() == 1)
    starts = [0, *((~inside).nonzero().flatten() + 1).tolist(), len(rows)]
    out = []
    for a, b in itertools.pairwise(starts):
        height, width = len(row[a:b].unique()), len(column[a:b].unique())
        if height * width != b - a:
            return []
        out.append((int(rows[a]), float(time[a]), height, width))
    return out
