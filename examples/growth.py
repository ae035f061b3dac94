"""How time and memory of one attention layer grow with the length of a clip.

    python examples/growth.py -o growth.json

Dense, `radial`, `longer` and `linear` on the heads and frames of the demo model, whose clips
have 13 frames, from 1 to 8 times that long. Prints a table and writes the figures and a
picture of them beside the JSON. About a minute on one idle core. Times are of the processor, not of
the wall, so that what else runs on the machine matters little; memory is the peak above what was
there before, as Linux counts it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import diffpatch
from diffpatch import Linear, Longer, Method, Radial, TokenGrid

TRAINED = 13  # frames of a clip
METHODS: dict[str, Method | None] = {
    "dense": None,
    "radial": Radial(decay=1.0),
    "longer": Longer(trained=TRAINED),
    "linear": Linear(),
}
COLORS = {"dense": "black", "radial": "royalblue", "longer": "crimson", "linear": "seagreen"}


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Growth of attention with the length of a clip.")
    parser.add_argument("-o", "--output", type=Path, default=Path("growth.json"))
    parser.add_argument("--side", type=int, default=16, help="rows and columns of tokens (16)")
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--times", type=int, nargs="+", default=[1, 2, 4, 8], help="trained length")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [
        measure(name, method, TokenGrid(TRAINED * times, args.side, args.side), args.heads)
        for times in args.times
        for name, method in METHODS.items()
    ]
    print(table(rows))
    args.output.write_text(json.dumps({"rows": rows, "growth": growth(rows)}, indent=1) + "\n")
    picture(rows).save(args.output.with_suffix(".png"))


def measure(name: str, method: Method | None, grid: TokenGrid, heads: int) -> dict[str, Any]:
    """Seconds and peak memory of one call, and of making its pattern."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, grid.num_tokens, heads, 64, generator=generator) for _ in range(3))
    if method is None:
        a, b, c = (x.transpose(1, 2) for x in (q, k, v))
        call: Callable[[], Any] = lambda: F.scaled_dot_product_attention(a, b, c)  # noqa: E731
        kept, planned = 1.0, 0.0
    else:
        start = time.process_time()
        kept = method.pattern(grid, method.variant(0, 0)).kept
        planned = time.process_time() - start
        call = lambda: diffpatch.attention(q, k, v, grid, method)  # noqa: E731
    with torch.no_grad():
        call()  # finds its pattern, which a run does once
        before = peak_memory(reset=True)
        start = time.process_time()
        call()
        seconds = time.process_time() - start
    return {
        "method": name,
        "frames": grid.num_frames,
        "tokens": grid.num_tokens,
        "kept": kept,
        "seconds": seconds,
        "pattern_seconds": planned,
        "peak_mib": (peak_memory() - before) / 2**20,
    }


def peak_memory(reset: bool = False) -> int:
    """The most memory that this process held since the last reset, in bytes (Linux only)."""
    if reset:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what is new
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status does not tell the peak memory")


def growth(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of every method, the power of the tokens by which its time grows: 2 is quadratic."""
    powers = {}
    for name in METHODS:
        own = [row for row in rows if row["method"] == name]
        more = math.log(own[-1]["tokens"] / own[0]["tokens"])
        powers[name] = math.log(own[-1]["seconds"] / own[0]["seconds"]) / more if more else 0.0
    return powers


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The figures as text."""
    lines = [f"{'method':8} {'frames':>6} {'tokens':>7} {'kept':>7} {'seconds':>8} {'MiB':>7}"]
    lines += [
        f"{r['method']:8} {r['frames']:6} {r['tokens']:7,} {r['kept']:7.1%} {r['seconds']:8.2f}"
        f" {r['peak_mib']:7.0f}"
        for r in rows
    ]
    powers = ", ".join(f"{name} {power:.2f}" for name, power in growth(rows).items())
    return "\n".join([*lines, f"time grows with the tokens to the power of: {powers}"])


def picture(rows: Sequence[dict[str, Any]], width: int = 680, height: int = 400) -> Image.Image:
    """Time against length, both logarithmic; times at the ends of each line."""
    image = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    left, right, top, bottom = 76, width - 110, 34, height - 44
    x, y = ([math.log2(row[key]) for row in rows] for key in ("tokens", "seconds"))

    def place(row: dict[str, Any]) -> tuple[float, float]:
        across = (math.log2(row["tokens"]) - min(x)) / max(max(x) - min(x), 1)
        up = (math.log2(row["seconds"]) - min(y)) / max(max(y) - min(y), 1)
        return left + across * (right - left), bottom - up * (bottom - top)

    draw.rectangle((left, top, right, bottom), outline="lightgray")
    for row in (row for row in rows if row["method"] == "dense"):
        at, words = place(row)[0], f"{row['tokens']:,}"
        draw.line((at, top, at, bottom), fill="lightgray")
        draw.text((at, bottom + 6), words, fill="black", font=font, anchor="ma")
    middle = ((left + right) / 2, height - 6)
    draw.text(middle, "tokens (both axes logarithmic)", fill="black", font=font, anchor="mb")
    draw.text((8, 8), "seconds of one layer on one thread", fill="black", font=font)
    lines = {name: [place(r) for r in rows if r["method"] == name] for name in METHODS}
    lowest = 0.0  # of the labels so far, from the top
    for name, points in sorted(lines.items(), key=lambda line: line[1][-1][1]):
        draw.line(points, fill=COLORS[name], width=3)
        (at, up), last = points[-1], [r for r in rows if r["method"] == name][-1]
        lowest = max(up, lowest + 16)
        label = f"{name} {last['seconds']:.2g} s"
        draw.text((at + 6, lowest), label, fill=COLORS[name], font=font, anchor="lm")
    return image


if __name__ == "__main__":
    main()
