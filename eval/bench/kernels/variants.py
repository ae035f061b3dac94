"""Other ways to compute the same block-sparse attention, to be measured beside the usual calls.

Layouts say how tokens get into the order of tiles: "permuted", keys and values are put there in
every call; "gather", the Triton kernel reads them where they are; "ordered", they already are
there, as they would be if a model's tokens were permuted once per forward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch

from diffpatch.eval.bench.case import Tensors
from diffpatch.eval.bench.timing import Call
from diffpatch.kernels.block_sparse.api import block_sparse_attention
from diffpatch.kernels.block_sparse.backends import unsupported_reason
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.gpu import support

LAYOUTS = ("permuted", "gather", "ordered")
LOADS = ("auto", "pointer", "tma")
EIGHT_BITS = ("triton-int8", "triton-fp8")


@dataclass(frozen=True)
class Variants:
    """What to measure besides the calls that a model would make.

    Attributes:
        layouts: of `LAYOUTS`; the torch backend knows "permuted" and "ordered".
        loads: of `LOADS`, for the Triton kernel.
        int8: whether to measure 8-bit scores too, alone and with 8-bit floats for the values.
        gluon: whether to measure the kernel that is scheduled by hand for Hopper.
    """

    layouts: tuple[str, ...]
    loads: tuple[str, ...]
    int8: bool
    gluon: bool = False


def variant_calls(qkv: Tensors, blocks: BlockIndex, variants: Variants) -> dict[str, Call]:
    """The other ways to compute the same that run on these tensors; "… ordered" in tile order."""
    ordered, in_order = qkv, blocks
    calls: dict[str, Call] = {}
    if "ordered" in variants.layouts:
        q, k, v = (x[:, blocks.order] for x in qkv)
        ordered = q, k, v
        in_order = replace(blocks, order=torch.arange(blocks.num_tokens, device=blocks.device))
        # As a model would: where the Triton kernel runs, the slower one of PyTorch is not asked.
        if qkv[0].device.type != "cuda" or unsupported_reason(qkv[0], blocks, "triton"):
            calls["torch ordered"] = partial(
                block_sparse_attention, *ordered, in_order, backend="torch"
            )
    if variants.gluon and not unsupported_reason(qkv[0], blocks, "gluon"):
        calls |= _gluon_calls(qkv, blocks)
        if "ordered" in variants.layouts:
            calls["gluon ordered"] = partial(
                block_sparse_attention, *ordered, in_order, backend="gluon"
            )
    for name in ("triton", *EIGHT_BITS):
        if name in EIGHT_BITS and not variants.int8:
            continue
        if unsupported_reason(qkv[0], blocks, name) is not None:
            continue
        for layout, loads in product(variants.layouts, variants.loads):
            if layout == "gather":
                loads = "gather"
            if (name, layout, loads) == ("triton", "permuted", "auto"):
                continue  # what `sparse_calls` has
            tensors, index = (ordered, in_order) if layout == "ordered" else (qkv, blocks)
            call = _triton_call(name, tensors, index, loads)
            if call is not None:
                words = (name, "" if loads in ("auto", "gather") else loads, layout)
                calls[" ".join(word for word in words if word not in ("", "permuted"))] = call
    return calls


def _gluon_calls(qkv: Tensors, blocks: BlockIndex) -> dict[str, Call]:
    """The kernel made for Hopper as it ships, and in other configurations."""
    from diffpatch.kernels.block_sparse.gpu import gluon_forward as kernel

    size = qkv[0].shape[-1]

    def with_config(config: kernel.HopperConfig) -> Call:
        return lambda: kernel.attend_gluon(*qkv, blocks, size**-0.5, None, False, config=config)[0]

    calls = {f"gluon {name}": with_config(c) for name, c in kernel.alternatives(size).items()}
    return {"gluon": partial(block_sparse_attention, *qkv, blocks, backend="gluon")} | calls


def _triton_call(name: str, qkv: Tensors, blocks: BlockIndex, loads: str) -> Call | None:
    """The kernel with keys read in a way of our choice; None if this GPU or dtype has no such."""
    from diffpatch.kernels.block_sparse.gpu import triton_forward as kernel

    q = qkv[0]
    attend = {
        "triton-int8": kernel.attend_triton_int8, "triton-fp8": kernel.attend_triton_fp8
    }.get(name, kernel.attend_triton)  # fmt: skip
    try:
        kernel.configuration(
            q.dtype, q.shape[-1], blocks.max_tile, support.arch(q.device),
            loads=loads, int8=name in EIGHT_BITS, fp8=name == "triton-fp8",
        )  # fmt: skip
    except ValueError:
        return None
    return lambda: attend(*qkv, blocks, q.shape[-1] ** -0.5, None, False, loads=loads)[0]
