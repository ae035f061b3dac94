"""Every specialization of the Triton kernels that ships, and what a launch of it would fix.

A case names a kernel and what it is compiled for; `configuration` and `specialization` say what
its launch passes to Triton. `check` compiles them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from diffpatch.kernels.active_tiles import triton_impl as active
from diffpatch.kernels.active_tiles import triton_lists as lists
from diffpatch.kernels.block_sparse.fp8 import triton_values as fp8
from diffpatch.kernels.block_sparse.gpu import gluon_forward as gluon
from diffpatch.kernels.block_sparse.gpu import triton_backward as backward
from diffpatch.kernels.block_sparse.gpu import triton_forward as forward
from diffpatch.kernels.block_sparse.gpu.gluon_forward import HopperConfig
from diffpatch.kernels.block_sparse.gpu.gluon_kernel import attend_kernel as gluon_kernel
from diffpatch.kernels.block_sparse.gpu.triton_forward import ForwardConfig
from diffpatch.kernels.block_sparse.gpu.triton_kernel import attend_kernel
from diffpatch.kernels.block_sparse.int8.levels import STRIP
from diffpatch.kernels.block_sparse.int8.triton_keys import quantize_kernel
from diffpatch.kernels.gpu import support
from diffpatch.kernels.gpu.common import padded
from diffpatch.kernels.gpu.support import GPUS
from diffpatch.kernels.linear import triton_impl as linear
from diffpatch.kernels.linear.triton_impl import LinearConfig
from diffpatch.kernels.linear.triton_kernel import apply_kernel, state_kernel
from diffpatch.kernels.selection import triton_impl as selection
from diffpatch.kernels.selection.triton_impl import SelectionConfig
from diffpatch.kernels.selection.triton_kernel import choose_kernel, drop_kernel, score_kernel
from diffpatch.kernels.virtual_tokens import triton_correction as correction
from diffpatch.kernels.virtual_tokens import triton_impl as virtual

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Config = ForwardConfig | virtual.VirtualConfig | LinearConfig | HopperConfig | SelectionConfig
SELECTION = ("score", "drop", "choose")


@dataclass(frozen=True)
class CompileCase:
    """One specialization of a kernel.

    Attributes:
        arch: the compute capability, 90 for 9.0.
        kernel: "forward", "gluon" (the same for Hopper, scheduled by hand), "int8" (forward with
            scores in 8 bits), "fp8" (with weights and values in 8-bit floats besides), "quantize"
            (of keys) and "values", which round; the gradient of "queries" or "keys", "active" (only
            the tiles that a step keeps), or "skip" (the same, which also finds out what the next
            step may leave out) and "list" of what these visit; "pool" and "virtual" of virtual
            tokens, "corrected" with what they miss, "missed" which finds that out, "moments" of the
            tiles that are chosen from, "score" and "drop" (scores of these where the rest stays as
            virtual tokens, and where it is dropped), "choose" (the best of a row of `tile` strips),
            "state" and "apply" of linear attention.
        dtype: of the tensors.
        size: the head size.
        tile: the largest tile, in tokens.
        key_mask: whether keys are hidden.
        loads: how the forward kernels are asked to read keys and values.
        specialize: whether warps of their own do that.
        strip: most keys that "active" takes or leaves at a time; 0 for whole tiles.
    """

    arch: int
    kernel: str
    dtype: str
    size: int
    tile: int
    key_mask: bool
    loads: str = "auto"
    specialize: bool = False
    strip: int = 0


def cases(archs: Sequence[int], dtypes: Sequence[str] = tuple(DTYPES)) -> Iterator[CompileCase]:
    """Every case that ships for the given compute capabilities and dtypes.

    fp16 compiles to what bf16 does but for the name of an instruction, so that bf16 alone is
    compiled in every form.
    """
    for arch, dtype in product(archs, dtypes):
        if GPUS[arch].like == gluon.HOPPER and DTYPES[dtype] in gluon.TYPES:
            for size, key_mask in product(gluon.CONFIGS, (False, True)):
                yield CompileCase(arch, "gluon", dtype, size, 128, key_mask)
        for size in (64, 96, 128, 256):
            yield CompileCase(arch, "forward", dtype, size, 128, False)
        if dtype == "fp16":
            yield CompileCase(arch, "int8", dtype, 128, 128, False)
            yield CompileCase(arch, "skip", dtype, 128, 128, False)
            continue
        for size in (64, 128):
            yield CompileCase(arch, "forward", dtype, size, 64, False)
            yield CompileCase(arch, "forward", dtype, size, 128, True)
        for kernel, size in product(("queries", "keys"), (64, 128, 256)):
            if (DTYPES[dtype].itemsize, size) in backward.CONFIGS:
                yield CompileCase(arch, kernel, dtype, size, tile=128, key_mask=False)
        yield from _active_cases(arch, dtype)
        if dtype == "bf16":
            yield from _loads_asked_for(arch)
            yield from _int8_cases(arch, dtype)
            if arch >= support.FP8:
                yield from _fp8_cases(arch, dtype)
            for kernel in ("pool", "moments", "virtual", "corrected", "missed", "state", "apply"):
                yield CompileCase(arch, kernel, dtype, 128, 128, False)
            for kernel, tile in product(("virtual", "corrected"), (64, 128)):
                yield CompileCase(arch, kernel, dtype, 64, tile, False)
            for size in (64, 256):
                yield CompileCase(arch, "missed", dtype, size, 128, True)
        if dtype == "fp32":  # of moments, whatever the tensors are
            for kernel, size in product(("score", "drop"), (64, 128, 256)):
                yield CompileCase(arch, kernel, dtype, size, 128, False)
            for strips in (2048, 4096):
                yield CompileCase(arch, "choose", dtype, 128, strips, False)


def _loads_asked_for(arch: int) -> Iterator[CompileCase]:
    for size in (64, 128):
        yield CompileCase(arch, "forward", "bf16", size, 128, False, "gather")
    if arch >= 90:
        for size in (64, 128, 256):
            yield CompileCase(arch, "forward", "bf16", size, 128, False, "pointer")
    if GPUS[arch].like in forward.SPECIALIZED:
        for key_mask in (False, True):
            yield CompileCase(arch, "forward", "bf16", 128, 128, key_mask, "tma", specialize=True)


def _active_cases(arch: int, dtype: str) -> Iterator[CompileCase]:
    for size in (64, 128, 256):
        yield CompileCase(arch, "skip", dtype, size, 128, False)
    yield CompileCase(arch, "active", dtype, 128, 128, False)
    for size, tile in product((64, 128), (64, 128)):
        yield CompileCase(arch, "active", dtype, size, tile, False, strip=32)
    yield CompileCase(arch, "skip", dtype, 128, 64, True)
    if dtype == "bf16":  # which it does not read
        yield CompileCase(arch, "list", dtype, 128, 128, False)


def _int8_cases(arch: int, dtype: str) -> Iterator[CompileCase]:
    for size in (64, 128, 256):
        yield CompileCase(arch, "int8", dtype, size, 128, False)
    yield CompileCase(arch, "int8", dtype, 128, 64, True)
    yield CompileCase(arch, "quantize", dtype, 128, 128, False)
    yield CompileCase(arch, "quantize", dtype, 128, 128, True)
    if arch >= 90:
        yield CompileCase(arch, "int8", dtype, 128, 128, False, "pointer")


def _fp8_cases(arch: int, dtype: str) -> Iterator[CompileCase]:
    for size in (64, 96, 128, 256):
        yield CompileCase(arch, "fp8", dtype, size, 128, False)
    yield CompileCase(arch, "fp8", dtype, 128, 64, True)
    yield CompileCase(arch, "values", dtype, 128, 128, True)


def configuration(case: CompileCase) -> Config:
    """The configuration that ships for a case."""
    dtype, arch = DTYPES[case.dtype], GPUS[case.arch].like
    if case.kernel == "gluon":
        return gluon.configuration(case.size, case.key_mask)
    if case.kernel == "list":
        return ForwardConfig(1, lists.STEP, num_warps=4, num_stages=3)
    if case.kernel == "values":
        return ForwardConfig(fp8.ROWS, fp8.ROWS, num_warps=4, num_stages=3)
    if case.kernel == "quantize":
        return ForwardConfig(STRIP, STRIP, num_warps=4, num_stages=3)
    if case.kernel in ("queries", "keys"):
        return backward.configuration(dtype, case.size, case.kernel == "keys", arch)
    if case.kernel in ("pool", "moments"):
        return virtual.VirtualConfig(virtual.POOLED_ROWS, 1, num_warps=4, num_stages=3)
    if case.kernel == "choose":
        return selection.row_config(case.tile)
    if case.kernel in SELECTION:
        return selection.DROP if case.kernel == "drop" else selection.SCORES
    if case.kernel == "missed":
        return correction.CONFIGS[dtype.itemsize, padded(case.size)]
    if case.kernel in ("virtual", "corrected"):
        return virtual.configuration(dtype, case.size, case.tile)
    if case.kernel == "state":
        return linear.STATE_CONFIGS[dtype.itemsize]
    if case.kernel == "apply":
        return linear.configuration(dtype, case.size)
    if case.kernel in ("active", "skip"):
        return active.configuration(dtype, case.size, case.tile, arch, case.strip or None)
    asked: dict[str, Any] = {"loads": case.loads, "specialize": case.specialize}
    asked |= {"int8": case.kernel in ("int8", "fp8"), "fp8": case.kernel == "fp8"}
    return forward.configuration(dtype, case.size, case.tile, arch, **asked)


def specialization(case: CompileCase, config: Config) -> tuple[Any, dict[str, Any], dict[str, str]]:
    """What a launch on contiguous tensors fixes.

    Returns:
        The kernel, the values of its constant arguments, and the types of those tensors and numbers
        that are not int32.
    """
    kernel, own, types = _of_kernel(case, config)
    constants = own | {
        "SIZE": case.size,
        "SIZE_PADDED": padded(case.size),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "STAGES": config.num_stages,
    }
    if case.tile <= config.block_m:
        constants["parts"] = 1  # integers that are 1 are constants
    if not case.key_mask:
        constants["ALLOWED"] = None
    types |= {"ALLOWED": "*u8", "ORDER": "*i64", "scale": "fp32", "scale_log2": "fp32"}
    return kernel, {k: x for k, x in constants.items() if k in kernel.arg_names}, types


def _of_kernel(case: CompileCase, config: Config) -> tuple[Any, dict[str, Any], dict[str, str]]:
    """The kernel of a case, its own constants, and the types of its tensors."""
    tensor = f"*{case.dtype}"
    if case.kernel in ("pool", "moments", "virtual", "corrected", "missed"):
        return _virtual(case)
    if isinstance(config, SelectionConfig):
        return _selection(case, config)
    if isinstance(config, LinearConfig):
        return _linear(case, config)
    if isinstance(config, HopperConfig):
        return _gluon(case, config)
    assert isinstance(config, ForwardConfig)
    if case.kernel == "quantize":
        types = {"K": tensor, "KEYS": "*i8", "MEAN": "*fp32", "SCALES": "*fp32"}
        return quantize_kernel, {}, types
    if case.kernel == "list":
        types = {"ACTIVE": "*u8", "PATTERN": "*i64", "AT": "*i64"}
        return lists.list_kernel, {"REVERSE": False, "BLOCK": lists.STEP}, types
    if case.kernel == "values":
        types = {"V": tensor, "VALUES": "*fp8e4nv", "MEAN": "*fp32", "SCALES": "*fp32"}
        return fp8.values_kernel, {"ROWS": fp8.ROWS}, types
    if case.kernel in ("forward", "int8", "fp8"):
        return _forward(case, config)
    if case.kernel in ("active", "skip"):
        types = dict.fromkeys(("Q", "K", "V", "OUT"), tensor)
        types |= {"HITS": "*u8", "LSE": "*fp32", "threshold": "fp32"}
        constants = {"group": 1, "SUBS": -(-(case.strip or case.tile) // config.block_n)}
        return (
            active.attend_active_kernel,
            constants | _none(case.kernel == "active", "HITS"),
            types,
        )
    keys = case.kernel == "keys"
    types = dict.fromkeys(("OWN", "OWN2", "OTHER", "OTHER2"), tensor)
    types |= dict.fromkeys(("LSE", "DELTA", "GRAD2"), "*fp32")
    types["GRAD"] = "*fp32" if keys else tensor
    return backward.gradient_kernel, {"KEYS": keys} | _none(not keys, "GRAD2"), types


def _forward(
    case: CompileCase, config: ForwardConfig
) -> tuple[Any, dict[str, Any], dict[str, str]]:
    floats = case.kernel == "fp8"
    int8 = floats or case.kernel == "int8"
    types = dict.fromkeys(("Q", "OUT"), f"*{case.dtype}")
    types |= dict.fromkeys(("LSE", "KEY_SCALES", "VALUE_SCALES", "VALUE_MEANS"), "*fp32")
    keys, values = "i8" if int8 else case.dtype, "fp8e4nv" if floats else case.dtype
    box = [config.block_n, case.size]
    for name, dtype, sides in (("K", keys, box), ("V", values, box[::-1] if floats else box)):
        types[name] = f"tensordesc<{dtype}{sides}>" if config.loads == "tma" else f"*{dtype}"
    constants = {"group": 1, "LOADS": config.loads, "SPECIALIZE": config.specialize}
    constants["EXACT"] = GPUS[case.arch].like in forward.EXACT_SUMS
    constants |= _none(not int8, "KEY_SCALES")
    for name in ("VALUE_SCALES", "VALUE_MEANS", "length"):
        constants |= _none(not floats, name)
    return attend_kernel, constants, types


def _gluon(case: CompileCase, config: HopperConfig) -> tuple[Any, dict[str, Any], dict[str, str]]:
    layout = gluon.boxes(config, case.size, DTYPES[case.dtype])
    box = f"tensordesc<{case.dtype}[{config.block_n},{case.size}],{layout!r}>"
    types = dict.fromkeys(("Q", "OUT"), f"*{case.dtype}")
    types |= {"K": box, "V": box, "LSE": "*fp32"}
    constants = {
        "group": 1,
        "PARTS": 1,
        "TURNS": config.turns,
        "REGISTERS": gluon.COMPUTING_REGISTERS,
    }
    return gluon_kernel, constants, types


def _virtual(case: CompileCase) -> tuple[Any, dict[str, Any], dict[str, str]]:
    names = ("Q", "K", "V", "KEYS", "VALUES", "VARIANCE", "NEAR", "OUT")
    types = dict.fromkeys(names, f"*{case.dtype}")
    types |= dict.fromkeys(("LOG_COUNT", "NEAR_LSE", "LSE", "MISSED", "MISSED_LSE"), "*fp32")
    types |= {"log2_e": "fp32", "SHOWN": "*u8"}
    if case.kernel == "pool":
        return virtual.pool_kernel, {"ROWS": virtual.POOLED_ROWS}, types
    if case.kernel == "moments":
        alone = dict.fromkeys(("V", "VALUES"))
        types |= dict.fromkeys(("KEYS", "VARIANCE"), "*fp32")
        return virtual.pool_kernel, {"ROWS": virtual.POOLED_ROWS} | alone, types
    if case.kernel == "missed":
        types |= {"MEAN": "*fp32", "OUT": "*fp32"}
        return correction.missed_kernel, {"group": 1, "LENGTH": 32}, types
    plain = dict.fromkeys(("MISSED", "MISSED_LSE")) if case.kernel == "virtual" else {}
    return virtual.virtual_kernel, {"group": 1} | plain, types


def _selection(
    case: CompileCase, config: SelectionConfig
) -> tuple[Any, dict[str, Any], dict[str, str]]:
    names = ("QUERIES", "QUERY_VAR", "KEYS", "KEY_VAR", "COUNT", "SPREAD", "VALUES", "SCORES")
    types = dict.fromkeys(names, "*fp32") | dict.fromkeys(("SEEN", "FIXED", "CHOSEN"), "*u8")
    kernel = {"score": score_kernel, "drop": drop_kernel, "choose": choose_kernel}[case.kernel]
    return kernel, {"PLAIN": False, "BLOCK_C": config.block_c}, types | {"COUNTS": "*i64"}


def _linear(case: CompileCase, config: LinearConfig) -> tuple[Any, dict[str, Any], dict[str, str]]:
    types = dict.fromkeys(("Q", "K", "V", "LEFT", "RIGHT", "OUT"), f"*{case.dtype}")
    sums = ("STATE", "SQUARES", "LEFT_SUM", "RIGHT_SUM", "KEY_SUM", "VALUE_SUM", "COUNT", "LSE")
    centres = ("LEFT_CENTRE", "RIGHT_CENTRE", "CENTRE_K", "CENTRE_V")
    types |= dict.fromkeys((*sums, *centres), "*fp32") | {"WEIGHT": "*u8"}
    constants = {"PRECISION": config.precision, "group": 1}
    if case.kernel == "state":
        blocks = {"BLOCK_LEFT": config.block_m, "BLOCK_RIGHT": config.block_c}
        sizes = {"LEFT_SIZE": case.size, "RIGHT_SIZE": case.size}
        return state_kernel, constants | blocks | sizes, types
    sizes = {"VALUE_SIZE": case.size, "VALUE_PADDED": padded(case.size)}
    return apply_kernel, constants | sizes | {"BLOCK_C": config.block_c}, types


def _none(absent: bool, name: str) -> dict[str, Any]:
    """The constant that stands for a tensor which this case does without."""
    return {name: None} if absent else {}
