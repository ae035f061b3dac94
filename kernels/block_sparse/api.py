"""Block-sparse attention: one function over all backends."""

from __future__ import annotations

from typing import Literal, overload

import torch

from diffpatch.kernels.block_sparse.backends import ROWS, run
from diffpatch.kernels.block_sparse.operators import BLOCK_SPARSE
from diffpatch.kernels.block_sparse.work import Work
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.errors import BadParameter

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@overload
def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> torch.Tensor: ...


@overload
def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]: ...


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention that computes only the query-key pairs a block index keeps.

    The softmax is kept in fp32, results are the same in every run, and queries that see no key
    give 0.

    Args:
        q: (B, S, H, D), fp32, bf16 or fp16 (torch and reference also fp64), any strides.
        k: (B, S, K, D) like q, where K divides H: query head h reads key head ``h * K // H``.
        v: (B, S, K, D) like k.
        blocks: which pairs to keep, on the device of q.
        scale: the factor on q·k, above 0; None means 1 / sqrt(D).
        key_mask: bool (B, S), True where a key may be attended to; None allows all.
        return_lse: whether to return the log-sum-exp of each query's scores as well.
        backend: "triton", "torch", "reference", "flex" (FlexAttention, compiled by torch; tiles
            are padded to whole blocks of 128, see `flex.layout`), or "gluon", a kernel scheduled by
            hand for Hopper GPUs, without gradients. With "triton-int8" scores are computed from
            queries and smoothed keys in 8 bits, which costs some accuracy (see `int8.levels`) and
            has no gradients; with "triton-fp8" weights and values are 8-bit floats besides (see
            `fp8.levels`), on compute capability 8.9 and above. "torch-int8" and "torch-fp8" round
            the same way on any device, to see what it does to quality, and gain no time. "auto"
            never takes these four. On GPUs it compares the others once and takes the fastest that
            is right (see `chooser`); where it does not, triton where that can, else torch. Where
            what it took fails, the next takes over.

    Returns:
        The output (B, S, H, D) in the dtype of q; with `return_lse` also the natural log-sum-exp,
        fp32 (fp64 for fp64) (B, S, H), -inf for queries that see no key.

    Raises:
        BadParameter: an argument does not fit; the message names it.
        BackendUnavailable: the backend asked for cannot run here; the message says why.
    """
    out, lse, _ = attend(
        q, k, v, blocks, scale=scale, key_mask=key_mask, return_lse=return_lse, backend=backend
    )
    return (out, lse) if return_lse and lse is not None else out


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None, str]:
    """`block_sparse_attention`, which also says what computed it.

    Returns:
        The output, its log-sum-exp if asked for, and the backend.
    """
    _check_tensors(q, k, v)
    _check_blocks(q, blocks, key_mask)
    if scale is not None and not scale > 0:
        raise BadParameter(f"scale is {scale}, expected a positive number or None for 1 / sqrt(D).")
    factor = q.shape[-1] ** -0.5 if scale is None else scale

    def compute(name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        return ROWS[name].attend(q, k, v, blocks, factor, key_mask, return_lse)

    (out, lse), used = run(BLOCK_SPARSE, backend, blocks, (q, k, v), compute)
    return out, lse, used


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if q.ndim != 4:
        raise BadParameter(
            f"q has shape {tuple(q.shape)}, expected (batch, tokens, heads, head size)."
        )
    if q.dtype not in DTYPES:
        raise BadParameter(f"q is {q.dtype}, expected one of {', '.join(map(str, DTYPES))}.")
    batch, tokens, heads, size = q.shape
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype or x.device != q.device:
            raise BadParameter(
                f"{name} is {x.dtype} on {x.device} but q is {q.dtype} on {q.device}."
            )
        fits = x.ndim == 4 and x.shape[:2] == q.shape[:2] and x.shape[3] == size
        if not fits or x.shape[2] == 0 or heads % x.shape[2] or x.shape != k.shape:
            raise BadParameter(
                f"{name} has shape {tuple(x.shape)}, expected ({batch}, {tokens}, K, {size}) "
                f"like q {tuple(q.shape)}, with one K for k and v that divides {heads}."
            )


def _check_blocks(q: torch.Tensor, blocks: BlockIndex, key_mask: torch.Tensor | None) -> None:
    batch, tokens, heads, _ = q.shape
    if blocks.device != q.device:
        raise BadParameter(f"blocks is on {blocks.device} but q on {q.device}; move it with .to().")
    blocks.validate()
    if blocks.num_tokens != tokens:
        raise BadParameter(f"blocks covers {blocks.num_tokens} tokens but q has {tokens}.")
    if blocks.head_pattern is not None and blocks.head_pattern.shape[0] != heads:
        raise BadParameter(
            f"blocks.head_pattern names {blocks.head_pattern.shape[0]} heads but q has {heads}."
        )
    if key_mask is None:
        return
    if key_mask.shape != (batch, tokens) or key_mask.dtype != torch.bool:
        raise BadParameter(
            f"key_mask is {key_mask.dtype} {tuple(key_mask.shape)}, "
            f"expected bool ({batch}, {tokens}), True where a key may be attended to."
        )
    if key_mask.device != q.device:
        raise BadParameter(f"key_mask is on {key_mask.device} but q on {q.device}.")


def work_of(blocks: BlockIndex, backend: str = "torch") -> Work:
    """The work of block-sparse attention without gradients or key masks, on a CPU for "torch".

    Args:
        blocks: the pairs to keep.
        backend: one of `BACKENDS` but "auto".
    """
    count = ROWS[backend].count
    return blocks.derived(("work", count), count)
