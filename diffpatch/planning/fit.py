"""A method set to keep a wanted share of the pairs on a grid, so that methods can be compared."""

from __future__ import annotations

import itertools
import math
from typing import Any

from diffpatch.checking import checked
from diffpatch.errors import BadParameter
from diffpatch.kernels.memo import neutral
from diffpatch.methods.base import Method
from diffpatch.methods.packed import pattern_on
from diffpatch.methods.registry import MethodLike, make_method
from diffpatch.patterns.grid import Grid, as_grid

CLOSE = 0.01  # relative; nearer than this a search ends
TRIES = 12
ROUNDS = range(4)  # layers and steps to look at: methods that alternate do so within these


@checked("method", "grid")
def fit_kept(
    method: MethodLike, grid: Grid | tuple[int, int, int], kept: float, **params: Any
) -> Method:
    """The method with its size set so that a sparse call on `grid` keeps about `kept`.

    Sizes are whole tokens or tiles, so the result is near, not equal: `kept_of` says how near. A
    budget beyond what the method can reach gives the nearest that it can.

    >>> method = fit_kept("neighborhood", (21, 45, 80), 0.25)

    Args:
        method: a name, a combination such as "radial+temporal", or an object. Of an object
            everything stays but its `kept_parameters`.
        grid: where it will run; three numbers are (num_frames, height, width). Between the grids
            of a packed sequence all is kept, which counts.
        kept: wanted fraction of all query-key pairs, text included, in (0, 1].
        **params: other parameters of the method.

    Raises:
        UnknownMethod, BadParameter: the method, the budget or a parameter cannot work.
    """
    if not 0 < kept <= 1:
        raise BadParameter(f"kept={kept} must be a fraction of the pairs in (0, 1]")
    place = as_grid(grid)
    base = make_method(method, **params)
    kind = "image" if place.num_frames == 1 else "video"
    low, amount, high = 1e-4, kept, 1.0
    best, misfit = base, math.inf
    for _ in range(TRIES):
        candidate = base.with_kept(amount, kind)
        share = kept_of(candidate, place)
        if abs(share - kept) < misfit:
            best, misfit = candidate, abs(share - kept)
        if misfit <= CLOSE * kept:
            break
        low, high = (amount, high) if share < kept else (low, amount)
        # Close to proportional in most methods, so a scaled guess beats halving where it is inside.
        guess = amount * kept / share
        amount = guess if low * 1.001 < guess < high / 1.001 else math.sqrt(low * high)
    return best


def kept_of(method: Method, grid: Grid) -> float:
    """Fraction of the pairs that a sparse call keeps: the mean over layers and steps.

    Dense steps and layers, and the refreshes of methods that have such, come on top.
    """
    calls = [method.variant(layer, step) for layer, step in itertools.product(ROUNDS, ROUNDS)]
    with neutral():
        share = {v: method.kept_at(pattern_on(method, grid, v), age=1) for v in set(calls)}
    return sum(share[v] for v in calls) / len(calls)
