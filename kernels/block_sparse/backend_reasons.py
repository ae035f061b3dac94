"""Why a backend cannot compute a call, or not with gradients; None where it can."""

from __future__ import annotations

import torch

from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.gpu import support


def anywhere(q: torch.Tensor, blocks: BlockIndex) -> None:
    """It runs on every device and dtype."""


def differentiable(q: torch.Tensor) -> None:
    """Autograd goes through it."""


def no_gradients(q: torch.Tensor) -> str:
    return "this kernel has no gradients"


def no_gradients_in_8_bits(q: torch.Tensor) -> str:
    return "what is computed in 8 bits has no gradients"


def triton(q: torch.Tensor, blocks: BlockIndex) -> str | None:
    reason = support.unsupported_reason(q.device)
    if reason:
        return reason
    from diffpatch.kernels.block_sparse.gpu import triton_forward

    return triton_forward.unsupported_reason(q, blocks)


def triton_int8(q: torch.Tensor, blocks: BlockIndex) -> str | None:
    reason = triton(q, blocks)
    if reason is None and q.dtype == torch.float32:
        return "scores in 8 bits are for bf16 and fp16, and q is torch.float32"
    return reason


def triton_fp8(q: torch.Tensor, blocks: BlockIndex) -> str | None:
    return triton_int8(q, blocks) or support.fp8_reason(q.device)


def torch_fp8(q: torch.Tensor, blocks: BlockIndex) -> str | None:
    return "this device has no 8-bit floats" if q.device.type == "mps" else None


def triton_gradients(q: torch.Tensor) -> str | None:
    if support.unsupported_reason(q.device):
        return None  # then it cannot run at all
    from diffpatch.kernels.block_sparse.gpu import triton_backward

    return triton_backward.unsupported_reason(q)


def gluon(q: torch.Tensor, blocks: BlockIndex) -> str | None:
    reason = support.unsupported_reason(q.device)
    if reason:
        return reason
    try:
        from diffpatch.kernels.block_sparse.gpu import gluon_forward
    except (ImportError, AttributeError) as error:  # Gluon is experimental and changes
        return f"this Triton has another Gluon: {error}"
    return gluon_forward.unsupported_reason(q, blocks)


def flex(q: torch.Tensor, blocks: BlockIndex) -> str | None:
    from diffpatch.kernels.block_sparse.flex import attend

    return attend.unsupported_reason(q, blocks)


def flex_gradients(q: torch.Tensor) -> str | None:
    from diffpatch.kernels.block_sparse.flex import attend

    return attend.gradient_reason(q)
