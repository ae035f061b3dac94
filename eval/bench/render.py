"""A whole pipeline call: dense and methods in turns, several times, medians."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffpatch import patched, report
from diffpatch.checking import refuse_dense
from diffpatch.eval.environment import environment
from diffpatch.eval.medians import quartiles
from diffpatch.eval.quality.metrics import psnr, ssim
from diffpatch.internals import execution_device
from diffpatch.pipelines.running.sampling import Sample, sample, warm_up


def bench_render(
    pipe: Any,
    call: dict[str, Any],
    methods: Mapping[str, Mapping[str, Any]],
    *,
    repeats: int = 3,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Time a pipeline dense and with each method; the result is ready for JSON.

    Each variant is warmed up by a short call first. Then all take turns, `repeats` times, on the
    same noise; speedups are medians over rounds of the ratio to dense in the same round.

    Args:
        pipe: an unpatched pipeline.
        call: its arguments, prompt included.
        methods: method name -> options for `diffpatch.patch`.
        repeats: rounds.
        seed: of the noise.
        say: told what runs next.

    Raises:
        BadParameter: a method is called "dense", as what all are compared with is.
    """
    refuse_dense(methods)
    variants: dict[str, Mapping[str, Any] | None] = {"dense": None, **methods}
    for name, options in variants.items():
        say(f"warming up {name}")
        short = None if options is None else {**options, "dense_steps": 0, "dense_last_steps": 0}
        with _applied(pipe, name, short):
            warm_up(pipe, call, seed)
    samples: dict[str, list[Sample]] = {name: [] for name in variants}
    kept = dict.fromkeys(variants, 1.0)
    for number in range(repeats):
        for name, options in variants.items():
            say(f"round {number + 1} of {repeats}: {name}")
            with _applied(pipe, name, options):
                samples[name].append(sample(pipe, call, seed))
                kept[name] = report(pipe).kept if options is not None else 1.0
    return {
        "pipeline": type(pipe).__name__,
        "call": {key: value for key, value in call.items() if isinstance(value, str | int | float)},
        "seed": seed,
        "repeats": repeats,
        "variants": {
            name: {"kept": kept[name], "options": dict(variants[name] or {})}
            | _entry(samples[name], samples["dense"])
            for name in variants
        },
        "environment": environment(execution_device(pipe)),
    }


def _applied(
    pipe: Any, name: str, options: Mapping[str, Any] | None
) -> contextlib.AbstractContextManager[Any]:
    if options is None:
        return contextlib.nullcontext(pipe)
    return patched(pipe, name, **options)


def _entry(runs: Sequence[Sample], dense: Sequence[Sample]) -> dict[str, Any]:
    own, base = [run.clocks for run in runs], [run.clocks for run in dense]
    return {
        "seconds": {name: quartiles([clock[name] for clock in own]) for name in own[0]},
        "speedup": {
            name: quartiles([b[name] / o[name] for o, b in zip(own, base, strict=True)])
            for name in own[0]
        },
        "psnr": psnr(runs[0].frames, dense[0].frames).mean,
        "ssim": ssim(runs[0].frames, dense[0].frames).mean,
    }
