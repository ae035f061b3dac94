"""A patch that changes nothing says so, once, or refuses to go on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from diffpatch.errors import DiffpatchError


class NothingSparse(DiffpatchError, RuntimeError):
    """No attention call of a forward ran sparsely, and the patch is strict."""


@dataclass
class Idle:
    """What became of the attention calls of one forward.

    Attributes:
        sparse: calls that ran sparsely.
        waiting: dense ones that are sparse in another step.
        prevented: why others did not, although the schedule asks for it in this step or a later
            one -> how many.
        scheduled: why the schedule keeps the rest dense in every step -> how many.
        beside: (queries, keys) of calls that are not self-attention over all tokens -> how many.
    """

    sparse: int = 0
    waiting: int = 0
    prevented: Counter[str] = field(default_factory=Counter)
    scheduled: Counter[str] = field(default_factory=Counter)
    beside: Counter[tuple[int, int]] = field(default_factory=Counter)

    def dense(self, scheduled: str | None, prevented: str | None, ever: bool) -> None:
        """Note a dense call.

        Args:
            scheduled: why the schedule wants it dense now, or None.
            prevented: why it cannot be sparse, as far as that was found out.
            ever: whether the schedule wants this layer sparse in any step.
        """
        if prevented is not None and (ever or scheduled is None):
            self.prevented[prevented] += 1
        elif ever:
            self.waiting += 1
        elif scheduled is not None:
            self.scheduled[scheduled] += 1

    def why(self, whole: bool) -> str | None:
        """Why nothing of the forward was sparse, in words; None if that is as it should be.

        Args:
            whole: whether every layer was called; a cache may leave out those that are sparse.
        """
        if self.sparse:
            return None
        if self.prevented:
            return "; ".join(f"{count} calls: {why}" for why, count in self.prevented.items())
        if whole and self.scheduled and not self.waiting:
            return f"the schedule leaves every call dense ({', '.join(self.scheduled)})"
        if self.beside and not (self.scheduled or self.waiting):
            said = (f"{n} calls with {q} queries and {k} keys" for (q, k), n in self.beside.items())
            return f"no call is self-attention over the grid: {'; '.join(said)}"
        return None
