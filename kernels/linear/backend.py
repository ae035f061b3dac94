"""Which implementation of a linear form runs: a Triton kernel where it can, else PyTorch."""

from __future__ import annotations

import torch

from diffpatch.kernels.block_sparse import api as block_sparse
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.errors import BackendUnavailable


def choose_kernel(blocks: BlockIndex, backend: str, *inputs: torch.Tensor) -> str:
    """ "triton", "torch" or "reference".

    Args:
        blocks: the tiles.
        backend: one of these, or "auto" for triton where it can and pays, else torch. In fp32 it
            does not pay: without tensor cores cuBLAS, which torch uses, is as fast.
        inputs: the tensors of the call (B, S, H, D). The kernels have no gradients.

    Raises:
        BackendUnavailable: triton was asked for and cannot run here; the message says why.
    """
    if backend in ("torch", "reference"):
        return backend
    found = (block_sparse.unsupported_reason(x, blocks, "triton") for x in inputs)
    reason = next((x for x in found if x), None)
    if reason is None and torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        reason = "these kernels have no gradients"
    if backend == "auto":
        wide = any(x.dtype.itemsize > 2 for x in inputs)
        return "torch" if reason or wide else "triton"
    if reason:
        raise BackendUnavailable(f"backend {backend!r} cannot run: {reason}; use backend='auto'.")
    return "triton"
