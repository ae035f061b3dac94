"""Virtual tokens in PyTorch, on any device."""

from __future__ import annotations

import itertools

import torch

from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.pieces import Pieces, cut, gathered
from diffpatch.kernels.virtual_tokens.tokens import VirtualTokens

# Scores held at a time: a CPU wants them in its cache, a GPU wants large launches.
SCORE_BYTES = {"cpu": 2**20}
SCORE_BYTES_ELSEWHERE = 2**26
WIDENED_BYTES = 2**19
FUSED_BYTES = 2**21  # of one head, where SDPA holds the rest
LOWEST = -1e30  # finite, so that -inf less the maximum of nothing is -inf
TINY = 1e-30


def pool(
    k: torch.Tensor,
    v: torch.Tensor,
    pieces: Pieces,
    second_order: bool,
    key_mask: torch.Tensor | None,
) -> VirtualTokens:
    """As `virtual_tokens.pool`."""
    keys, variance, count = moments(k, pieces, key_mask, second_order)
    values = moments(v, pieces, key_mask, False)[0]
    if variance is not None:
        variance = variance.clamp(max=torch.finfo(k.dtype).max).to(k.dtype)
    return VirtualTokens(keys.to(k.dtype), values.to(v.dtype), variance, count.log(), pieces)


def moments(
    x: torch.Tensor, pieces: Pieces, key_mask: torch.Tensor | None, second_order: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Moments of tokens over the pieces that they are cut into.

    Args:
        x: queries, keys or values (B, S, K, D).
        pieces: V of them.
        key_mask: bool (B, S), True where a token counts; None counts all. Where none does in a
            piece, its moments are 0.
        second_order: whether to return variances.

    Returns:
        Means (B, V, K, D), fp32 or wider; variances alike, or None; and how many tokens count in
        each piece, fp32 (B, V).
    """
    weight = pieces.valid.expand(x.shape[0], *pieces.valid.shape)
    if key_mask is not None:
        weight = weight & key_mask[:, pieces.index]
    count = weight.sum(-1)
    wide = torch.promote_types(x.dtype, torch.float32)
    share = weight[:, :, None] / count.clamp(min=1)[..., None, None].to(wide)  # (B, V, 1, L)
    hidden = None if pieces.even and key_mask is None else ~weight[..., None]
    rows = gathered(x, pieces).flatten(3)  # (B, V, L, K * D)
    step, lean = len(pieces), False
    if x.device.type == "cpu":  # some at a time, so that what is widened stays in its cache
        step = max(1, WIDENED_BYTES // max(1, rows[:, :1].numel() * wide.itemsize))
        lean = not (torch.is_grad_enabled() and x.requires_grad)
    found: list[tuple[torch.Tensor, ...]] = []
    for first in range(0, len(pieces), step):
        some = slice(first, first + step)
        part = rows[:, some].to(wide)
        if hidden is not None and (step == len(pieces) or bool(hidden[:, some].any())):
            part = part.masked_fill(hidden[:, some], 0.0)
        mean = share[:, some] @ part
        away = torch.sub(part, mean, out=part if lean else None) if second_order else part
        found.append((mean, share[:, some] @ away.square()) if second_order else (mean,))
    means, *others = (
        torch.cat(parts, 1)[:, :, 0].unflatten(2, x.shape[2:]) for parts in zip(*found, strict=True)
    )
    return means, others[0] if others else None, count.float()


def attend(
    q: torch.Tensor,
    tokens: VirtualTokens,
    blocks: BlockIndex,
    scale: float,
    seen: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to virtual tokens alone, in fp32 (fp64 for fp64); a CPU multiplies bf16 as it is.

    Args:
        q: (B, S, H, D).
        tokens: K heads, K divides H.
        blocks: the tiles.
        scale: the factor on q·k.
        seen: bool (B or 1, H or 1, N, V), which pieces each query tile of each head attends to.

    Returns:
        The output (B, S, H, D) and its log-sum-exp (B, S, H).
    """
    wide, heads = torch.promote_types(q.dtype, torch.float32), q.shape[2]
    k, v = (of_heads(x, heads, wide) for x in (tokens.keys, tokens.values))
    spread = None
    if tokens.variance is not None:
        spread = of_heads(tokens.variance, heads, wide).mT * (0.5 * scale**2)
    count = tokens.log_count.to(wide)  # (B, V)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if q.device.type == "cpu" and not needs_grad:
        return _fused(q, k, v, spread, count, blocks, scale, seen)
    return _written_out(q, k, v, spread, count, blocks, scale, seen)


def _written_out(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spread: torch.Tensor | None,
    count: torch.Tensor,
    blocks: BlockIndex,
    scale: float,
    seen: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The softmax step by step, with gradients."""
    batch, length, heads, _ = q.shape
    k = k.mT * scale
    log_count = count[:, None, None, :]  # (B, 1, 1, V)
    hidden = torch.zeros(seen.shape, dtype=k.dtype, device=q.device)
    hidden.masked_fill_(~seen, float("-inf"))
    tile_of = blocks.tile_of_place[blocks.place]
    held = SCORE_BYTES.get(q.device.type, SCORE_BYTES_ELSEWHERE)
    step = max(1, held // (k.dtype.itemsize * batch * heads * v.shape[2]))
    out, lse = torch.empty_like(q), q.new_empty(batch, length, heads, dtype=k.dtype)
    for begin in range(0, length, step):
        rows = slice(begin, min(begin + step, length))
        x = q[:, rows].transpose(1, 2).to(k.dtype)  # (B, H, R, D)
        bias = hidden[:, :, tile_of[rows]]  # (B or 1, H or 1, R, V)
        found, total = softmax_of(scores_of(x, k, spread, log_count).add_(bias), v)
        out[:, rows], lse[:, rows] = found.transpose(1, 2).to(q.dtype), total.transpose(1, 2)
    return out, lse


def of_heads(x: torch.Tensor, heads: int, dtype: torch.dtype) -> torch.Tensor:
    """(B, H, V, D): what every head of queries reads of (B, V, K, D)."""
    return x.to(dtype).transpose(1, 2).repeat_interleave(heads // x.shape[2], 1)


def scores_of(
    x: torch.Tensor, k: torch.Tensor, spread: torch.Tensor | None, log_count: torch.Tensor
) -> torch.Tensor:
    """Scores (B, H, R, V) of queries and virtual tokens, to second order, capped.

    Args:
        x: queries (B, H, R, D).
        k: mean keys (B, H, D, V); the scale is in these or in the queries.
        spread: half of their variances (B, H, D, V), likewise; None for the first order alone.
        log_count: (B, 1, 1, V).
    """
    scores = x @ k
    if spread is not None:
        scores = scores + torch.minimum(x.square() @ spread, log_count.clamp(min=0))
    return scores + log_count


def softmax_of(scores: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The output (B, H, R, D) and the log-sum-exp (B, H, R) of scores, which are written over.

    Scores of -inf hide; where all of them do, the output is 0 and the log-sum-exp -inf.
    """
    # Constant for the gradients: the maximum drops out of what follows.
    top = scores.detach().amax(-1, keepdim=True).clamp(min=LOWEST)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    safe = total.clamp(min=TINY)
    lse = (safe.log() + top).masked_fill(total == 0, -torch.inf)
    return (weights @ values) / safe, lse[..., 0]


def _fused(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spread: torch.Tensor | None,
    count: torch.Tensor,
    blocks: BlockIndex,
    scale: float,
    seen: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts and second order as the bias of SDPA calls, for one head and some tiles each.

    Products of bf16 are left to the CPU's matrix units, the bias stays wide. The second order is
    then rounded to 8 bits of at most log n, and most of it is far below that.
    """
    batch, length, heads, _ = q.shape
    bias = torch.where(seen, count[:, None, None], -torch.inf).expand(batch, heads, -1, -1)
    blind = bias.amax(-1) == -torch.inf  # (B, H, N)
    bias = bias.masked_fill(blind[..., None], 0.0)
    cap = count.clamp(min=0)
    even, tile_of = cut(blocks).even, blocks.tile_of_place
    step = max(1, FUSED_BYTES // (k.dtype.itemsize * k.shape[2]))
    step = max(1, step // blocks.max_tile) * blocks.max_tile
    out = q.new_empty(batch, heads, length, v.shape[3])
    lse, second = k.new_empty(out.shape[:3]), k.new_empty(min(step, length), k.shape[2])
    if q.dtype == torch.bfloat16:  # what the rest was widened from
        k, v, spread = k.to(q.dtype), v.to(q.dtype), None if spread is None else spread.to(q.dtype)
    x = q.index_select(1, blocks.order).transpose(1, 2).to(k.dtype).contiguous()
    rounded = second if second.dtype == k.dtype else torch.empty_like(second, dtype=k.dtype)
    for b, h in itertools.product(range(batch), range(heads)):
        for begin in range(0, length, step):
            rows = slice(begin, min(begin + step, length))
            y = x[b, h, rows]
            scores = second[: len(y)]
            if spread is not None:
                products = scores if rounded is second else rounded[: len(y)]
                scores.copy_(torch.matmul(y.square(), spread[b, h], out=products))
                torch.minimum(scores, cap[b], out=scores)
            else:
                scores.zero_()
            if even:  # the tiles of these rows are whole
                first = begin // blocks.max_tile
                of_tiles = scores.view(-1, blocks.max_tile, scores.shape[1])
                of_tiles += bias[b, h, first : first + len(of_tiles), None]
            else:
                # (Selecting rows and adding them beats adding what a table of rows indexes.)
                scores += bias[b, h].index_select(0, tile_of[rows])
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                y[None, None], k[b, h, None, None], v[b, h, None, None],
                attn_mask=scores[None, None], scale=scale,
            )  # fmt: skip
            out[b, h, rows], lse[b, h, rows] = found[0][0, 0], found[1][0, 0]
    if bool(blind.any()):
        of_tokens = blind[:, :, tile_of]
        out.masked_fill_(of_tokens[..., None], 0.0)
        lse.masked_fill_(of_tokens, -torch.inf)
    back = blocks.place
    return (
        out.transpose(1, 2).index_select(1, back),
        lse.transpose(1, 2).index_select(1, back),
    )
