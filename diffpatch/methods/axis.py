"""Rules along one axis as boolean masks [query, key], and sizes as users write them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, TypeVar

import torch

from diffpatch.errors import BadParameter

Value = TypeVar("Value")

# A size along an axis: an int in tokens, a float as a fraction of the axis, -1 for the whole axis.
Size = int | float
# What is one for all axes, one for each, or for height and width alone: time has no limit then.
Sizes = Annotated[
    Size | tuple[Size, Size] | tuple[Size, Size, Size],
    "one number or three: (time, height, width); two are (height, width)",
]
Flags = Annotated[
    bool | tuple[bool, bool] | tuple[bool, bool, bool],
    "true or false, for all axes or for each: (time, height, width); two are (height, width)",
]
Counts = int | tuple[int, int] | tuple[int, int, int]
SIZES = "a count ≥ 1, a fraction in (0, 1], or -1 for the whole axis; or two or three such"

PAIRED = 4  # tiles of an axis from which on neighbours share windows


def triple(
    value: Value | tuple[Value, Value] | tuple[Value, Value, Value], time: Value
) -> tuple[Value, Value, Value]:
    """What is one for all axes, for each, or (height, width), for each of them.

    Args:
        value: as users write it.
        time: for time, where there is one for height and width alone.
    """
    if not isinstance(value, tuple):
        return value, value, value
    return value if len(value) == 3 else (time, *value)


def sizes(value: Sizes) -> tuple[Size, Size, Size]:
    """A size for each axis."""
    return triple(value, -1)


def are_sizes(value: Sizes) -> bool:
    """Whether all are what `SIZES` says."""
    return all(
        size == -1 or (isinstance(size, int) and size >= 1) or 0 < size <= 1
        for size in sizes(value)
    )


def each(values: Iterable[int]) -> tuple[int, int, int]:
    """Exactly three values, one an axis."""
    t, h, w = values
    return t, h, w


def resolve(size: Size, length: int, what: str) -> int:
    """Tokens along an axis of `length` that a size means; an axis of one token leaves no choice.

    Raises:
        BadParameter: the size exceeds the axis or is not positive.
    """
    if size == -1 or length == 1:
        return length
    if isinstance(size, float):
        if not 0 < size <= 1:
            raise BadParameter(
                f"{what}={size} as a fraction must be in (0, 1]; write an int for tokens"
            )
        return max(1, round(size * length))
    if not 1 <= size <= length:
        raise BadParameter(
            f"{what}={size} must be between 1 and the axis length {length};"
            " use -1 for the whole axis or a fraction such as 0.5"
        )
    return size


def part(share: float) -> Size:
    """The fraction to cut an axis by, so that a position sees that share of it on average.

    Cut by a fraction f into n whole windows and a smaller one, an axis keeps n·f² + (1 − n·f)².

    >>> part(0.5), part(1.0)
    (0.5, -1)
    """
    n = math.ceil(1 / share - 1e-9) - 1
    if n == 0:
        return -1
    return (n + math.sqrt(max(n * (share * (n + 1) - 1), 0.0))) / (n * (n + 1))


def box(
    shares: Sequence[Mapping[int, float]], share: float, even: float = 0.05
) -> tuple[int, int, int]:
    """Sizes along the axes that together see about a share of everything.

    Args:
        shares: for each axis the sizes there are, and the share of the axis that each sees.
        share: wanted.
        even: what unequal shares along the axes cost, beside a product that misses the share.
    """
    t, h, w = (torch.tensor([*axis.values()], dtype=torch.float64).log() for axis in shares)
    t, h, w = t[:, None, None], h[:, None], w
    most = torch.maximum(torch.maximum(t, h), w)
    least = torch.minimum(torch.minimum(t, h), w)
    misfit = (t + h + w - math.log(share)).abs() + even * (most - least)
    near = (misfit * 1e9).round()  # of equal ones the first, whatever the rounding
    best = torch.unravel_index(near.argmin(), near.shape)
    return each([*axis][int(i)] for axis, i in zip(shares, best, strict=True))


def neighborhood(
    length: int, window: int, stride: int = 1, dilation: int = 1, causal: bool = False
) -> torch.Tensor:
    """Generalized Neighborhood Attention along one axis, exactly (arXiv 2504.16922).

    Positions fall into `dilation` interleaved groups that do not see each other. Within a group,
    queries of one stride share the window of their leader; windows are shifted inwards at the
    edges, so that every query sees exactly `window` keys (fewer on a causal axis).

    Returns:
        bool (length, length), [query, key].
    """
    if window * dilation > length:
        raise BadParameter(
            f"window={window} × dilation={dilation} exceeds the axis length {length}"
        )
    if not 1 <= stride <= window:
        raise BadParameter(f"stride={stride} must be between 1 and the window {window}")
    position = torch.arange(length)
    group, index = position % dilation, position // dilation
    size = (length - group + dilation - 1) // dilation  # tokens in the group of each position
    if causal:
        leader = torch.minimum(index // stride * stride + stride - 1, size - 1)
        start = (leader - window + 1).clamp(min=0)
        end = torch.minimum(index + 1, size)
    else:
        leader = torch.minimum(index // stride * stride + stride // 2, size - 1)
        left = window // 2
        right = left + window % 2 - 1
        start = (leader - left).clamp(min=0)
        start = start - (leader + right - size + 1).clamp(min=0)
        end = start + window
    same = group[:, None] == group[None, :]
    return same & (index[None, :] >= start[:, None]) & (index[None, :] < end[:, None])


def partition(borders: Sequence[int]) -> torch.Tensor:
    """Pairs of positions between the same two borders: bool (length, length)."""
    position = torch.arange(borders[-1])
    part = torch.bucketize(position, torch.tensor(borders[1:-1]), right=True)
    return part[:, None] == part[None, :]


def tile_windows(count: int, size: int) -> torch.Tensor:
    """Windows of `size` of the `count` tiles of an axis, shifted inwards.

    Pairs of tiles share their window, so that kernels meet more queries with the same keys; single
    tiles do where the window is one tile, or the axis has too few tiles to give up so much of it.

    Returns:
        bool (count, count), [query tile, key tile].
    """
    out = torch.zeros(count, count, dtype=torch.bool)
    pair = 2 if size > 1 and count >= PAIRED else 1
    for first, last in itertools.pairwise((*range(0, count, pair), count)):
        start = min(max(round((first + last - size) / 2), 0), count - size)
        out[first:last, start : start + size] = True
    return out
