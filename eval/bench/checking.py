"""What an output must be before its speed counts: a masked fp64 softmax, on some rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import diffpatch
from diffpatch.eval.bench.case import Tensors
from diffpatch.eval.quality.metrics import relative_l1

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
CHECKED_ROWS = 64


class WrongResult(RuntimeError):
    """A method's output is not what its own pattern says; its speed means nothing."""


def error_on_rows(out: torch.Tensor, qkv: Tensors, pattern: diffpatch.BlockPattern) -> float:
    """The relative L1 distance to a masked fp64 softmax, on some query rows of the first batch."""
    chosen, expected = exact_rows(qkv, pattern)
    return relative_l1(out[0, chosen].to(expected.device), expected)


def exact_rows(qkv: Tensors, pattern: diffpatch.BlockPattern) -> tuple[torch.Tensor, torch.Tensor]:
    """Some query rows of the first batch entry, and the fp64 attention they should have.

    Returns:
        int64 (R,) and fp64 (R, H, D), on the device of q if that knows fp64.
    """
    q = qkv[0][0]
    chosen = torch.randperm(len(q), generator=torch.Generator().manual_seed(0))[:CHECKED_ROWS]
    mask = visible(pattern, chosen, heads=q.shape[1])
    return chosen.to(q.device), attention_of_rows(qkv, chosen, mask)


def attention_of_rows(qkv: Tensors, rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The fp64 attention of some queries of the first batch entry.

    Args:
        qkv: (B, S, H, D) each, or with fewer heads of keys.
        rows: int64 (R,), the queries.
        mask: bool (H, R, S), what they see.

    Returns:
        fp64 (R, H, D), on the device of q if that knows fp64.
    """
    q, k, v = (x[0] for x in qkv)
    device = q.device if q.device.type == "cuda" else torch.device("cpu")
    groups = q.shape[1] // k.shape[1]
    heads = []
    for h in range(q.shape[1]):  # one at a time: fp64 copies of everything would fill the memory
        query = q[rows.to(q.device), h].to(device, torch.float64)
        key, value = (x[:, h // groups].to(device, torch.float64) for x in (k, v))
        seen = mask[h].to(device)
        heads.append(F.scaled_dot_product_attention(query, key, value, attn_mask=seen))
    return torch.stack(heads, 1)


def visible(pattern: diffpatch.BlockPattern, rows: torch.Tensor, heads: int) -> torch.Tensor:
    """bool (H, R, S): the keys that some query rows see, read off the block lists one by one."""
    b = pattern.blocks
    place = torch.empty_like(b.order)
    place[b.order] = torch.arange(len(place))
    starts = b.starts.long()
    seen = torch.zeros(b.num_patterns, len(rows), len(place), dtype=torch.bool)
    for p in range(b.num_patterns):
        for i, where in enumerate(place[rows].tolist()):
            tile = int(torch.searchsorted(starts, where, right=True)) - 1
            line = p * b.num_tiles + tile
            for entry in range(int(b.row_ptr[line]), int(b.row_ptr[line + 1])):
                first, last = starts[b.cols[entry]], starts[b.cols[entry] + 1]
                mask_id = int(b.mask_ids[entry])
                row = b.masks[mask_id, where - starts[tile]] if mask_id >= 0 else None
                keys = b.order[first:last]
                seen[p, i, keys] = True if row is None else row[: last - first]
    choice = torch.zeros(heads, dtype=torch.long) if b.head_pattern is None else b.head_pattern
    return seen[choice.long()]
