"""Compiles every shipped configuration of the Triton kernels for GPUs that are not here.

    python -m diffpatch.kernels.compile.check --arch 80 90 --write eval/results/compile_table.json

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
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from diffpatch.kernels.block_sparse.gpu import gluon_forward as gluon
from diffpatch.kernels.compile.cases import (
    DTYPES,
    SELECTION,
    CompileCase,
    Config,
    cases,
    configuration,
    specialization,
)
from diffpatch.kernels.gpu.common import ASYNC_TENSOR_CORE, padded
from diffpatch.kernels.gpu.support import GPUS

log = logging.getLogger(__name__)

# Compute capabilities that the table has; others take the configuration of one of these.
ARCHS = tuple(arch for arch, gpu in GPUS.items() if gpu.like == arch)
TENSOR_CORE = {90: "wgmma", 100: "tcgen05.mma", 103: "tcgen05.mma"}  # in PTX
OLDER_TENSOR_CORE = "mma.sync"  # of all others
FP8 = {100: "kind::f8f6f4", 103: "kind::f8f6f4"}  # in the names of those of 8-bit floats
OLDER_FP8 = "e4m3.e4m3"
MAIN_ARCHS = (80, 90, 100)  # no byte may spill here
SPILL_LIMIT = 32  # bytes, elsewhere


@dataclass(frozen=True)
class CompileResult:
    """What the compiler made of a case, and what is wrong with it.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread's registers that went to memory, and its local arrays.
        shared: bytes of shared memory of a block.
        tensor_cores: how many tensor-core instructions the PTX has.
        buffers: how many sub-blocks of keys are in flight.
        problems: empty for a case that ships.
    """

    case: CompileCase
    config: Config
    registers: int
    stack: int
    shared: int
    tensor_cores: int
    buffers: int
    problems: tuple[str, ...] = ()


def check(case: CompileCase) -> CompileResult:
    """Compile one case and look at what came out."""
    return compiled(case)[0]


def compiled(case: CompileCase) -> tuple[CompileResult, Any]:
    """What `check` finds, and Triton's compiled kernel."""
    config = configuration(case)
    kernel = _compile(case, config)
    registers, stack = _resources(kernel.asm["cubin"])
    # The asynchronous instructions take 64 rows or more, so smaller blocks use the older one; so
    # do 8-bit scores on sm_103 and, in Triton 3.6, on sm_100, but not what follows them.
    instruction = TENSOR_CORE.get(case.arch, OLDER_TENSOR_CORE)
    if config.block_m < 64:
        instruction = OLDER_TENSOR_CORE
    if case.kernel in ("virtual", "corrected", "state", "apply", *SELECTION):
        instruction = "mma"  # of either kind: their blocks are of many shapes
    kind = FP8.get(case.arch, OLDER_FP8) if case.kernel == "fp8" else ""
    pattern = re.escape(instruction) + rf"\S*{re.escape(kind)}"
    tensor_cores = len(re.findall(pattern, kernel.asm["ptx"]))
    instruction += f" of {kind}" if kind else ""
    buffers = _buffers(kernel.asm["ttgir"], config.block_n, padded(case.size))
    result = CompileResult(
        case, config, registers, stack, kernel.metadata.shared, tensor_cores, buffers
    )
    problems = list(_problems(result, instruction))
    if case.kernel == "gluon":
        weights = config.block_n // 2  # of a thread: 64 rows, 128 threads
        if _overlapped(kernel.asm["cubin"]) < weights:
            problems.append("the softmax waits for the sums")
    if case.specialize and "ttg.warp_specialize(" not in kernel.asm["ttgir"]:
        problems.append("no warps of their own for the loads")
    return replace(result, problems=tuple(problems)), kernel


def _problems(result: CompileResult, instruction: str) -> Iterator[str]:
    case, config = result.case, result.config
    if result.stack > (0 if case.arch in MAIN_ARCHS else SPILL_LIMIT):
        yield f"{result.stack} bytes of stack"
    if result.shared > GPUS[case.arch].shared:
        yield f"{result.shared} bytes of shared memory, {GPUS[case.arch].shared} allowed"
    if case.kernel in ("quantize", "values", "list", "pool", "moments", "choose"):
        return
    if case.dtype == "fp32" and case.kernel not in SELECTION:  # which splits it for tensor cores
        return
    if not result.tensor_cores:
        yield f"no {instruction}"
    if case.kernel not in ("forward", "int8", "fp8", "active", "skip"):
        return
    # Tensor cores that do not read shared memory hold one stage in registers, unless the copy into
    # shared memory is that of a descriptor.
    depth = config.num_stages - (GPUS[case.arch].like not in ASYNC_TENSOR_CORE)
    depth -= getattr(config, "loads", "") == "gather"  # the indices of keys are staged like keys
    older = case.arch == 103 or (case.arch == 100 and triton.__version__.startswith("3.6."))
    depth -= case.kernel in ("int8", "fp8") and older  # where int8 uses the older one
    if result.buffers < depth:
        yield f"{result.buffers} buffers of keys, {depth} expected"


def _compile(case: CompileCase, config: Config) -> Any:
    """The kernel as a launch on contiguous tensors would specialize it."""
    kernel, constants, types = specialization(case, config)
    signature = {}
    for name in kernel.arg_names:
        plain = "*i32" if name.isupper() else "i32"
        signature[name] = "constexpr" if name in constants else types.get(name, plain)
    aligned = [n for n, t in signature.items() if t[0] == "*" or n.startswith("stride_")]
    position = kernel.arg_names.index
    by_hand = isinstance(config, gluon.HopperConfig)
    source = (GluonASTSource if by_hand else ASTSource)(
        fn=kernel,
        signature=signature,
        constexprs={(position(name),): value for name, value in constants.items()},
        attrs={(position(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": config.num_warps, "enable_fp_fusion": True}
    options |= {"maxnreg": gluon.REGISTERS} if by_hand else {"num_stages": config.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)


def said_of(cubin: bytes, *command: str) -> str:
    """What a program says of compiled code, whose file is its last argument."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([*command, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes it keeps in memory instead."""
    text = said_of(cubin, knobs.nvidia.cuobjdump.path, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if not found:
        raise RuntimeError(f"cuobjdump says nothing about registers: {text!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _overlapped(cubin: bytes) -> int:
    """The exponentials of a thread that a Hopper kernel computes while products are under way.

    That is between a wait which leaves one product going and the next, which does not: the
    assembler is free to move the second wait up, and to end every product before it goes on.
    """
    text = said_of(cubin, knobs.nvidia.nvdisasm.path, "-c")
    found, going = [0], False
    for wait, exponential in re.findall(r"WARPGROUP\.DEPBAR\S* gsb0, (0x\w+)|(MUFU\.EX2)", text):
        if wait:
            going = wait == "0x1"
            found += [0] if going else []
        elif going and exponential:
            found[-1] += 1
    return max(found)


def _buffers(ttgir: str, block_n: int, size: int) -> int:
    """The depth of the shortest pipeline of keys or values in TTGIR, 0 if there is none."""
    shape = rf"(?:{block_n}x{size}|{size}x{block_n})"  # the second of 8-bit values
    pattern = rf"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x{shape}x"
    return min((int(depth) for depth in re.findall(pattern, ttgir)), default=0)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: prints a line for each case, returns 1 if one has a problem."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS, choices=GPUS)
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--kernel", nargs="+", help="only these kernels")
    parser.add_argument("--missing", action="store_true", help="only what the table does not have")
    parser.add_argument("--write", type=Path, help="put the results of this Triton into a table")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    known = _rows(options.write) if options.missing and options.write else {}
    results = []
    for case in cases(options.arch, options.dtype):
        if options.kernel and case.kernel not in options.kernel:
            continue
        row = known.get(_key(asdict(case)))
        if row and not row["problems"] and row["config"] == configuration(case)._asdict():
            continue
        results.append(check(case))
        log.info("%s", _line(results[-1]))
        if options.write and len(results) % 20 == 0:
            write(results, options.write)  # what takes minutes is not lost when it is stopped
    failed = sum(bool(result.problems) for result in results)
    log.info("%d of %d cases ship", len(results) - failed, len(results))
    if options.write:
        write(results, options.write)
    return int(failed > 0)


def _line(result: CompileResult) -> str:
    case = result.case
    words = [
        "FAIL" if result.problems else "ok  ",
        f"sm_{case.arch} {case.kernel} {case.dtype} d{case.size} tile {case.tile}",
        getattr(result.config, "loads", "") if case.kernel in ("forward", "int8", "fp8") else "",
        "key mask" if case.key_mask else "",
        "specialized" if case.specialize else "",
        f"{result.registers} registers, {result.stack} B stack, {result.shared} B shared,",
        f"{result.tensor_cores} tensor-core instructions, {result.buffers} buffers",
        "; ".join(result.problems),
    ]
    return " ".join(word for word in words if word)


def write(results: Sequence[CompileResult], path: Path) -> None:
    """Put results into a table, a JSON object by version of Triton.

    Other versions stay, and so do the rows of this one that were not compiled now and still ship.
    """
    table = json.loads(path.read_text()) if path.exists() else {}
    shipped = {_key(asdict(case)): None for case in cases(ARCHS)}
    rows = shipped | _rows(path)
    rows |= {_key(asdict(result.case)): _row(result) for result in results}
    table[triton.__version__] = [row for key, row in rows.items() if row and key in shipped]
    versions = []
    for version, rows_of_it in sorted(table.items()):
        lines = ",\n".join("  " + json.dumps(row) for row in rows_of_it)
        versions.append(f" {json.dumps(version)}: [\n{lines}\n ]")
    path.write_text("{\n" + ",\n".join(versions) + "\n}\n")


def _rows(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """What a table has of this version of Triton, by case."""
    table = json.loads(path.read_text()) if path.exists() else {}
    return {_key(row): row for row in table.get(triton.__version__, [])}


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells the case of a row from others."""
    return tuple(row.get(field.name) for field in fields(CompileCase))


def _row(result: CompileResult) -> dict[str, Any]:
    values = asdict(result) | {"config": result.config._asdict()}
    return values.pop("case") | values


if __name__ == "__main__":
    sys.exit(main())
