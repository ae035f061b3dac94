"""What cache-dit's caches come to on the same prompt as a front, to compare with held steps.

    pip install cache-dit
    python examples/rivals.py -m demo --steps 30 -o rivals.json    # about 4 minutes

Renders dense, then with cache-dit's DBCache at some thresholds with and without Taylor's
extrapolation, then with steps held by diffpatch, all in one process, each warmed up. Times are of
the denoising, less what other processes took of it. Prints a table and writes it with versions,
device and commit.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import diffpatch
from diffpatch.eval.environment import environment
from diffpatch.files import write_json
from diffpatch.pipelines.running.calls import fitted_call, preset_call
from diffpatch.pipelines.running.loading import find, load_pipeline
from diffpatch.pipelines.running.sampling import Sample, sample, warm_up
from diffpatch.tuning.tune import psnr

PROMPT = "a large red circle moves left over a black background"
CACHES = ((0.08, False), (0.12, False), (0.24, False), (0.24, True))  # threshold, Taylor or not
HOLDS = (0.0025, 0.005, 0.01)
WARM_UP = 4  # steps that DBCache computes first


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="cache-dit beside held steps.")
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("-p", "--prompt", default=PROMPT)
    parser.add_argument("-o", "--output", type=Path, default=Path("rivals.json"))
    args = parser.parse_args(argv)
    source = find(args.model)
    pipe = load_pipeline(source)
    call = fitted_call({**preset_call(source), "num_inference_steps": args.steps}, pipe)
    call["prompt"] = args.prompt
    rows = list(measured(pipe, call, args.steps))
    for row in rows:
        print(f"{row['label']:30} {row['speedup']:.2f}×  {row['psnr']:.1f} dB")
    write_json(args.output, {"environment": environment(), "call": call, "rows": rows})
    print(f"wrote {args.output}")


def measured(pipe: Any, call: dict[str, Any], steps: int) -> Iterator[dict[str, Any]]:
    """Dense first, then every way: its label, speedup of the denoising and PSNR to dense."""
    dense = rendered(pipe, call)
    for threshold, taylor in CACHES:
        with dbcache(pipe, threshold, steps, taylor):
            clip = rendered(pipe, call)
        yield row(f"DBCache {threshold:g}{', Taylor' if taylor else ''}", clip, dense)
    for hold in HOLDS:
        with diffpatch.patched(pipe, "dense", dense_steps=0, dense_layers=0, hold=hold):
            clip = rendered(pipe, call)
        yield row(f"hold {hold:g}", clip, dense)


@contextmanager
def dbcache(pipe: Any, threshold: float, steps: int, taylor: bool) -> Iterator[None]:
    """A pipeline with cache-dit's cache, for the length of a block."""
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=WARM_UP,
        residual_diff_threshold=threshold, num_inference_steps=steps,
    )  # fmt: skip
    more = {"calibrator_config": cache_dit.TaylorSeerCalibratorConfig()} if taylor else {}
    cache_dit.enable_cache(pipe, cache_config=config, **more)
    try:
        yield
    finally:
        cache_dit.disable_cache(pipe)


def rendered(pipe: Any, call: dict[str, Any]) -> Sample:
    """A clip, after a short call that does not count."""
    with torch.no_grad():
        warm_up(pipe, call, 0)
        return sample(pipe, call, 0)


def row(label: str, clip: Sample, dense: Sample) -> dict[str, Any]:
    """What a way came to."""
    seconds, full = (x.clocks["denoising"] * x.cpu_share for x in (clip, dense))
    return {
        "label": label, "speedup": full / seconds, "psnr": psnr(clip.frames, dense.frames),
        "seconds": seconds, "dense_seconds": full,
    }  # fmt: skip


if __name__ == "__main__":
    main()
