"""What a backend does for a block index, counted before it runs; cost models are made of these."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from diffpatch.kernels.block_sparse.torch_plan.calls import SdpaPlan, plans
from diffpatch.kernels.block_sparse.torch_plan.grouping import ROW_COSTS
from diffpatch.kernels.blocks import BlockIndex

BLOCK_M, BLOCK_N = 128, 64  # of the Triton kernel in 16 bits


@dataclass(frozen=True)
class Work:
    """Counts for one attention call of one head; `calls` are those for all heads together.

    Attributes:
        calls: kernel launches or SDPA calls.
        keys: keys prepared, once for every call that reads them.
        rows: query rows copied or merged.
        pairs: query-key pairs in calls of very many query rows.
        pairs_of_many: the same in calls of some hundreds.
        pairs_of_few: and in smaller ones.
        masked: pairs (of all the above) that pass through an element mask.
        virtual: pairs with virtual tokens, whose scores are written out.
        pooled: tokens pooled into virtual ones.
    """

    calls: float = 0.0
    keys: float = 0.0
    rows: float = 0.0
    pairs: float = 0.0
    pairs_of_many: float = 0.0
    pairs_of_few: float = 0.0
    masked: float = 0.0
    virtual: float = 0.0
    pooled: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self.counts(), other.counts(), strict=True)))

    def counts(self) -> tuple[float, ...]:
        """Every count, in the order of the fields."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @property
    def computed(self) -> float:
        """Query-key pairs whose scores are computed, whether kept or not."""
        return self.pairs + self.pairs_of_many + self.pairs_of_few + self.virtual


KINDS = tuple(field.name for field in fields(Work))


def reference_work(blocks: BlockIndex) -> Work:
    """Every pair, under a mask."""
    pairs = float(blocks.num_tokens) ** 2
    return Work(calls=1, keys=blocks.num_tokens, pairs=pairs, masked=pairs)


def dense_work(tokens: int) -> Work:
    """One dense attention call over that many tokens."""
    return Work(calls=1, keys=tokens, pairs=float(tokens) ** 2)


def torch_work(blocks: BlockIndex) -> Work:
    """Every call of the torch backend's plans."""
    total = Work()
    for plan in plans(blocks, merging=True):
        share = 1.0
        if plan.heads is not None and blocks.head_pattern is not None:
            share = plan.heads.shape[0] / blocks.head_pattern.shape[0]
        total += _scaled(_of_plan(plan, blocks.num_tokens), share)
    return total


def _of_plan(plan: SdpaPlan, tokens: int) -> Work:
    pairs = [0.0] * len(ROW_COSTS)
    keys = masked = 0.0
    for call in plan.calls:
        kind = next(i for i, (least, _) in enumerate(ROW_COSTS) if call.rows >= least)
        area = float(call.stack * call.rows * call.num_keys)
        pairs[kind] += area
        masked += area if call.mask is not None else 0.0
        keys += call.stack * call.num_keys
    merged = sum(band.rows for band in plan.bands if band.common is not None)
    copied = 2 * tokens * (plan.rows is not None) + 2 * tokens * (plan.keys is not None)
    work = Work(calls=len(plan.calls), keys=keys, rows=merged + copied, masked=masked)
    return replace(work, pairs=pairs[0], pairs_of_many=pairs[1], pairs_of_few=pairs[2])


def _scaled(work: Work, share: float) -> Work:
    counts = dict(zip(KINDS, work.counts(), strict=True))
    return Work(**{kind: n * (1.0 if kind == "calls" else share) for kind, n in counts.items()})


def triton_work(blocks: BlockIndex) -> Work:
    """One launch in which every visited tile is filled up to whole blocks."""
    host = blocks.to("cpu")
    high, wide = (-(-host.sizes // block) * block for block in (BLOCK_M, BLOCK_N))
    row = host.rows
    area = high[row % host.num_tiles] * wide[host.cols.long()]
    weighted = area * host.share[row // host.num_tiles]
    tokens = float(host.num_tokens)
    masked = float(weighted[host.mask_ids >= 0].sum())
    return Work(1, tokens, 4 * tokens, float(weighted.sum()), masked=masked)
