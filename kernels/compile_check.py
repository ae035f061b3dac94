"""Compiles every shipped configuration of the Triton kernels for GPUs that are not here.

    python -m diffpatch.kernels.compile_check --arch 80 90 --json table.json

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
from dataclasses import asdict, dataclass
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

log = logging.getLogger(__name__)

# Shared memory a block may use, in bytes, and the tensor-core instruction in PTX.
SHARED_LIMIT = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
TENSOR_CORE = {80: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}
MAIN_ARCHS = (80, 90)  # no byte may spill here
SPILL_LIMIT = 32  # bytes, elsewhere
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One specialization of a kernel: "forward", or the gradient of "queries" or "keys"."""

    arch: int
    kernel: str
    dtype: str
    size: int
    tile: int
    key_mask: bool


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
    problems: tuple[str, ...]


def cases(archs: Sequence[int], dtypes: Sequence[str] = tuple(DTYPES)) -> Iterator[Case]:
    """Every case that ships for the given compute capabilities and dtypes."""
    for arch, dtype in product(archs, dtypes):
        for size in (64, 96, 128, 256):
            yield Case(arch, "forward", dtype, size, tile=128, key_mask=False)
        for size in (64, 128):
            yield Case(arch, "forward", dtype, size, tile=64, key_mask=False)
            yield Case(arch, "forward", dtype, size, tile=128, key_mask=True)
        for kernel, size in product(("queries", "keys"), (64, 128, 256)):
            if (DTYPES[dtype].itemsize, size) in backward.CONFIGS:
                yield Case(arch, kernel, dtype, size, tile=128, key_mask=False)


def check(case: Case) -> Result:
    """Compile one case and look at what came out."""
    config = configuration(case)
    kernel = _compile(case, config)
    registers, stack = _resources(kernel.asm["cubin"])
    shared = kernel.metadata.shared
    # The asynchronous instructions take 64 rows or more, so smaller blocks use the older one.
    instruction = TENSOR_CORE[case.arch] if config.block_m >= 64 else "mma.sync"
    tensor_cores = len(re.findall(re.escape(instruction), kernel.asm["ptx"]))
    buffers = _buffers(kernel.asm["ttgir"], config.block_n, forward.padded(case.size))
    problems = []
    if stack > (0 if case.arch in MAIN_ARCHS else SPILL_LIMIT):
        problems.append(f"{stack} bytes of stack")
    if shared > SHARED_LIMIT[case.arch]:
        problems.append(f"{shared} bytes of shared memory, {SHARED_LIMIT[case.arch]} allowed")
    if case.dtype != "fp32" and not tensor_cores:
        problems.append(f"no {instruction}")
    # Tensor cores that do not read shared memory hold one stage in registers.
    depth = config.num_stages - (case.arch not in forward.ASYNC_TENSOR_CORE)
    if case.kernel == "forward" and case.dtype != "fp32" and buffers < depth:
        problems.append(f"{buffers} buffers of keys, {depth} expected")
    return Result(case, config, registers, stack, shared, tensor_cores, buffers, tuple(problems))


def configuration(case: Case) -> forward.Config:
    """The configuration that ships for a case."""
    dtype = DTYPES[case.dtype]
    if case.kernel == "forward":
        return forward.configuration(dtype, case.size, case.tile, case.arch)
    return backward.configuration(dtype, case.size, case.kernel == "keys", case.arch)


def _compile(case: Case, config: forward.Config) -> Any:
    """The kernel as a launch on contiguous tensors would specialize it."""
    kernel, constants, types = _specialization(case)
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


def _specialization(case: Case) -> tuple[Any, dict[str, Any], dict[str, str]]:
    """The kernel of a case, its own constants, and the types of its tensors."""
    tensor = f"*{case.dtype}"
    if case.kernel == "forward":
        types = dict.fromkeys(("Q", "K", "V", "OUT"), tensor) | {"LSE": "*fp32"}
        return forward.attend_kernel, {"group": 1}, types
    keys = case.kernel == "keys"
    types = dict.fromkeys(("OWN", "OWN2", "OTHER", "OTHER2"), tensor)
    types |= dict.fromkeys(("LSE", "DELTA", "GRAD2"), "*fp32")
    types["GRAD"] = "*fp32" if keys else tensor
    constants = {"KEYS": keys} if keys else {"KEYS": keys, "GRAD2": None}
    return backward.gradient_kernel, constants, types


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
    parser.add_argument("--json", type=Path, help="write the table to this file")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    results = []
    for case in cases(options.arch, options.dtype):
        result = check(case)
        results.append(result)
        log.info(
            "%s sm_%d %s %s d%d tile %d%s: %d registers, %d B stack, %d B shared, %d tensor-core "
            "instructions, %d buffers %s",
            "FAIL" if result.problems else "ok  ",
            case.arch, case.kernel, case.dtype, case.size, case.tile,
            " key mask" if case.key_mask else "",
            result.registers, result.stack, result.shared, result.tensor_cores, result.buffers,
            "; ".join(result.problems),
        )  # fmt: skip
    failed = sum(bool(result.problems) for result in results)
    log.info("%d of %d cases ship", len(results) - failed, len(results))
    if options.json:
        table = {"triton": triton.__version__, "cases": [_row(result) for result in results]}
        options.json.write_text(json.dumps(table, indent=1) + "\n")
    return int(failed > 0)


def _row(result: Result) -> dict[str, Any]:
    values = asdict(result)
    return values.pop("case") | {"config": result.config._asdict()} | {
        name: value for name, value in values.items() if name != "config"
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
