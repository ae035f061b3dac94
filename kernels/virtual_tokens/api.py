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

from diffpatch.kernels.bits import pack_words
from diffpatch.kernels.block_sparse.backends import VIRTUAL_TOKENS, choose_backend
from diffpatch.kernels.blocks import NOTHING, BlockIndex
from diffpatch.kernels.merge import merge

# Scores held at a time: a CPU wants them in its cache, a GPU wants large launches.
SCORE_BYTES = {"cpu": 2**20}
SCORE_BYTES_ELSEWHERE = 2**26
LOWEST = -1e30  # finite, so that -inf less the maximum of nothing is -inf
TINY = 1e-30


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
    backend: str = "auto",
) -> VirtualTokens:
    """Pool keys and values over runs of at most `size` tokens of each tile, in tile order.

    Args:
        k: (B, S, K, D), after any rotary embedding.
        v: (B, S, K, D).
        blocks: the tiles.
        size: most tokens a virtual token stands for.
        second_order: whether to keep the variance of the keys.
        key_mask: bool (B, S), True where a key counts.
        backend: "triton", "torch", "reference" (which is torch), or "auto".
    """
    runs = blocks.derived(("runs", size), lambda b: _runs(b, size))
    if choose_backend(VIRTUAL_TOKENS, backend, blocks, k, v) == "triton":
        from diffpatch.kernels.virtual_tokens import triton_impl as kernels

        return VirtualTokens(
            *kernels.pool(k, v, blocks, runs.first, second_order, key_mask), runs.tile
        )
    weight = runs.valid.expand(k.shape[0], *runs.valid.shape)
    if key_mask is not None:
        weight = weight & key_mask[:, runs.index]
    count = weight.sum(-1).float()  # (B, V)
    wide = torch.promote_types(k.dtype, torch.float32)
    share = (weight / count.clamp(min=1)[..., None]).to(wide)[..., None, :]  # (B, V, 1, L)

    def mean(x: torch.Tensor) -> torch.Tensor:
        return (share @ x.flatten(3)).unflatten(3, x.shape[3:])  # (B, V, 1, K, D)

    def gathered(x: torch.Tensor) -> torch.Tensor:
        x = x[:, runs.index].to(wide)  # (B, V, L, K, D)
        return x if key_mask is None else x.masked_fill(~weight[..., None, None], 0.0)

    keys = gathered(k)
    centre = mean(keys)
    variance = None
    if second_order:
        largest = torch.finfo(k.dtype).max
        variance = mean((keys - centre).square())[:, :, 0].clamp(max=largest).to(k.dtype)
    values = mean(gathered(v))[:, :, 0].to(v.dtype)
    return VirtualTokens(centre[:, :, 0].to(k.dtype), values, variance, count.log(), runs.tile)


@dataclass(frozen=True, eq=False)
class _Runs:
    """The runs of tokens that are pooled, on the device of the blocks.

    Attributes:
        index: int64 (V, L), the tokens of each run, as sequence indices.
        valid: bool (V, L), which of them are real.
        tile: int64 (V,), the tile each run lies in.
        first: int32 (V + 1,), where each run begins in tile order.
    """

    index: torch.Tensor
    valid: torch.Tensor
    tile: torch.Tensor
    first: torch.Tensor


def _runs(blocks: BlockIndex, size: int) -> _Runs:
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
    begins = torch.tensor([*first, blocks.num_tokens], dtype=torch.int32)
    return _Runs(*(x.to(blocks.device) for x in (index, valid, torch.tensor(tile), begins)))


def _visits(blocks: BlockIndex) -> tuple[torch.Tensor, torch.Tensor]:
    """bool (P, N, N), which tiles are visited; int64 (S,), the tile of each token."""
    return blocks.mask_map() != NOTHING, blocks.tile_of_place[blocks.place]


def attend_virtual(
    q: torch.Tensor,
    tokens: VirtualTokens,
    blocks: BlockIndex,
    scale: float,
    near: tuple[torch.Tensor, torch.Tensor] | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query to the virtual tokens of the tiles it does not visit.

    Args:
        q: (B, S, H, D).
        tokens: what `pool` made of the keys and values; K heads, K divides H.
        blocks: tiles that a query's tile visits, even partly, are left out.
        scale: the factor on q·k.
        near: the exact part, an output (B, S, H, D) and its log-sum-exp (B, S, H), to be in the
            same softmax; None for the virtual tokens alone.
        backend: "triton", "torch", "reference" (which is torch), or "auto".

    Returns:
        The output (B, S, H, D) and its natural log-sum-exp (B, S, H), fp32 (fp64 for fp64).
    """
    if choose_backend(VIRTUAL_TOKENS, backend, blocks, q, tokens.keys, tokens.values) == "triton":
        from diffpatch.kernels.virtual_tokens import triton_impl as kernels

        # How many runs there are says what they are, so that the key needs no more.
        seen = blocks.derived(
            ("seen runs", len(tokens.tile)),
            lambda b: pack_words(_visits(b)[0][:, :, tokens.tile].flatten(0, 1)),
        )
        return kernels.attend(
            q, tokens.keys, tokens.values, tokens.variance, tokens.log_count, seen, blocks, scale,
            near,
        )  # fmt: skip
    far = _attend_torch(q, tokens, blocks, scale)
    return far if near is None else merge(*near, *far)


def _attend_torch(
    q: torch.Tensor, tokens: VirtualTokens, blocks: BlockIndex, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Everything in fp32: scores are few, and 16-bit products would be converted again anyway."""
    batch, length, heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = heads // tokens.keys.shape[2]

    def of_heads(x: torch.Tensor) -> torch.Tensor:
        return x.to(wide).transpose(1, 2).repeat_interleave(groups, 1)  # (B, H, V, D)

    k, v = of_heads(tokens.keys).mT * scale, of_heads(tokens.values)
    spread = None if tokens.variance is None else of_heads(tokens.variance).mT * (0.5 * scale**2)
    log_count = tokens.log_count.to(wide)[:, None, None, :]  # (B, 1, 1, V)
    visits, tile_of = blocks.derived("visits", _visits)
    hidden = torch.zeros(visits[:, :, tokens.tile].shape, dtype=wide, device=q.device)
    hidden.masked_fill_(visits[:, :, tokens.tile], float("-inf"))  # (P, N, V)
    held = SCORE_BYTES.get(q.device.type, SCORE_BYTES_ELSEWHERE)
    rows = max(1, held // (wide.itemsize * batch * heads * v.shape[2]))
    out, lse = torch.empty_like(q), q.new_empty(batch, length, heads, dtype=wide)
    for begin in range(0, length, rows):
        piece = slice(begin, min(begin + rows, length))
        x = q[:, piece].transpose(1, 2).to(wide)  # (B, H, R, D)
        bias = hidden[:, tile_of[piece]]  # (P, R, V)
        if blocks.head_pattern is not None:
            bias = bias[blocks.head_pattern.long()]
        scores = x @ k
        if spread is not None:
            scores = scores + torch.minimum(x.square() @ spread, log_count.clamp(min=0))
        scores = (scores + log_count).add_(bias)
        # Constant for the gradients: the maximum drops out of what follows.
        top = scores.detach().amax(-1, keepdim=True).clamp(min=LOWEST)
        weights = scores.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        out[:, piece] = ((weights @ v) / total.clamp(min=TINY)).transpose(1, 2).to(q.dtype)
        lse[:, piece] = (total.log() + top)[..., 0].transpose(1, 2)
    return out, lse
