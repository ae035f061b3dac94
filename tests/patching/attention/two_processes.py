"""What two processes compute together, run by `test_parallel.py` as a program of its own.

    python -m tests.patching.attention.two_processes result.json

Both are forked after the imports, which cost more than everything else here, and before torch has
made any threads. Rank 0 writes what it found; an exception in either ends the program with code 1.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from torch.multiprocessing.spawn import start_processes

import diffpatch
from diffpatch import BlockPattern, DiffpatchError, Method, Neighborhood, TokenGrid
from diffpatch.cli import main
from diffpatch.patterns.build import from_axes
from diffpatch.patterns.tiles import Tiling
from tests import tiny
from tests.tiny import Tiny, images, videos
from tests.tiny.parts import Bare

PROCESSES = 2
LOCAL = Neighborhood(window=(1, 3, 3), stride=1)
# Two heads that see much and two that see little: dealt out, each process has one of both.
UNEVEN = Neighborhood(heads=((3, 2, 3), (3, 2, 2), (1, 1, 3), (1, 1, 1)), stride=1)
SKIPPING = diffpatch.Temporal(over=UNEVEN, mode="skip")


@dataclass(frozen=True)
class TwoKindsOfHeads(Method):
    """The first head of two sees its row, the second its column."""

    name = "two-kinds-of-heads"

    def pattern(self, grid: TokenGrid, variant: Hashable = None) -> BlockPattern:
        axes = [torch.ones(n, n, dtype=torch.bool) for n in grid.shape]
        rows = [axes[0], torch.eye(grid.height, dtype=torch.bool), axes[2]]
        columns = [axes[0], axes[1], torch.eye(grid.width, dtype=torch.bool)]
        return from_axes(grid, Tiling.even(grid, (1, 2, 2)), [rows, columns], head_pattern=[0, 1])


def cut(pipe: Any, **config: Any) -> None:
    """Spread the sequence over both processes."""
    config = config or {"ulysses_degree": PROCESSES}
    model = getattr(pipe, "transformer", pipe)
    model.enable_parallelism(config=ContextParallelConfig(**config))


def four_heads() -> Tiny:
    """Wan, with heads that are worth dealing out."""
    return tiny.wan(heads=4)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def compare(
    build: Callable[[], Tiny], method: Any = LOCAL, steps: int = 1, **config: Any
) -> dict[str, Any]:
    """A patched model alone against the same over both processes, patched before and after."""
    alone = build()
    steps = 0 if isinstance(alone, Bare) else steps
    dense = alone.run()
    diffpatch.patch(alone.pipe, method, dense_steps=steps)
    expected, report = alone.run(), diffpatch.report(alone.pipe)
    assert difference(expected, dense) > 1e-4, "the patch must matter"
    found: dict[str, Any] = {"kept": report.kept}
    for order in ("patch first", "cut first"):
        model = build()
        if order == "patch first":
            diffpatch.patch(model.pipe, method, dense_steps=steps)
        cut(model.pipe, **config)
        diffpatch.patch(model.pipe, method, dense_steps=steps)
        found[order] = difference(model.run(), expected)
        report = diffpatch.report(model.pipe)
        kept = torch.tensor(report.kept)
        dist.all_reduce(kept)  # heads may differ in what they keep
        found[f"kept, {order}"] = float(kept) / PROCESSES
        found[f"reasons, {order}"] = sorted(report.reasons)
        diffpatch.unpatch(model.pipe)
        found[f"dense, {order}"] = difference(model.run(), dense)
    return found


def compiled() -> float:
    """The blocks compiled into whole graphs, over both processes."""
    alone, model = images.flux(), images.flux()
    diffpatch.patch(alone.pipe, LOCAL, dense_steps=1)
    diffpatch.patch(model.pipe, LOCAL, dense_steps=1)
    cut(model.pipe)
    model.pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    return difference(model.run(), alone.run())


def two_runs() -> float:
    """A request in the middle of another, each with its scheduler, over both processes."""
    method = diffpatch.Temporal(over=LOCAL, refresh=3)
    requests: list[dict[str, Any]] = [{"height": 64}, {"height": 96}]
    alone, model = videos.wan(), videos.wan()
    for one in (alone, model):
        diffpatch.patch(one.pipe, method, dense_steps=1)
    call: dict[str, Any] = {"width": 64, "num_inference_steps": 4, "output_type": "latent"}
    expected = [alone.run(**call, **request) for request in requests]
    cut(model.pipe)
    other = copy.copy(model.pipe)
    other.scheduler = copy.deepcopy(model.pipe.scheduler)
    found: list[torch.Tensor] = []

    def callback(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 1:
            found.append(Tiny(other, model.call).run(**call, **requests[1]))
        return {}

    outer = model.run(**call, **requests[0], callback_on_step_end=callback)
    return max(difference(a, b) for a, b in zip([outer, *found], expected, strict=True))


def refusal(change: Callable[[Tiny], Any]) -> str:
    """What a patched model says to a change and a run after it."""
    model = videos.wan()
    diffpatch.patch(model.pipe, LOCAL, dense_steps=0)
    try:
        change(model)
        model.run()
    except DiffpatchError as error:
        return str(error)
    return ""


def ring(model: Tiny) -> None:
    cut(model.pipe, ring_degree=PROCESSES)


def fresh_processors(model: Tiny) -> None:
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    cut(model.pipe)
    model.pipe.transformer.set_attn_processor(WanAttnProcessor())


def training(model: Tiny) -> None:
    cut(model.pipe)
    model.pipe.transformer(
        torch.randn(1, 16, 3, 4, 8), torch.tensor([500]), torch.randn(1, 7, 32), return_dict=False
    )


def render(rank: int, folder: Path) -> list[int]:
    """Three prompts rendered by the command line, twice; the exit codes."""
    if rank == 0:
        tiny.flux().pipe.save_pretrained(folder / "model")
        (folder / "prompts.txt").write_text("a cat\na dog\na fox\n", encoding="utf-8")
    dist.barrier()
    command = ["render", "-m", str(folder / "model"), "--prompt-file", str(folder / "prompts.txt")]
    command += ["-o", str(folder / "out"), "--method", "window", "--set", "window=0.5"]
    command += ["--height", "16", "--width", "32", "--steps", "2", "--quiet", "--resume"]
    first = main(command)
    dist.barrier()
    return [first, main(command), main([*command, "--json"])]


def work(rank: int, target: str, meeting: str) -> None:
    """One process."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=PROCESSES)
    # diffusers numbers processes modulo the accelerators, of which a CPU has none.
    torch.accelerator.device_count = lambda: 1
    found = {
        "wan": compare(videos.wan),
        "flux": compare(images.flux),
        "kontext": compare(images.flux_kontext),
        "qwen": compare(images.qwen),
        "flux2": compare(images.flux2_references),
        "two kinds of heads": compare(images.flux, TwoKindsOfHeads()),
        "temporal": compare(videos.wan, diffpatch.Temporal(over=LOCAL), steps=0),
        "uneven heads": compare(four_heads, UNEVEN),
        "uneven heads, temporal": compare(
            four_heads, diffpatch.Temporal(over=UNEVEN, mode="skip"), steps=0
        ),
        "anything": compare(images.flux, ulysses_degree=2, ulysses_anything=True),
        "compiled": compiled(),
        "two runs": two_runs(),
        "ring": refusal(ring),
        "fresh processors": refusal(fresh_processors),
        "training": refusal(training),
        "render": render(rank, Path(target).parent),
    }
    if rank == 0:
        Path(target).write_text(json.dumps(found, indent=2), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        arguments = sys.argv[1], f"{folder}/meeting"
        start_processes(work, arguments, nprocs=PROCESSES, start_method="fork")
