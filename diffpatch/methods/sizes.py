"""Sizes that follow from a fraction of the pairs: what is near a wanted fraction on a grid."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, TypeVar

from diffpatch.methods.base import Method, param

M = TypeVar("M", bound=Method)

CLOSE = 0.01  # relative; nearer than this a search ends
TRIES = 12
# Layers and steps to look at: methods that alternate do so within these.
ROUNDS = tuple(itertools.product(range(4), range(4)))

# The parameter of methods whose size is chosen for each grid.
KEPT: Any = param(
    None, "fraction of the visual pairs to keep; sets the size for each grid in its place, or None"
)


def check_kept(method: Any, groups: tuple[Any, ...] = ()) -> None:
    """Check the parameter `kept` of a method.

    Args:
        method: the method.
        groups: settings of groups of heads or layers, beside which one fraction means nothing.
    """
    if method.kept is not None:
        method.check(0 < method.kept <= 1, "kept", "in (0, 1], or None")
        method.check(not groups, "kept", "None where heads or layers have windows of their own")


def nearest(make: Callable[[float], M], share: Callable[[M], float], wanted: float) -> M:
    """The method whose share is nearest to what is wanted.

    Args:
        make: the method of an amount in (0, 1], which keeps more where the amount is larger.
        share: what a method keeps.
        wanted: in (0, 1].
    """
    low, amount, high = 1e-4, wanted, 1.0
    best, misfit = make(amount), math.inf
    for _ in range(TRIES):
        candidate = make(amount)
        found = share(candidate)
        if abs(found - wanted) < misfit:
            best, misfit = candidate, abs(found - wanted)
        if misfit <= CLOSE * wanted:
            break
        low, high = (amount, high) if found < wanted else (low, amount)
        # Close to proportional in most methods, so a scaled guess beats halving where it is inside.
        guess = amount * wanted / found
        amount = guess if low * 1.001 < guess < high / 1.001 else math.sqrt(low * high)
    return best
