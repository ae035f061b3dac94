"""Virtual tokens: runs of keys stand for themselves by their mean, in the same softmax.

With k̄, v̄ the means and n the count of a run, its keys together contribute
``exp(s q·k̄ + log n + w) v̄``, the expansion of their exponentials around the mean: the first order
cancels, and ``w = ½ s² Σ_c q_c² var_c`` is the (diagonal) second order, capped at log n because
outlier channels would otherwise blow it up (PISA, arXiv 2602.01077; the cap and the second order:
PWT). Attention to virtual tokens and attention to exact tiles share one softmax by merging their
log-sum-exps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffpatch.kernels.blocks import BlockIndex

# Scores held at a time: a CPU wants them in its cache, a GPU wants large launches.
SCORE_BYTES = {"cpu": 2**20}
SCORE_BYTES_ELSEWHERE = 2**26


@dataclass(frozen=True, eq=False)
class VirtualTokens:
    """Pooled keys and values of every run of tokens.

    Attributes:
        keys: (B, V, K, D), means in the dtype of the keys.
        values: (B, V, K, D).
        variance: (B, V, K, D), of each key channel within its run, or None.
        log_count: fp32 (B, V), log of the tokens a run stands for; -inf where all are masked.
        tile: int64 (V,), the tile each run lies in.
    """

    keys: torch.Tensor
    values: torch.Tensor
    variance: torch.Tensor | None
    log_count: torch.Tensor
    tile: torch.Tensor


def pool(
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    size: int,
    *,
    second_order: bool = True,
    key_mask: torch.Tensor | None = None,
) -> VirtualTokens:
    """Pool keys and values over runs of at most `size` tokens of each tile, in tile order.

    Args:
        k: (B, S, K, D), after any rotary embedding.
        v: (B, S, K, D).
        blocks: the tiles.
        size: most tokens a virtual token stands for.
        second_order: whether to keep the variance of the keys.
        key_mask: bool (B, S), True where a key counts.
    """
    index, valid, tile = blocks.derived(("runs", size), lambda b: _runs(b, size))
    weight = valid.expand(k.shape[0], *valid.shape)
    if key_mask is not None:
        weight = weight & key_mask[:, index]
    count = weight.sum(-1).float()  # (B, V)
    share = (weight / count.clamp(min=1)[..., None]).to(k.dtype)[..., None, None]  # (B, V, L, 1, 1)
    gathered = k[:, index]
    mean = (gathered * share).float().sum(2)
    variance = None
    if second_order:
        spread = (gathered.float() - mean[:, :, None]).square()
        variance = (spread * share.float()).sum(2).to(k.dtype)
    values = (v[:, index] * share).float().sum(2).to(v.dtype)
    return VirtualTokens(mean.to(k.dtype), values, variance, count.log(), tile)


def _runs(blocks: BlockIndex, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sequence indices (V, L) of each run, which of them are real, and the tile (V,) of the run."""
    starts = blocks.starts.cpu().long()
    first, last, tile = [], [], []
    for i, (a, b) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        parts = -(-(b - a) // size)
        cuts = [a + (b - a) * p // parts for p in range(parts + 1)]
        first += cuts[:-1]
        last += cuts[1:]
        tile += [i] * parts
    place = torch.tensor(first)[:, None] + torch.arange(size)
    valid = place < torch.tensor(last)[:, None]
    index = blocks.order.cpu()[place.clamp(max=blocks.num_tokens - 1)]
    device = blocks.device
    return index.to(device), valid.to(device), torch.tensor(tile, device=device)


def _visits(blocks: BlockIndex) -> tuple[torch.Tensor, torch.Tensor]:
    """bool (P, N, N), which tiles are visited; int64 (S,), the tile of each token."""
    count = blocks.num_tiles
    rows = torch.repeat_interleave(
        torch.arange(blocks.full_end.shape[0], device=blocks.device), blocks.row_ptr.diff().long()
    )
    visits = torch.zeros(blocks.num_patterns * count, count, dtype=torch.bool, device=blocks.device)
    visits[rows, blocks.cols.long()] = True
    tile = torch.repeat_interleave(
        torch.arange(count, device=blocks.device), blocks.starts.diff().long()
    )
    return visits.view(-1, count, count), torch.empty_like(tile).scatter_(0, blocks.order, tile)


def attend_virtual(
    q: torch.Tensor, tokens: VirtualTokens, blocks: BlockIndex, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query to the virtual tokens of the tiles it does not visit.

    Args:
        q: (B, S, H, D).
        tokens: what `pool` made of the keys and values; K heads, K divides H.
        blocks: tiles that a query's tile visits, even partly, are left out.
        scale: the factor on q·k.

    Returns:
        The output (B, S, H, D) and its natural log-sum-exp fp32 (B, S, H).
    """
    batch, length, heads, _ = q.shape
    visits, tile_of = blocks.derived("visits", _visits)
    pattern = torch.zeros(heads, dtype=torch.long, device=q.device)
    if blocks.head_pattern is not None:
        pattern = blocks.head_pattern.long()
    groups = heads // tokens.keys.shape[2]
    k, v = (x.transpose(1, 2).repeat_interleave(groups, 1) for x in (tokens.keys, tokens.values))
    spread = tokens.variance
    if spread is not None:
        spread = spread.transpose(1, 2).repeat_interleave(groups, 1)
    cap = tokens.log_count[:, None, None, :]  # (B, 1, 1, V)
    held = SCORE_BYTES.get(q.device.type, SCORE_BYTES_ELSEWHERE)
    rows = max(1, held // (4 * batch * heads * k.shape[2]))
    out, lse = torch.empty_like(q), q.new_empty(batch, length, heads, dtype=torch.float32)
    for begin in range(0, length, rows):
        piece = slice(begin, min(begin + rows, length))
        queries = q[:, piece].transpose(1, 2)  # (B, H, R, D)
        scores = (queries @ k.transpose(-1, -2)).float() * scale + cap
        if spread is not None:
            second = (queries.square() @ spread.transpose(-1, -2)).float() * (0.5 * scale**2)
            scores = scores + torch.minimum(second, cap.clamp(min=0))
        seen = visits[:, tile_of[piece]][:, :, tokens.tile]  # (P, R, V)
        scores = scores.masked_fill(seen[pattern], float("-inf"))
        total = scores.logsumexp(-1)  # (B, H, R)
        safe = total.masked_fill(total == float("-inf"), 0.0)
        weights = (scores - safe[..., None]).exp()
        out[:, piece] = (weights.to(v.dtype) @ v).transpose(1, 2)
        lse[:, piece] = total.transpose(1, 2)
    return out, lse


def merge(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two attentions over disjoint keys as one softmax over both.

    Args:
        out: (B, S, H, D).
        lse: natural log-sum-exp (B, S, H); -inf where nothing was seen.
        other: like out.
        other_lse: like lse.

    Returns:
        The joint output in the dtype of `out` and its log-sum-exp.
    """
    total = torch.logaddexp(lse, other_lse)
    safe = total.masked_fill(total == float("-inf"), 0.0)
    a, b = ((x - safe).exp()[..., None] for x in (lse, other_lse))
    return (out * a + other * b).to(out.dtype), total
