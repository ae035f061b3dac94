"""Context parallelism: one sequence cut over several devices by diffusers' `enable_parallelism`.

Under Ulysses every process holds a part of the tokens and, for the length of an attention call,
exchanges it for all the tokens of a part of the heads. Attention over a grid runs between the two
exchanges, where the sequence is whole. Two things differ there. Joined text and image stand in
pieces: text and image of the first process, then of the second, and so on. And a pattern that
differs between heads must be cut to the heads at hand. Ring attention never has all the keys in one
place; it is refused.

A process whose heads keep less would wait for the others. So heads are dealt out before the
exchange: they are sorted by the pairs they compute, and dealt forth and back, so that the process
that got the most in one round gets the least in the next. For example, take twelve heads on 9×16×24
tokens, three of which see everything and the others windows of 0.9 down to 0.3 of every axis. As
they stand, the busiest of two processes has 1.81 times the mean load (of four, 2.31 times); dealt
out, 1.00 times (1.09). Under torch.compile heads stay where they are.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from diffpatch.errors import DiffpatchError
from diffpatch.patterns.grid import PackedGrid
from diffpatch.patterns.pattern import BlockPattern

Attend = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float | None, int], torch.Tensor
]
Deal = tuple[int, ...]  # the heads in the order in which they are shared out


def context(model_or_processor: Any) -> Any:
    """The `ContextParallelConfig` that is enabled on a model or processor, or None."""
    from diffpatch import internals  # imports diffusers, which takes seconds

    config = getattr(model_or_processor, internals.PARALLEL, None)
    return getattr(config, "context_parallel_config", None)


def check(model: Any, processors: list[Any]) -> None:
    """Refuse what would compute something else than attention over the whole sequence.

    Raises:
        DiffpatchError: ring attention is on, or a processor does not know that the sequence is cut.
    """
    config = context(model)
    if config is None:
        return
    if config.ring_degree > 1:
        raise DiffpatchError(
            f"ring attention is on (ring_degree={config.ring_degree}), which never has all the keys"
            " in one place: use ContextParallelConfig(ulysses_degree=…), or unpatch(pipe) first"
        )
    unaware = [type(p).__name__ for p in processors if context(p) is None]
    if unaware:
        raise DiffpatchError(
            f"{type(model).__name__} is cut over several processes, but {len(unaware)} of its"
            f" attention processors ({unaware[0].removeprefix('DiffPatch')}) were not told: they"
            " were set after enable_parallelism, or diffusers cannot cut this model"
        )


def share(model: Any) -> tuple[int, int]:
    """(rank, degree) of this process among those that hold the heads of a model; alone (0, 1)."""
    from diffpatch import internals  # imports diffusers, which takes seconds

    config = getattr(model, internals.PARALLEL, None)
    if config is None:
        return 0, 1
    parts = [
        (getattr(config, "context_parallel_config", None), internals.ULYSSES_MESH),
        (getattr(config, "tensor_parallel_config", None), internals.TENSOR_MESH),
    ]
    for part, name in parts:
        if part is not None:
            mesh = getattr(part, name)
            return mesh.get_local_rank(), mesh.size()
    return 0, 1


def through_ulysses(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    parallel_config: Any,
    attend: Attend,
    dealing: AbstractContextManager[Deal | None],
) -> torch.Tensor:
    """One attention call of this process's tokens (B, S / N, H, D) through Ulysses.

    Args:
        q: queries; k, v and mask likewise as the processor passes them.
        k: keys.
        v: values.
        mask: the model's mask, or None.
        scale: the factor on q·k.
        parallel_config: as diffusers passes it.
        attend: (q, k, v, mask, scale, degree) → attention over all tokens of some heads.
        dealing: says for the length of a call in which order the heads are shared out.

    Raises:
        DiffpatchError: gradients are wanted.
    """
    degree = parallel_config.context_parallel_config.ulysses_degree
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise DiffpatchError(
            "training under context parallelism is not supported: unpatch(pipe) first, or train"
            " without enable_parallelism"
        )

    from diffpatch import internals

    def forward(_: Any, q: Any, k: Any, v: Any, mask: Any, *__: Any, **___: Any) -> torch.Tensor:
        return attend(q, k, v, mask, scale, degree)

    with dealing as deal:
        if deal is not None:
            places = torch.tensor(deal, device=q.device)
            q, k, v = (x.index_select(2, places) for x in (q, k, v))
        out = internals.exchange()(
            q, k, v, mask, scale=scale,
            forward_op=forward, backward_op=_no_gradient, _parallel_config=parallel_config,
        )  # fmt: skip
    return out if deal is None else out.index_select(2, places.argsort())


def _no_gradient(*args: Any, **kwargs: Any) -> Any:
    raise DiffpatchError("training under context parallelism is not supported")


def order(
    pattern: BlockPattern, text: str, ranks: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """How to put the tokens that the processes have joined into the order of the grid, and back.

    Args:
        pattern: its grid is that of the whole sequence.
        text: where the stream stands that is cut by itself: "none", "before" or "after"; "packed"
            where the spans are one stream.
        ranks: how many processes there are; each brings its part of every stream.
        device: of the sequence.

    Returns:
        int64 (S,): the places of the grid's tokens, and of the joined ones in the grid; None where
        they stand in order.
    """
    grid = pattern.grid
    if ranks == 1 or text in ("none", "packed") or isinstance(grid, PackedGrid):
        return None  # one stream, cut as it is
    before, visual, after = grid.text_before, grid.visual_tokens, grid.text_after
    streams = [before, visual + after] if text == "before" else [before + visual, after]
    if 0 in streams:
        return None

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        parts = [s.tensor_split(ranks) for s in torch.arange(grid.num_tokens).split(streams)]
        joined = torch.cat([part[rank] for rank in range(ranks) for part in parts]).to(device)
        return joined.argsort(), joined

    return pattern.once(("order", text, ranks, device), make)


def share_of(heads: int, rank: int, ranks: int) -> slice:
    """The places of the heads that one of several processes holds: as many each, the last fewer."""
    each = -(-heads // ranks)
    return slice(min(rank * each, heads), min((rank + 1) * each, heads))


def deal(pattern: BlockPattern, ranks: int) -> Deal | None:
    """How to share out heads so that every process computes about as many pairs.

    Args:
        pattern: of all heads.
        ranks: how many processes share them.

    Returns:
        The heads of the first process, of the second, …; None where heads do not differ.
    """
    per_head = pattern.blocks.head_pattern
    if ranks == 1 or per_head is None:
        return None
    pairs = _pairs(pattern)[per_head.long()]
    if bool((pairs == pairs[0]).all()):
        return None
    places = [share_of(len(per_head), rank, ranks) for rank in range(ranks)]
    room = [place.stop - place.start for place in places]
    hands: list[list[int]] = [[] for _ in range(ranks)]
    back_and_forth = itertools.cycle([*range(ranks), *reversed(range(ranks))])
    for head in pairs.argsort(descending=True, stable=True).tolist():
        rank = next(r for r in back_and_forth if len(hands[r]) < room[r])
        hands[rank].append(head)
    return tuple(head for hand in hands for head in sorted(hand))


def load(pattern: BlockPattern, ranks: int, dealt: Deal | None = None) -> float:
    """Pairs that the busiest process computes, over the mean of all; 1 is in balance."""
    per_head = pattern.blocks.head_pattern
    if per_head is None:
        return 1.0
    pairs = _pairs(pattern)[per_head.long()]
    if dealt is not None:
        pairs = pairs[list(dealt)]
    loads = [pairs[share_of(len(pairs), rank, ranks)].sum() for rank in range(ranks)]
    return float(max(loads) * ranks / pairs.sum())


def of_heads(
    pattern: BlockPattern, heads: int, rank: int, ranks: int, dealt: Deal | None = None
) -> BlockPattern:
    """The pattern of those heads that this process holds.

    Args:
        pattern: of all heads, or one for all of them.
        heads: how many heads this process holds.
        rank: this process.
        ranks: how many share the heads, each the same number but perhaps the last.
        dealt: in which order the heads were shared out, or None for their own.
    """
    per_head = pattern.blocks.head_pattern
    if ranks == 1 or per_head is None:
        return pattern
    ordered = per_head if dealt is None else per_head[list(dealt)]
    first = share_of(len(per_head), rank, ranks).start
    mine = ordered[first : first + heads]

    def make() -> BlockPattern:
        kept = float(_pairs(pattern)[mine.long()].mean() / pattern.grid.num_tokens**2)
        blocks = dataclasses.replace(pattern.blocks, head_pattern=mine)
        return BlockPattern(pattern.grid, blocks, kept)

    return pattern.once(("heads", first, heads, dealt), make)


def _pairs(pattern: BlockPattern) -> torch.Tensor:
    """float64 (P,): query-key pairs of each of the patterns that heads have."""
    sizes = pattern.blocks.sizes.double()
    return (pattern.tile_map() * sizes[:, None] * sizes).sum((1, 2))
