"""How much of a card's peak our inner loops could reach, read off their machine code: a model.

    python -m diffpatch.kernels.compile.bounds --write eval/results/static_bounds.json

It compiles every configuration of the forward and selection kernels that "auto" launches on Hopper
and Ada, and dense attention in plain Triton with the same blocks, finds the loops that use tensor
cores, and counts their instructions by pipe. What a pipe can issue per clock gives two bounds: if
everything overlaps, and if nothing overlaps the tensor cores. Memory, latencies and clocks are left
out.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from diffpatch.kernels.compile.cases import CompileCase, cases
from diffpatch.kernels.compile.check import compiled, said_of
from diffpatch.kernels.compile.dense_kernel import dense_kernel

log = logging.getLogger(__name__)

ARCHS = {90: "Hopper", 89: "Ada"}
# Operations of bf16 tensor cores in a clock of a multiprocessor (H100: 989 TFLOP/s, L40S: 362),
# with fp32 sums; GeForce cards of Ada have half of it. tf32 is half as fast.
TENSOR = {90: 4096.0, 89: 1024.0}
# Instructions of a warp that a multiprocessor issues in a clock, by pipe (CUDA programming guide,
# throughput of native arithmetic instructions).
PER_CLOCK = {"fma": 4.0, "alu": 2.0, "special": 0.5, "memory": 1.0, "issue": 4.0}
PIPES = {
    "tensor": "HGMMA HMMA IMMA IGMMA QGMMA",
    "fma": "FFMA FMUL FADD IMAD HFMA2 HADD2 HMUL2",
    "special": "MUFU POPC FLO F2F F2I I2F",
    "memory": "LDS STS LDSM STSM LDG STG LDGSTS SHFL LD ST LDL STL ATOM ATOMS RED UTMALDG SYNCS",
    "control": "BRA BAR WARPSYNC NOP DEPBAR LDGDEPBAR WARPGROUP BSSY BSYNC EXIT NANOSLEEP YIELD",
}
PIPE_OF = {opcode: pipe for pipe, opcodes in PIPES.items() for opcode in opcodes.split()}
ATTENTION = ("forward", "gluon")
SCORES = ("score", "drop")  # "choose" multiplies nothing

Loop = dict[str, Any]


def loops(sass: str) -> list[list[str]]:
    """The innermost loops that use tensor cores, as lists of instructions without conditions."""
    labels: dict[str, int] = {}
    found: list[str] = []
    jumps: list[tuple[int, int]] = []
    for line in sass.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(found)
        instruction = re.match(r"\s*/\*\w+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*?)\s*;", line)
        if instruction:
            found.append(instruction[1])
            target = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction[1])
            if target and target[1] in labels:
                jumps.append((labels[target[1]], len(found)))
    # Waits stand behind the last EXIT and jump back into the code, which makes no loop.
    end = max((n for n, each in enumerate(found) if each.startswith("EXIT")), default=len(found))
    jumps = [x for x in jumps if x[1] <= end]
    ranges = [x for x in jumps if any(_pipe(i) == "tensor" for i in found[slice(*x)])]
    inner = [(a, b) for a, b in ranges if not any(_inside(other, (a, b)) for other in ranges)]
    return [found[a:b] for a, b in sorted(set(inner))]


def _inside(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one != other and other[0] <= one[0] and one[1] <= other[1]


def _pipe(instruction: str) -> str:
    opcode = re.split(r"[.\s]", instruction, maxsplit=1)[0]
    if opcode in PIPE_OF:
        return PIPE_OF[opcode]
    return "uniform" if opcode[0] == "U" or opcode in ("R2UR", "S2UR") else "alu"


def _operations(instruction: str) -> float:
    """Of one instruction of tensor cores, of a warp: a warpgroup's by four."""
    group = re.match(r"\w?GMMA\.(\d+)x(\d+)x(\d+)", instruction)
    if group:
        m, n, k = map(int, group.groups())
        return 2.0 * m * n * k / 4
    shape = re.match(r"[HI]MMA\.(\d\d)(\d)(\d+)", instruction)
    if not shape:
        raise ValueError(f"an instruction of tensor cores of unknown shape: {instruction}")
    m, n, k = map(int, shape.groups())
    return 2.0 * m * n * k


def bound(instructions: Sequence[str], arch: int) -> Loop:
    """Counts by pipe, clocks of a multiprocessor for one warp, and the share of peak they allow."""
    counts = Counter(map(_pipe, instructions))
    tensor = 0.0
    for each in instructions:
        if _pipe(each) == "tensor":
            half = 2.0 if ".TF32" in each else 1.0
            eighth = 0.5 if each[0] == "I" else 1.0  # 8-bit products are twice as fast
            tensor += _operations(each) * half * eighth / TENSOR[arch]
    clocks = {pipe: counts[pipe] / rate for pipe, rate in PER_CLOCK.items() if pipe != "issue"}
    clocks["issue"] = len(instructions) / PER_CLOCK["issue"]
    longest = max(clocks, key=lambda pipe: clocks[pipe])
    return {
        "instructions": len(instructions),
        "by_pipe": dict(sorted(counts.items())),
        "tensor_share_of_instructions": counts["tensor"] / len(instructions),
        "tensor_clocks": tensor,
        "busiest_other": longest,
        "other_clocks": clocks[longest],
        "bound_overlapped": tensor / max(tensor, clocks[longest]),
        "bound_serial": tensor / (tensor + clocks[longest]),
    }


def _code(cubin: bytes) -> str:
    return said_of(cubin, knobs.nvidia.nvdisasm.path, "-c")


def row_of(case: CompileCase) -> dict[str, Any]:
    """What a shipped case compiles to."""
    result, kernel = compiled(case)
    config = result.config._asdict()
    return _row(asdict(case), config, kernel, case)


def dense_row(arch: int, size: int, config: dict[str, Any]) -> dict[str, Any]:
    """Dense attention with the blocks, warps and stages of a configuration of ours."""
    names = dense_kernel.arg_names
    constants = {"SIZE": size, "BLOCK_M": config["block_m"], "BLOCK_N": config["block_n"]}
    constants["STAGES"] = config["num_stages"]
    types = dict.fromkeys(("Q", "K", "V", "OUT"), "*bf16") | {"scale_log2": "fp32"}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = [n for n, t in signature.items() if t[0] == "*" or n.startswith("stride_")]
    source = ASTSource(
        fn=dense_kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}
    kernel = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options=options | {"enable_fp_fusion": True},
    )
    case = CompileCase(arch, "dense", "bf16", size, config["block_m"], False)
    return _row(asdict(case), config, kernel, case)


def _row(
    about: dict[str, Any], config: dict[str, Any], kernel: Any, case: CompileCase
) -> dict[str, Any]:
    found: list[Loop] = []
    for loop in sorted(loops(_code(kernel.asm["cubin"])), key=len):
        counted = bound(loop, case.arch)
        if counted not in found:  # warpgroups that take turns have a copy each
            found.append(counted)
    row = about | {"config": config, "loops": found}
    if case.kernel in (*ATTENTION, "dense"):  # keys and values of a step
        row["bytes_of_a_step"] = config["block_n"] * case.size * 2 * 2
    return row


def shown(archs: Sequence[int]) -> Iterator[CompileCase]:
    """The cases of the table: what "auto" launches, not what is only asked for by name."""
    for case in cases(archs, ("bf16", "fp32")):
        dtype = "bf16" if case.kernel in ATTENTION else "fp32"
        asked = case.loads != "auto" or case.specialize
        if case.kernel in (*ATTENTION, *SCORES) and case.dtype == dtype and not asked:
            yield case


def rows(archs: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Every case that is shown, and dense attention beside the forward kernel."""
    for case in shown(archs):
        row = row_of(case)
        yield row
        plain = case.kernel == "forward" and case.tile == 128 and not case.key_mask
        if plain and case.size in (64, 128, 256):
            yield dense_row(case.arch, case.size, row["config"])


def table(found: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| card | kernel | head | tile, loads | loop | instructions | tensor | fma | alu | special"
        " | memory | overlapped | serial |",
        "|---|---|--:|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in found:
        loads = row["config"].get("loads") or ""
        hidden = ", key mask" if row["key_mask"] else ""
        where = f"{row['tile']}{', ' + loads if loads else ''}{hidden}"
        for number, loop in enumerate(row["loops"]):
            counts = (loop["by_pipe"].get(p, 0) for p in ("tensor", "fma", "alu", "special"))
            cells = [
                ARCHS[row["arch"]], row["kernel"], row["size"], where, number + 1,
                loop["instructions"], *counts, loop["by_pipe"].get("memory", 0),
                f"{loop['bound_overlapped']:.0%}", f"{loop['bound_serial']:.0%}",
            ]  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _rows(path: Path) -> list[dict[str, Any]]:
    """What a table has."""
    found: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    return found


PAGE = """\
# What the machine code allows

**A model, not a measurement**: no GPU has run these kernels.
`python -m diffpatch.kernels.compile.bounds --write eval/results/static_bounds.json` compiles every
configuration of the forward and selection kernels that "auto" launches, and of the Hopper kernel
scheduled by hand (`gluon`), for Hopper (9.0) and Ada (8.9), finds the
innermost loops that use tensor cores, and counts their instructions by pipe; `dense` is dense
attention in plain Triton with the same blocks. From what each pipe can issue in a clock follow two
bounds on the share of the tensor cores' peak: *overlapped*, if the busiest other pipe hides behind
the tensor cores entirely, and *serial*, if it never does. Memory, latencies, clocks under load and
what happens between loops are left out, so a kernel reaches less than *overlapped*, and *serial*
says where one program a multiprocessor without any overlap would be. Of two loops the shorter is
that of full tiles, the longer that of masked ones. Ada's peak is that of its data-center cards;
GeForce cards have half of it, which raises their shares. Selection multiplies in tf32, three times
for the means.

"""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: writes the JSON, and the page beside this file's folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--page", type=Path, default=Path(__file__).parents[1] / "static_bounds.md")
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=ARCHS, default=tuple(ARCHS), help="others stay"
    )
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    found = [row for row in _rows(options.write) if row["arch"] not in options.arch]
    for row in rows(options.arch):
        found.append(row)
        log.info(
            "sm_%d %s %d: %d loops", row["arch"], row["kernel"], row["size"], len(row["loops"])
        )
    found.sort(key=lambda row: list(ARCHS).index(row["arch"]))
    lines = ",\n".join("  " + json.dumps(row) for row in found)
    options.write.write_text(
        f'{{"model": true, "triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n'
    )
    options.page.write_text(PAGE + table(found) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
