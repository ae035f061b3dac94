"""A method set to keep a wanted share of the pairs on a grid, so that methods can be compared."""

from __future__ import annotations

from typing import Any

from diffpatch.checking import checked
from diffpatch.errors import BadParameter
from diffpatch.kernels.memo import neutral
from diffpatch.methods.base import Method
from diffpatch.methods.packed import pattern_on
from diffpatch.methods.registry import MethodLike, make_method
from diffpatch.methods.sizes import ROUNDS, nearest
from diffpatch.patterns.grid import Grid, as_grid


@checked("method", "grid")
def fit_kept(
    method: MethodLike, grid: Grid | tuple[int, int, int], kept: float, **params: Any
) -> Method:
    """The method with its size set so that a sparse call on `grid` keeps about `kept`.

    Sizes are whole tokens or tiles, so the result is near, not equal:
    `diffpatch.planning.fit.kept_of` says how near. A fraction beyond what the method can reach
    gives the nearest that it can.

    >>> method = fit_kept("neighborhood", (21, 45, 80), 0.25)

    Args:
        method: a name, a combination such as "radial+temporal", or an object. Of an object
            everything stays but its `kept_parameters`.
        grid: where it will run; three numbers are (num_frames, height, width). Between the grids
            of a packed sequence all is kept, which counts.
        kept: wanted fraction of all query-key pairs, text included, in (0, 1].
        **params: other parameters of the method.

    Raises:
        UnknownMethod, BadParameter: the method, the fraction or a parameter cannot work.
    """
    if not 0 < kept <= 1:
        raise BadParameter(f"kept={kept} must be a fraction of the pairs in (0, 1]")
    place = as_grid(grid)
    base = make_method(method, **params)
    kind = "image" if place.num_frames == 1 else "video"
    return nearest(
        lambda amount: base.with_kept(amount, kind), lambda method: kept_of(method, place), kept
    )


def kept_of(method: Method, grid: Grid) -> float:
    """Fraction of the pairs that a sparse call keeps: the mean over layers and steps.

    Dense steps and layers, and the refreshes of methods that have such, come on top.
    """
    calls = [method.variant(layer, step) for layer, step in ROUNDS]
    with neutral():
        share = {v: method.kept_at(pattern_on(method, grid, v), age=1) for v in set(calls)}
    return sum(share[v] for v in calls) / len(calls)
