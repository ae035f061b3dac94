"""Random, valid block indexes to test kernels with."""

from __future__ import annotations

import torch

from diffpatch.kernels.blocks import BlockIndex


def random_blocks(
    sizes: list[int],
    *,
    kept: float = 0.5,
    partial: float = 0.5,
    edge: int | None = None,
    heads: list[int] | None = None,
    seed: int = 0,
) -> BlockIndex:
    """A block index with tiles of the given sizes and random key lists, masks and token order.

    Args:
        sizes: tokens of each tile.
        kept: the fraction of tile pairs to visit.
        partial: the fraction of those that get one of three element masks, each half True; every
            mask hides its first query row, so that some queries see nothing.
        edge: T, the largest tile allowed; None takes the largest there is.
        heads: the pattern of each head; None makes one pattern for all.
        seed: of the random generator.
    """
    random = torch.Generator().manual_seed(seed)
    tiles, tokens, edge = len(sizes), sum(sizes), edge or max(sizes)
    patterns = 1 if heads is None else max(heads) + 1
    row_ptr, full_end, cols, mask_ids = [0], [], [], []
    masks: dict[tuple[int, int, int], torch.Tensor] = {}
    for row in range(patterns * tiles):
        query = row % tiles
        seen = (torch.rand(tiles, generator=random) < kept).nonzero().flatten().tolist()
        is_partial = torch.rand(tiles, generator=random) < partial
        full = [key for key in seen if not is_partial[key]]
        cols += full
        mask_ids += [-1] * len(full)
        full_end.append(len(cols))
        for key in (key for key in seen if is_partial[key]):
            kind = int(torch.randint(3, (), generator=random))
            shape = (sizes[query], sizes[key], kind)
            if shape not in masks:
                masks[shape] = torch.zeros(edge, edge, dtype=torch.bool)
                drawn = torch.rand(shape[:2], generator=random) < 0.5
                masks[shape][1 : shape[0], : shape[1]] = drawn[1:]
            mask_ids.append(list(masks).index(shape))
            cols.append(key)
        row_ptr.append(len(cols))

    def int32(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    starts = torch.tensor([0, *sizes]).cumsum(0).int()
    stacked = torch.stack([*masks.values()]) if masks else torch.zeros(0, edge, edge).bool()
    return BlockIndex(
        order=torch.randperm(tokens, generator=random),
        starts=starts,
        row_ptr=int32(row_ptr),
        full_end=int32(full_end),
        cols=int32(cols),
        mask_ids=int32(mask_ids),
        masks=stacked,
        head_pattern=None if heads is None else int32(heads),
    )


def random_qkv(
    batch: int,
    tokens: int,
    heads: int,
    size: int,
    dtype: torch.dtype = torch.float32,
    *,
    key_heads: int | None = None,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normal q (batch, tokens, heads, size) and k, v with `key_heads` heads."""
    random = torch.Generator().manual_seed(seed)
    counts = (heads, key_heads or heads, key_heads or heads)
    q, k, v = (torch.randn(batch, tokens, n, size, generator=random).to(dtype) for n in counts)
    return q, k, v


def with_outliers(x: torch.Tensor, channel: int = 3, factor: float = 30.0) -> torch.Tensor:
    """Queries or keys with one channel far larger than the others, as trained models have."""
    return torch.cat(
        [x[..., :channel], x[..., channel : channel + 1] * factor, x[..., channel + 1 :]], -1
    )


# What trained models do to queries and keys that normal noise does not.
HARD_INPUTS = {
    "noise": lambda q, k: (q, k),
    "sharp": lambda q, k: (8.0 * q, k),  # a few keys have all the weight
    "outliers": lambda q, k: (with_outliers(q), with_outliers(k)),
}
