"""The first half of an attention call: whether it is sparse, and over which pattern."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from diffpatch.kernels.block_sparse.backends import unsupported_reason
from diffpatch.kernels.errors import BackendUnavailable
from diffpatch.kernels.memo import Memo
from diffpatch.methods.base import Method
from diffpatch.methods.packed import pattern_on
from diffpatch.patching.attention import parallel
from diffpatch.patching.attention.layout import NO_GRID, Numbers, layout, silent_tokens
from diffpatch.patterns.grid import Grid, PackedGrid, TokenGrid
from diffpatch.patterns.packed import without_queries
from diffpatch.patterns.pattern import BlockPattern
from diffpatch.pipelines.families.grids import REST

DENSE_FROM = 1.0  # patterns that keep this much run dense: skipping nothing only costs


class Question(NamedTuple):
    """What a decision depends on, beside the grid and the method.

    Attributes:
        shape: of the queries, (B, S, H, D), with the heads at hand; S as there are keys.
        dtype: of the queries.
        device: of the queries.
        variant: what the pattern depends on besides the grid.
        masked: whether the model brings a mask.
        biased: whether that mask adds to scores.
        learned: whether the layer has learned weights.
        rank: of this process among those that share the heads.
        parts: how many share the heads.
        ranks: from how many processes the sequence was joined.
        deal: in which order the heads were shared out, None for their own.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    variant: Hashable
    masked: bool
    biased: bool
    learned: bool
    rank: int
    parts: int
    ranks: int
    deal: parallel.Deal | None = None


@dataclass(frozen=True, eq=False)
class Decision:
    """What is done with the calls that a question is about.

    Attributes:
        dense: why they are dense, None if they are sparse.
        pattern: what they compute, on the heads at hand.
        order: the places of the grid's tokens, and of the sequence's in the grid, where the
            sequence is in another order.
        silent: tokens that have keys and no queries.
    """

    dense: str | None = None
    pattern: BlockPattern | None = None
    order: tuple[torch.Tensor, torch.Tensor] | None = None
    silent: range = range(0)


@dataclass(frozen=True)
class Decider:
    """How one transformer's calls are decided.

    Attributes:
        method: what was asked for.
        backend: what was asked for.
        text: where the text stands in the sequence, as in `FamilyInfo`.
        text_queries: whether the text asks, too, as in `FamilyInfo`.
    """

    method: Method
    backend: str
    text: str
    text_queries: bool

    def decide(self, shape: Numbers, question: Question, memo: Memo) -> Decision:
        """The decision about a grid, from the memo of that grid or made now."""
        return memo((self.text, question), lambda: self._decide(shape, question, memo))

    def deal(
        self, shape: Numbers, variant: Hashable, heads: int, ranks: int, memo: Memo
    ) -> parallel.Deal | None:
        """How heads are shared out. Text costs them all the same, so the grid alone decides."""

        def make() -> parallel.Deal | None:
            frames, height, width = shape[:3]
            pattern = pattern_on(self.method, TokenGrid(frames, height, width), variant)
            return parallel.deal(pattern.for_heads(heads), ranks)

        return memo(("deal", variant, heads, ranks), make)

    def _decide(self, shape: Numbers, question: Question, memo: Memo) -> Decision:
        found = self._grid(shape, question)
        if isinstance(found, str):
            return Decision(found)
        pattern = memo(
            ("pattern", found, question.variant),
            lambda: pattern_on(self.method, found, question.variant),
        )
        heads = question.shape[2]
        pattern = pattern.for_heads(heads * question.parts)
        pattern = parallel.of_heads(pattern, heads, question.rank, question.parts, question.deal)
        grids = found.grids if isinstance(found, PackedGrid) else (found,)
        if pattern.kept >= DENSE_FROM and not any(map(self.method.changes_whole, grids)):
            return Decision("; ".join(dict.fromkeys(map(self.method.why_whole, grids))))
        like = torch.empty((), dtype=question.dtype, device=question.device).expand(question.shape)
        reason = unsupported_reason(like, pattern.on(question.device), self.backend)
        if reason is not None:  # "auto" always finds one
            raise BackendUnavailable(
                f"backend {self.backend!r} cannot run: {reason}; use backend='auto'"
            )
        if question.learned and (question.ranks > 1 or question.biased):
            reason = "learned weights know neither shared heads nor biased keys"
        if reason is not None:
            return Decision(reason)
        order = parallel.order(pattern, self.text, question.ranks, question.device)
        silent = range(0) if self.text_queries else silent_tokens(found, self.text)
        if silent:
            pattern = without_queries(pattern, silent)
        return Decision(None, pattern, order, silent)

    def _grid(self, shape: Numbers, question: Question) -> Grid | str:
        """Where the tokens of the sequence stand, or why it must be dense."""
        if len(shape) == len(NO_GRID) and shape[3] == REST and question.masked:
            return "prompts of different lengths in one batch"
        grid = layout(shape, question.shape[1])
        if isinstance(grid, str):
            return grid
        if grid.num_frames == 1 and "image" not in self.method.kinds:
            return f"{self.method.name} saves between frames and there is one"
        beside = grid.num_tokens > grid.visual_tokens or isinstance(grid, PackedGrid)
        if question.ranks > 1 and beside and self.text == "unknown":
            return "how the processes cut the tokens around the grid is not known"
        return grid
