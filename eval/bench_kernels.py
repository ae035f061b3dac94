"""The block-sparse kernels alone, at the shapes of known models, against dense attention.

    diffpatch bench kernels --device cuda --json eval/results/kernels.json
    diffpatch bench kernels --layout permuted gather ordered --loads auto pointer --int8

Each shape is measured with a window of its own and, on GPUs, with neighborhoods that keep 50, 25,
10 and 5 % of the pairs. Each backend's output is checked first; a wrong one is an error and has no
speed. Then everything takes turns: the fastest dense SDPA backend, ours, on GPUs compiled
FlexAttention with the same pairs, NATTEN where it is installed and knows the mask, and, for
comparison, what permuting q, k, v and the output around every call would add. Speedups are medians
of the rounds' ratios; FLOP/s count the pairs of visited tiles, whether an element mask hides them
or not; the bound is what the dense rate would give if nothing but the kept pairs were computed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import diffpatch
from diffpatch.budget import fit_budget
from diffpatch.eval.bench_attention import (
    CHECKED_ROWS,
    DENSE,
    TOLERANCE,
    Case,
    WrongResult,
    interleaved,
    spread,
    visible,
)
from diffpatch.eval.bench_rivals import flex_call, natten_call
from diffpatch.eval.bench_variants import LAYOUTS, LOADS, Variants, variant_calls
from diffpatch.eval.environment import environment
from diffpatch.eval.metrics import relative_l1
from diffpatch.eval.sweep_store import write_text
from diffpatch.kernels.block_sparse import block_sparse_attention, unsupported_reason
from diffpatch.kernels.blocks import BlockIndex

INT8_TOLERANCE = 4e-2  # of 8-bit scores on normal noise
PERMUTING = "permuting"
KEPT = (0.5, 0.25, 0.1, 0.05)  # on GPUs, besides the window of each shape
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """An attention call of a known model, and what to attend to."""

    grid: diffpatch.TokenGrid
    heads: int
    head_dim: int
    method: diffpatch.Method


def _shape(
    grid: tuple[int, int, int],
    heads: int,
    head_dim: int,
    window: tuple[float, float, float],
    stride: str | tuple[int, int, int] = "auto",
    text: int = 0,
) -> Shape:
    token_grid = diffpatch.TokenGrid(*grid, text_after=text)
    return Shape(token_grid, heads, head_dim, diffpatch.Neighborhood(window=window, stride=stride))


SHAPES = {
    # 9 % kept, the case that kernels for tiles are compared on (research on STA and NATTEN).
    "hunyuan": _shape((30, 48, 80), 24, 128, (18, 24, 24), (6, 8, 8)),
    "wan-720p": _shape((21, 45, 80), 40, 128, (11, 23, 24)),
    "wan-480p": _shape((21, 30, 52), 12, 128, (11, 16, 24)),
    "flux-1k": _shape((1, 64, 64), 24, 128, (1, 32, 32), text=512),
    "flux-4k": _shape((1, 256, 256), 24, 128, (1, 80, 80), text=512),
    # For CPUs: 16,384 tokens; windows that many queries share, lists of each tile's own, and a
    # window that slides token by token.
    "small-25%": _shape((16, 32, 32), 4, 64, (0.5, 0.5, 1.0)),
    "small-10%": _shape((16, 32, 32), 4, 64, (0.5, 0.5, 0.4)),
    "small-25%-d128": _shape((16, 32, 32), 4, 128, (0.5, 0.5, 1.0)),
    "small-10%-d128": _shape((16, 32, 32), 4, 128, (0.5, 0.5, 0.4)),
    "small-radial": Shape(diffpatch.TokenGrid(16, 32, 32), 4, 64, diffpatch.Radial()),
    "small-sliding": _shape((16, 32, 32), 4, 64, (9, 17, 17), (1, 1, 1)),
}
SMALL = tuple(name for name in SHAPES if name.startswith("small"))


def bench_kernels(
    device: str | torch.device,
    shapes: Sequence[str],
    *,
    dtypes: Sequence[str] = ("bf16",),
    kept: Sequence[float] = (),
    layouts: Sequence[str] = ("permuted",),
    loads: Sequence[str] = ("auto",),
    int8: bool = False,
    repeats: int = 5,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure the kernels; the result is ready for JSON.

    Args:
        device: where to run.
        shapes: names from `SHAPES`.
        dtypes: names from `DTYPES`.
        kept: fractions of the pairs to keep, in turn, after the window of the shape itself.
        layouts: names from `LAYOUTS`; the torch backend knows "permuted" and "ordered".
        loads: names from `LOADS`, for the Triton kernel.
        int8: whether to measure 8-bit scores too.
        repeats: rounds, in each of which everything runs once.
        say: told what is being measured.

    Raises:
        WrongResult: a backend's output is wrong, so that no speed is reported.
    """
    variants = Variants(tuple(layouts), tuple(loads), int8)
    rows, began = [], time.perf_counter()
    for name, dtype in product(shapes, dtypes):
        shape = SHAPES[name]
        case = Case(
            shape.grid, shape.heads, shape.head_dim, dtype=DTYPES[dtype], device=str(device)
        )
        qkv = case.tensors()
        dense = dense_calls(qkv)
        tried = interleaved(dense, 3, qkv[0].device)
        fastest = min(dense, key=lambda call: median(tried[call]))
        best = {fastest: dense[fastest]}
        for wanted in (None, *kept):
            method = shape.method
            if wanted is not None:
                method = fit_budget("neighborhood", shape.grid, wanted)
            pattern = method.pattern(shape.grid, method.variant(0, 0))
            say(f"{name}, {dtype}: {100 * pattern.kept:.0f} % kept")
            row = _measure(shape, method, pattern, qkv, best, variants, repeats)
            tries = {"dense": {call: spread(times) for call, times in tried.items()}}
            about = {"shape": name, "dtype": dtype, "wanted": wanted, "method": str(method)}
            rows.append({**about, **tries, **row})
    seconds = time.perf_counter() - began
    return {
        "repeats": repeats,
        "seconds": seconds,
        "environment": environment(device),
        "rows": rows,
    }


def _measure(
    shape: Shape,
    method: diffpatch.Method,
    pattern: diffpatch.BlockPattern,
    qkv: Tensors,
    dense: dict[str, Call],
    variants: Variants,
    repeats: int,
) -> dict[str, Any]:
    """One row: `dense` is the call to beat, by its name."""
    dtype, blocks = qkv[0].dtype, pattern.on(qkv[0].device)
    sparse = sparse_calls(qkv, blocks) | variant_calls(qkv, blocks, variants)
    if method == shape.method:  # compiling for every fraction would take most of the time
        sparse |= rival_calls(qkv, blocks, shape)
    chosen, expected = exact_rows(qkv, pattern)
    errors = {}
    for name, call in sparse.items():
        out = call()
        if name.endswith("ordered"):
            out = out[:, blocks.order.argsort()]
        errors[name] = error = relative_l1(out[0, chosen].to(expected.device), expected)
        if not error <= (INT8_TOLERANCE if "int8" in name else TOLERANCE[dtype]):  # or NaN
            raise WrongResult(f"{name} is wrong: relative error {error:.2g}, no speed is reported")
    calls = {**dense, **sparse, PERMUTING: permuting(qkv, blocks)}
    times = interleaved(calls, repeats, qkv[0].device)
    (fastest,) = dense
    flops = 4 * shape.heads * shape.head_dim  # a pair
    visited = visited_pairs(blocks)
    entries = {}
    for name in sparse:
        ratios = [d / s for d, s in zip(times[fastest], times[name], strict=True)]
        entries[name] = {
            "seconds": spread(times[name]),
            "speedup": spread(ratios),
            "tflops": flops * visited / median(times[name]) / 1e12,
            "of_bound": median(ratios) * pattern.kept,
            "error": errors[name],
        }
    return {
        "grid": str(shape.grid),
        "tokens": shape.grid.num_tokens,
        "heads": shape.heads,
        "head_dim": shape.head_dim,
        "kept": pattern.kept,
        "visited": visited / blocks.num_tokens**2,
        "fastest_dense": fastest,
        "dense_seconds": spread(times[fastest]),
        "dense_tflops": flops * blocks.num_tokens**2 / median(times[fastest]) / 1e12,
        "permuting": spread(times[PERMUTING]),
        "sparse": entries,
    }


def exact_rows(qkv: Tensors, pattern: diffpatch.BlockPattern) -> tuple[torch.Tensor, torch.Tensor]:
    """Some query rows of the first batch entry, and the fp64 attention they should have.

    Returns:
        int64 (R,) and fp64 (R, H, D), on the device of q if that knows fp64.
    """
    q, k, v = (x[0] for x in qkv)
    chosen = torch.randperm(len(q), generator=torch.Generator().manual_seed(0))[:CHECKED_ROWS]
    device = q.device if q.device.type == "cuda" else torch.device("cpu")
    mask = visible(pattern, chosen, heads=q.shape[1])
    heads = []
    for h in range(q.shape[1]):  # one at a time: fp64 copies of everything would fill the memory
        query = q[chosen.to(q.device), h].to(device, torch.float64)
        key, value = (x[:, h].to(device, torch.float64) for x in (k, v))
        seen = mask[h].to(device)
        heads.append(F.scaled_dot_product_attention(query, key, value, attn_mask=seen))
    return chosen.to(q.device), torch.stack(heads, 1)


def visited_pairs(blocks: BlockIndex) -> int:
    """Query-key pairs of the tiles that a block index visits; of the first pattern, if several."""
    sizes, tiles = blocks.starts.long().diff(), blocks.num_tiles
    row = torch.arange(tiles, device=blocks.device)
    row = row.repeat_interleave(blocks.row_ptr[: tiles + 1].diff())
    return int((sizes[row] * sizes[blocks.cols.long()[: len(row)]]).sum())


def permuting(qkv: Tensors, blocks: BlockIndex) -> Call:
    """Put q, k and v in tile order and an output of their size back, and nothing else."""
    place = blocks.order.argsort()

    def call() -> torch.Tensor:
        q, _, _ = (x[:, blocks.order] for x in qkv)
        return q[:, place]

    return call


def sparse_calls(qkv: Tensors, blocks: BlockIndex) -> dict[str, Call]:
    """Every block-sparse implementation that a model would call on these tensors."""
    calls: dict[str, Call] = {}
    for name in ("triton", "torch"):
        slower = name == "torch" and calls and qkv[0].device.type == "cuda"
        if unsupported_reason(qkv[0], blocks, name) is None and not slower:
            calls[name] = partial(block_sparse_attention, *qkv, blocks, backend=name)
    return calls


def rival_calls(qkv: Tensors, blocks: BlockIndex, shape: Shape) -> dict[str, Call]:
    """On GPUs, what others ship for the same mask."""
    calls: dict[str, Call] = {}
    if qkv[0].device.type == "cuda":
        calls["flex"] = flex_call(qkv, blocks, compiled=True)
        natten = natten_call(qkv, shape.grid, shape.method)
        if natten is not None:
            calls["natten"] = natten
    return calls


def dense_calls(qkv: Tensors) -> dict[str, Call]:
    """Every fused SDPA backend that runs on these tensors, or the unfused one if none does.

    Each with the tensors as they are, and with ones that lie head by head, which can be faster.
    """
    as_they_are: list[torch.Tensor] = [x.transpose(1, 2) for x in qkv]
    by_head = [x.contiguous() for x in as_they_are]
    calls: dict[str, Call] = {}
    for name in DENSE:
        if name == "MATH" and calls:
            continue
        try:
            _dense(name, *as_they_are)
        except RuntimeError:  # torch has no such kernel for this device, dtype or head size
            continue
        calls[name] = partial(_dense, name, *as_they_are)
        calls[f"{name}, by head"] = partial(_dense, name, *by_head)
    return calls


def _dense(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(getattr(SDPBackend, name)):
        return F.scaled_dot_product_attention(q, k, v)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: the table, and with ``--json`` everything, to a file or to stdout."""
    parser = argparse.ArgumentParser(
        prog="diffpatch bench kernels", description="Measure the block-sparse kernels alone."
    )
    parser.add_argument("--device", default=None, help="cpu, cuda, … (a GPU, if there is one)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="all; the small ones on a CPU")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument(
        "--kept", nargs="*", type=float, help="fractions to keep; 0.5 0.25 0.1 0.05 on a GPU"
    )
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=["permuted"])
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=["auto"])
    parser.add_argument("--int8", action="store_true", help="measure 8-bit scores too")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="JSON to a file, or - for stdout"
    )
    options = parser.parse_args(argv)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    large = tuple(name for name in SHAPES if name not in SMALL)
    kept = () if device == "cpu" else KEPT
    result = bench_kernels(
        device,
        options.shapes or (SMALL if device == "cpu" else large),
        dtypes=options.dtype,
        kept=kept if options.kept is None else options.kept,
        layouts=options.layout,
        loads=options.loads,
        int8=options.int8,
        repeats=options.repeats,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    text = json.dumps(result, indent=1)
    print(text if options.json == "-" else _table(result))
    if options.json not in (None, "-"):
        write_text(Path(options.json), text + "\n")
        print(f"wrote {options.json}")
    return 0


def _table(result: dict[str, Any]) -> str:
    lines = [
        f"{'shape':16}{'dtype':6}{'tokens':>8}{'kept':>7}  "
        f"{'backend':24}{'ms':>10}{'speedup':>9}{'TFLOP/s':>9}{'of bound':>9}"
    ]
    for row in result["rows"]:
        start = f"{row['shape']:16}{row['dtype']:6}{row['tokens']:8}{row['kept']:7.3f}  "
        dense = 1e3 * row["dense_seconds"]["median"]
        lines.append(f"{start}{'dense':24}{dense:10.2f}{1.0:9.2f}{row['dense_tflops']:9.2f}")
        for name, entry in row["sparse"].items():
            seconds, speedup = entry["seconds"]["median"], entry["speedup"]["median"]
            lines.append(
                f"{start}{name:24}{1e3 * seconds:10.2f}{speedup:9.2f}{entry['tflops']:9.2f}"
                f"{entry['of_bound']:9.0%}"
            )
        lines.append(f"{start}{'(permuting)':24}{1e3 * row['permuting']['median']:10.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
