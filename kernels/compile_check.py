"""Compiles every shipped configuration of the Triton kernels for GPUs that are not here.

    python -m diffpatch.kernels.compile_check --arch 80 90 --write eval/results/compile_table.json

Checks that each compiles, keeps its values in registers, fits in shared memory and uses the tensor
cores. It needs Triton (whose wheel brings the CUDA assembler) and no GPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from diffpatch.kernels import block_sparse_triton as forward
from diffpatch.kernels import block_sparse_triton_backward as backward
from diffpatch.kernels.block_sparse_triton_kernel import attend_kernel
from diffpatch.kernels.quantize import RUN
from diffpatch.kernels.quantize_triton import quantize_kernel

log = logging.getLogger(__name__)

# Shared memory a block may use, in bytes, and the tensor-core instruction in PTX.
SHARED_LIMIT = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
TENSOR_CORE = {80: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}
MAIN_ARCHS = (80, 90, 100)  # no byte may spill here
SPILL_LIMIT = 32  # bytes, elsewhere
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One specialization of a kernel.

    Attributes:
        arch: the compute capability, 90 for 9.0.
        kernel: "forward", "int8" (forward with scores in 8 bits), "quantize", or the gradient of
            "queries" or "keys".
        dtype: of the tensors.
        size: the head size.
        tile: the largest tile, in tokens.
        key_mask: whether keys are hidden.
        loads: how the forward kernels are asked to read keys and values.
        specialize: whether warps of their own do that.
    """

    arch: int
    kernel: str
    dtype: str
    size: int
    tile: int
    key_mask: bool
    loads: str = "auto"
    specialize: bool = False


@dataclass(frozen=True)
class Result:
    """What the compiler made of a case, and what is wrong with it.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread's registers that went to memory, and its local arrays.
        shared: bytes of shared memory of a block.
        tensor_cores: how many tensor-core instructions the PTX has.
        buffers: how many sub-blocks of keys are in flight.
        problems: empty for a case that ships.
    """

    case: Case
    config: forward.Config
    registers: int
    stack: int
    shared: int
    tensor_cores: int
    buffers: int
    problems: tuple[str, ...] = ()


def cases(archs: Sequence[int], dtypes: Sequence[str] = tuple(DTYPES)) -> Iterator[Case]:
    """Every case that ships for the given compute capabilities and dtypes.

    fp16 compiles to what bf16 does but for the name of an instruction, so that what may be asked
    for instead of the kernel's own choice is compiled for bf16 alone.
    """
    for arch, dtype in product(archs, dtypes):
        for size in (64, 96, 128, 256):
            yield Case(arch, "forward", dtype, size, 128, False)
        for size in (64, 128):
            yield Case(arch, "forward", dtype, size, 64, False)
            yield Case(arch, "forward", dtype, size, 128, True)
        for kernel, size in product(("queries", "keys"), (64, 128, 256)):
            if (DTYPES[dtype].itemsize, size) in backward.CONFIGS:
                yield Case(arch, kernel, dtype, size, tile=128, key_mask=False)
        if dtype == "bf16":
            yield from _loads_asked_for(arch)
        if dtype != "fp32":
            yield from _int8_cases(arch, dtype)


def _loads_asked_for(arch: int) -> Iterator[Case]:
    for size in (64, 128):
        yield Case(arch, "forward", "bf16", size, 128, False, "gather")
    if arch >= 90:
        for size in (64, 128, 256):
            yield Case(arch, "forward", "bf16", size, 128, False, "pointer")
    if arch in forward.SPECIALIZED:
        for key_mask in (False, True):
            yield Case(arch, "forward", "bf16", 128, 128, key_mask, "tma", specialize=True)


def _int8_cases(arch: int, dtype: str) -> Iterator[Case]:
    for size in (64, 128, 256):
        yield Case(arch, "int8", dtype, size, 128, False)
    yield Case(arch, "int8", dtype, 128, 64, True)
    yield Case(arch, "quantize", dtype, 128, 128, False)
    yield Case(arch, "quantize", dtype, 128, 128, True)
    if arch >= 90:
        yield Case(arch, "int8", dtype, 128, 128, False, "pointer")


def check(case: Case) -> Result:
    """Compile one case and look at what came out."""
    return compiled(case)[0]


def compiled(case: Case) -> tuple[Result, Any]:
    """What `check` finds, and Triton's compiled kernel."""
    config = configuration(case)
    kernel = _compile(case, config)
    registers, stack = _resources(kernel.asm["cubin"])
    # The asynchronous instructions take 64 rows or more, so smaller blocks use the older one; so
    # do 8-bit scores on sm_100 in Triton 3.6, but not what follows them.
    instruction = TENSOR_CORE[case.arch] if config.block_m >= 64 else "mma.sync"
    tensor_cores = len(re.findall(re.escape(instruction), kernel.asm["ptx"]))
    buffers = _buffers(kernel.asm["ttgir"], config.block_n, forward.padded(case.size))
    result = Result(case, config, registers, stack, kernel.metadata.shared, tensor_cores, buffers)
    problems = list(_problems(result, instruction))
    if case.specialize and "ttg.warp_specialize(" not in kernel.asm["ttgir"]:
        problems.append("no warps of their own for the loads")
    return replace(result, problems=tuple(problems)), kernel


def _problems(result: Result, instruction: str) -> Iterator[str]:
    case, config = result.case, result.config
    if result.stack > (0 if case.arch in MAIN_ARCHS else SPILL_LIMIT):
        yield f"{result.stack} bytes of stack"
    if result.shared > SHARED_LIMIT[case.arch]:
        yield f"{result.shared} bytes of shared memory, {SHARED_LIMIT[case.arch]} allowed"
    if case.dtype == "fp32" or case.kernel == "quantize":
        return
    if not result.tensor_cores:
        yield f"no {instruction}"
    # Tensor cores that do not read shared memory hold one stage in registers, unless the copy into
    # shared memory is that of a descriptor.
    depth = config.num_stages - (case.arch not in forward.ASYNC_TENSOR_CORE)
    depth -= config.loads == "gather"  # the indices of keys are staged like keys
    if case.kernel == "int8" and case.arch == 100 and triton.__version__.startswith("3.6."):
        depth -= 1
    if case.kernel in ("forward", "int8") and result.buffers < depth:
        yield f"{result.buffers} buffers of keys, {depth} expected"


def configuration(case: Case) -> forward.Config:
    """The configuration that ships for a case."""
    dtype = DTYPES[case.dtype]
    if case.kernel == "quantize":
        return forward.Config(RUN, RUN, num_warps=4, num_stages=3)
    if case.kernel in ("queries", "keys"):
        return backward.configuration(dtype, case.size, case.kernel == "keys", case.arch)
    int8 = case.kernel == "int8"
    asked: dict[str, Any] = {"loads": case.loads, "specialize": case.specialize}
    return forward.configuration(dtype, case.size, case.tile, case.arch, int8=int8, **asked)


def _compile(case: Case, config: forward.Config) -> Any:
    """The kernel as a launch on contiguous tensors would specialize it."""
    kernel, constants, types = _specialization(case, config)
    constants |= {
        "SIZE": case.size,
        "SIZE_PADDED": forward.padded(case.size),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "STAGES": config.num_stages,
    }
    if case.tile <= config.block_m:
        constants["parts"] = 1  # integers that are 1 are constants
    if not case.key_mask:
        constants["ALLOWED"] = None
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types |= {"ALLOWED": "*u8", "ORDER": "*i64", "scale": "fp32", "scale_log2": "fp32"}
    signature = {}
    for name in kernel.arg_names:
        plain = "*i32" if name.isupper() else "i32"
        signature[name] = "constexpr" if name in constants else types.get(name, plain)
    aligned = [n for n, t in signature.items() if t[0] == "*" or n.startswith("stride_")]
    position = kernel.arg_names.index
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(position(name),): value for name, value in constants.items()},
        attrs={(position(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }
    return triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)


def _specialization(
    case: Case, config: forward.Config
) -> tuple[Any, dict[str, Any], dict[str, str]]:
    """The kernel of a case, its own constants, and the types of its tensors."""
    tensor = f"*{case.dtype}"
    if case.kernel == "quantize":
        types = {"K": tensor, "KEYS": "*i8", "MEAN": "*fp32", "SCALES": "*fp32"}
        return quantize_kernel, {}, types
    if case.kernel in ("forward", "int8"):
        return _forward_specialization(case, config)
    keys = case.kernel == "keys"
    types = dict.fromkeys(("OWN", "OWN2", "OTHER", "OTHER2"), tensor)
    types |= dict.fromkeys(("LSE", "DELTA", "GRAD2"), "*fp32")
    types["GRAD"] = "*fp32" if keys else tensor
    constants = {"KEYS": keys} if keys else {"KEYS": keys, "GRAD2": None}
    return backward.gradient_kernel, constants, types


def _forward_specialization(
    case: Case, config: forward.Config
) -> tuple[Any, dict[str, Any], dict[str, str]]:
    int8 = case.kernel == "int8"
    types = dict.fromkeys(("Q", "OUT"), f"*{case.dtype}")
    types |= dict.fromkeys(("LSE", "KEY_SCALES"), "*fp32")
    for name, dtype in (("K", "i8" if int8 else case.dtype), ("V", case.dtype)):
        box = f"tensordesc<{dtype}[{config.block_n}, {case.size}]>"
        types[name] = box if config.loads == "tma" else f"*{dtype}"
    constants: dict[str, Any] = {
        "group": 1,
        "LOADS": config.loads,
        "SPECIALIZE": config.specialize,
    }
    if not int8:
        constants["KEY_SCALES"] = None
    return attend_kernel, constants, types


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes it keeps in memory instead."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if not found:
        raise RuntimeError(f"cuobjdump says nothing about registers: {text!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _buffers(ttgir: str, block_n: int, size: int) -> int:
    """The depth of the shortest pipeline of keys or values in TTGIR, 0 if there is none."""
    pattern = rf"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x{block_n}x{size}x"
    return min((int(depth) for depth in re.findall(pattern, ttgir)), default=0)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: prints a line for each case, returns 1 if one has a problem."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    archs = list(SHARED_LIMIT)
    parser.add_argument("--arch", type=int, nargs="+", default=archs, choices=archs)
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--kernel", nargs="+", help="only these kernels")
    parser.add_argument("--write", type=Path, help="put the results of this Triton into a table")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    results = []
    for case in cases(options.arch, options.dtype):
        if options.kernel and case.kernel not in options.kernel:
            continue
        results.append(check(case))
        log.info("%s", _line(results[-1]))
    failed = sum(bool(result.problems) for result in results)
    log.info("%d of %d cases ship", len(results) - failed, len(results))
    if options.write:
        write(results, options.write)
    return int(failed > 0)


def _line(result: Result) -> str:
    case = result.case
    words = [
        "FAIL" if result.problems else "ok  ",
        f"sm_{case.arch} {case.kernel} {case.dtype} d{case.size} tile {case.tile}",
        result.config.loads if case.kernel in ("forward", "int8") else "",
        "key mask" if case.key_mask else "",
        "specialized" if case.specialize else "",
        f"{result.registers} registers, {result.stack} B stack, {result.shared} B shared,",
        f"{result.tensor_cores} tensor-core instructions, {result.buffers} buffers",
        "; ".join(result.problems),
    ]
    return " ".join(word for word in words if word)


def write(results: Sequence[Result], path: Path) -> None:
    """Put results into a table, a JSON object by version of Triton; other versions stay."""
    table = json.loads(path.read_text()) if path.exists() else {}
    table[triton.__version__] = [_row(result) for result in results]
    versions = []
    for version, rows in sorted(table.items()):
        lines = ",\n".join("  " + json.dumps(row) for row in rows)
        versions.append(f" {json.dumps(version)}: [\n{lines}\n ]")
    path.write_text("{\n" + ",\n".join(versions) + "\n}\n")


def _row(result: Result) -> dict[str, Any]:
    values = asdict(result) | {"config": result.config._asdict()}
    return values.pop("case") | values


if __name__ == "__main__":
    sys.exit(main())
