"""Block-sparse attention by FlexAttention, compiled for wherever torch can: CPU, CUDA, ROCm, XPU.

Tokens are put into the padded layout and back, element masks are looked up. On GPUs one compiled
function serves every grid, as its sizes are symbols.
"""

from __future__ import annotations

import functools
import itertools
import logging
import shutil
import sys
import types
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import flex_attention

from diffpatch.kernels.block_sparse.flex.layout import BLOCK, FlexLayout, flex_layout
from diffpatch.kernels.block_sparse.torch_plan.attend import attend_torch
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.gpu.common import MAX_HEAD_SIZE

log = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_HEAD_SIZE = 16  # of a product on a GPU
FLASH = {"BACKEND": "FLASH"}
FLASH_CAPABILITIES = (9, 10)  # major compute capabilities of Hopper and Blackwell

Compiled = Callable[..., Any]
_names = itertools.count()


def unsupported_reason(q: torch.Tensor, blocks: BlockIndex) -> str | None:
    """Why FlexAttention cannot run, or None. Takes the queries (B, S, H, D) and the blocks."""
    if not hasattr(flex_attention, "AuxRequest"):
        return f"FlexAttention of torch {torch.__version__} is too old, that of 2.9 or newer can"
    if q.dtype not in DTYPES:
        return f"FlexAttention computes fp32, bf16 and fp16, and q is {q.dtype}"
    if q.shape[-1] > MAX_HEAD_SIZE:
        return f"the flex backend takes heads up to {MAX_HEAD_SIZE} channels, q has {q.shape[-1]}"
    if q.device.type == "cpu":
        return _cpu_reason()
    if q.device.type not in ("cuda", "xpu"):
        return (
            f"FlexAttention is compiled for CPUs, CUDA, ROCm and XPU, and q is on {q.device.type}"
        )
    if q.shape[-1] < LEAST_HEAD_SIZE:
        return f"FlexAttention on GPUs takes heads from {LEAST_HEAD_SIZE} channels on"
    if "triton" not in sys.modules and not find_spec("triton"):
        return "triton, which FlexAttention is compiled with, is not installed"
    return None


def gradient_reason(q: torch.Tensor) -> str | None:
    """Why there are no gradients for such queries, or None."""
    return "FlexAttention of torch has no gradients on CPUs" if q.device.type == "cpu" else None


def attend_flex(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockIndex,
    scale: float,
    key_mask: torch.Tensor | None,
    return_lse: bool,
    *,
    compiled: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over the kept pairs by FlexAttention.

    Args:
        q: (B, S, H, D), fp32, bf16 or fp16.
        k: (B, S, K, D), where K divides H.
        v: (B, S, K, D).
        blocks: which pairs to keep.
        scale: the factor on q·k, above 0.
        key_mask: bool (B, S), False for keys nobody may attend to, or None. With one, every block
            is masked.
        return_lse: whether to return the log-sum-exp. FlexAttention has none on CPUs: there it
            comes from `attend_torch`, at the cost of that.
        compiled: False computes it unfused, in memory quadratic in the tokens; for tests.

    Returns:
        The output (B, S, H, D) in the dtype of q and, if asked for, the natural log-sum-exp, fp32
        (B, S, H).
    """
    layout = flex_layout(blocks)
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    mask = _block_mask(blocks, layout, q.shape[0], q.shape[2], key_mask, gradients)
    by_flex = return_lse and not (compiled and q.device.type == "cpu")
    inputs = [x.index_select(1, layout.token).transpose(1, 2) for x in (q, k, v)]
    flash = compiled and not gradients and flash_attention_4(q.device)
    options = FLASH if flash and _flash_runs(q.device, q.dtype, q.shape[-1]) else None
    found = _run(inputs, mask, scale, options, by_flex, compiled)
    out, lse = found if by_flex else (found, None)
    out = out.transpose(1, 2).index_select(1, layout.place)
    if not return_lse:
        return out, None
    if lse is None:
        return out, attend_torch(q, k, v, blocks, scale, key_mask, True)[1]
    lse = lse.transpose(1, 2).index_select(1, layout.place)
    return out.masked_fill(lse.isneginf()[..., None], 0.0), lse


def flash_attention_4(device: torch.device) -> bool:
    """Whether FlexAttention can run on the kernels of FlashAttention-4 there."""
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device)[0] in FLASH_CAPABILITIES and _has_flash()


@functools.cache
def _has_flash() -> bool:
    found = find_spec("flash_attn")  # older versions are a package of that name, too
    folders = () if found is None else found.submodule_search_locations or ()
    return any((Path(folder) / "cute").is_dir() for folder in folders)


@functools.cache
def _flash_runs(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Whether FlashAttention-4 compiles there; it is young, and torch and it must fit together."""
    blocks = BlockIndex(
        order=torch.arange(BLOCK),
        starts=torch.tensor([0, BLOCK], dtype=torch.int32),
        row_ptr=torch.tensor([0, 1], dtype=torch.int32),
        full_end=torch.tensor([0], dtype=torch.int32),
        cols=torch.tensor([0], dtype=torch.int32),
        mask_ids=torch.tensor([0], dtype=torch.int32),
        masks=torch.ones(1, BLOCK, BLOCK, dtype=torch.bool).tril(),
    ).to(device)
    q = torch.ones(1, BLOCK, 1, size, dtype=dtype, device=device)
    inputs = [q.transpose(1, 2)] * 3
    mask = _block_mask(blocks, flex_layout(blocks), 1, 1, None, False)
    try:
        _run(inputs, mask, 1.0, FLASH, True, True)
    except Exception as error:  # of any kind: of another compiler, of the driver
        words = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        log.warning("FlexAttention without FlashAttention-4, which failed here: %s", words)
        return False
    return True


@functools.cache
def _cpu_reason() -> str | None:
    if sys.platform == "darwin" or not torch.cpu._is_avx2_supported():
        return "FlexAttention of torch compiles for CPUs with AVX2 only, and not on macOS"
    from torch._inductor import config

    asked = config.cpp.cxx
    compilers = [name for name in (asked if isinstance(asked, tuple) else (asked,)) if name]
    if not any(shutil.which(name) for name in (*compilers, "g++", "clang++", "cl")):
        return "FlexAttention needs a C++ compiler, and there is none"
    return None


def _run(
    inputs: list[torch.Tensor],
    mask: Any,
    scale: float,
    options: dict[str, str] | None,
    with_lse: bool,
    compiled: bool,
) -> Any:
    """FlexAttention of (B, heads, L, D) tensors: the output, or that and the LSE (B, H, L)."""
    if not compiled:
        return _function(with_lse)(*inputs, mask, scale, None)
    q, k, _ = inputs
    kind: tuple[Any, ...] = (q.device.type, q.dtype, q.shape[-1], options is not None)
    if q.device.type == "cpu":
        captured = (cell.cell_contents.shape for cell in mask.mask_mod.__closure__)
        kind += (q.shape, k.shape, *captured)
    return _compiled(with_lse, kind)(*inputs, mask, scale, options)


def _function(with_lse: bool) -> Compiled:
    attend, aux_request = flex_attention.flex_attention, flex_attention.AuxRequest

    def plain(q: Any, k: Any, v: Any, mask: Any, scale: float, options: Any) -> Any:
        return attend(
            q, k, v, block_mask=mask, scale=scale, enable_gqa=True, kernel_options=options
        )

    def both(q: Any, k: Any, v: Any, mask: Any, scale: float, options: Any) -> Any:
        out, aux = attend(
            q, k, v, block_mask=mask, scale=scale, enable_gqa=True, kernel_options=options,
            return_aux=aux_request(lse=True),
        )  # fmt: skip
        return out, aux.lse

    return both if with_lse else plain


@functools.cache
def _compiled(with_lse: bool, kind: tuple[Any, ...]) -> Compiled:
    """The compiled function of a kind of call: a device, a dtype, a head size, on CPUs all shapes.

    torch counts compiled versions by code object and gives up beyond a few, so each kind has its
    own. Sizes are symbols on GPUs, so that all grids share one version; what torch 2.13 writes in
    C++ for symbols does not always compile.
    """
    function = _function(with_lse)
    assert isinstance(function, types.FunctionType)
    function.__code__ = function.__code__.replace(co_name=f"flex_{next(_names)}")
    return torch.compile(function, dynamic=kind[0] != "cpu", fullgraph=True)


def _block_mask(
    blocks: BlockIndex,
    layout: FlexLayout,
    batch: int,
    heads: int,
    key_mask: torch.Tensor | None,
    gradients: bool,
) -> Any:
    """The `BlockMask` of a call. Without a key mask it is made once for each size of batch."""

    def build(allowed: torch.Tensor, hidden: bool) -> Any:
        whole = layout.all & False if hidden else layout.all
        pattern = blocks.head_pattern
        lists = _lists(layout.some & ~whole, pattern), _lists(whole, pattern)
        if pattern is None:
            pattern = torch.zeros(heads, dtype=torch.int32, device=blocks.device)
        length = len(layout.token)
        return flex_attention.BlockMask.from_kv_blocks(
            *lists[0], *lists[1], BLOCK_SIZE=BLOCK, mask_mod=_mask_mod(layout, pattern, allowed),
            seq_lengths=(length, length), compute_q_blocks=gradients,
        )  # fmt: skip

    if key_mask is not None:
        return build(key_mask[:, layout.token] & layout.real, True)
    made = ("flex mask", batch, heads, gradients)
    return blocks.derived(made, lambda _: build(layout.real.repeat(batch, 1), False))


def _mask_mod(
    layout: FlexLayout, pattern: torch.Tensor, allowed: torch.Tensor
) -> Callable[..., torch.Tensor]:
    """Whether a query sees a key: a bit of the mask words of their tiles.

    Args:
        layout: the layout.
        pattern: int32 (H,), the pattern of each head.
        allowed: bool (B, L), False for places that are not keys, or that nobody may attend to.
    """
    tile, within, ids, words = layout.tile, layout.within, layout.ids, layout.words

    def mask_mod(
        b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        word = words[ids[pattern[h], tile[q], tile[k]], within[q], within[k] >> 5]
        return ((word >> (within[k] & 31)) & 1 != 0) & allowed[b, k]

    return mask_mod


def _lists(chosen: torch.Tensor, pattern: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks bool (P, NB, NB) as lists, of every head if they have patterns of their own.

    Returns:
        How many each row has, int32 (1, H or 1, NB), and which, ascending, (1, H or 1, NB, NB).
    """
    counts = chosen.sum(2, dtype=torch.int32)
    which = chosen.int().argsort(dim=2, descending=True, stable=True).int()
    if pattern is not None:
        counts, which = counts[pattern.long()], which[pattern.long()]
    return counts[None], which[None]
