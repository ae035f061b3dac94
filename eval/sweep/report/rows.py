"""One row of a report: all runs of one way to render, in one setting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple, TypeVar

from diffpatch.eval.load import busy, worst
from diffpatch.eval.medians import paired_interval, quartiles
from diffpatch.pipelines.running.sampling import CLOCKS

T = TypeVar("T")


class Metric(NamedTuple):
    """How a metric is shown."""

    heading: str
    form: str


METRICS = {
    "psnr": Metric("PSNR", "{:.1f}"),
    "ssim": Metric("SSIM", "{:.3f}"),
    "lpips": Metric("LPIPS", "{:.3f}"),
    "clip_score": Metric("CLIP score", "{:.1f}"),
    "caption_accuracy": Metric("caption", "{:.0%}"),
    "caption_log_prob": Metric("log p", "{:.3f}"),
    "caption_motion": Metric("motion", "{:.0%}"),
    "caption_color": Metric("colour", "{:.0%}"),
    "caption_shape": Metric("shape", "{:.0%}"),
    "objects": Metric("objects", "{:.2f}"),
    "repetition": Metric("repetition", "{:.2f}"),
}
FEWEST_PROMPTS = 4  # that an interval is made of
KD = "KD ×1000"


@dataclass(frozen=True)
class Row:
    """All runs of one way in one setting.

    Attributes:
        setting: model, size and steps.
        label: the way, for people.
        kind: "dense", "kernel", "seed" or "method".
        facts: what all its runs have in common: model, method, parameters, dtype, ….
        runs: how many.
        kept: mean kept fraction of a run.
        dense_steps: first denoising steps that kept everything.
        dense_layers: layers that kept everything.
        seconds: clock -> median and quartiles; empty where nothing was timed.
        speedup: clock -> median and quartiles.
        dense_seconds: clock -> median and quartiles of the dense times that speedups were divided
            from; after an interruption they are not those of the dense row.
        peak_gib: most accelerator memory.
        quality: metric -> mean over the prompts and seeds that have it.
        middle: metric -> median of the same.
        least: metric -> that of the prompt that has the least.
        counts: metric -> how many runs have it.
        each: the speedup and PSNR of every run, with its prompt.
        attention_error: mean relative L1 distance of attention outputs to dense, if measured.
        error_per_branch: the same of each guidance branch.
        slope: of attention outputs on dense ones, below 1 where they are smoother.
        error_between: how far these errors of two branches are apart, which guidance multiplies.
        kept_per_layer: layer -> mean kept fraction.
        error_per_layer: layer -> mean attention error.
        distances: of all its clips to the dense ones, as sets; empty for few clips.
        shared: whether processes shared the device while it was timed.
        load: how busy the machine was at its worst, as `diffpatch.eval.load` tells it.
        patch: arguments of `diffpatch.patch` that do the same.
        kept_map: kept fraction by step and layer, of the first run.
        best: whether nothing else, dense included, is both faster and closer to dense.
        by_prompt: the PSNR of each prompt, the mean over its seeds.
        behind: its PSNR less that of the row with the highest at the same cost, a mean over prompts
            with its bootstrap interval; None for that row itself and for few prompts.
    """

    setting: str
    label: str
    kind: str
    facts: Mapping[str, Any]
    runs: int
    kept: float
    dense_steps: int
    dense_layers: int
    seconds: Mapping[str, dict[str, float]]
    speedup: Mapping[str, dict[str, float]]
    peak_gib: float | None
    dense_seconds: Mapping[str, dict[str, float]]
    quality: Mapping[str, float]
    middle: Mapping[str, float]
    least: Mapping[str, float]
    counts: Mapping[str, int]
    each: tuple[dict[str, Any], ...]
    attention_error: float | None
    kept_per_layer: Mapping[str, float]
    error_per_layer: Mapping[str, float]
    shared: bool
    load: Mapping[str, float]
    patch: Mapping[str, Any]
    kept_map: tuple[tuple[float | None, ...], ...]
    distances: Mapping[str, Any]
    best: bool = False
    by_prompt: Mapping[str, float] = field(default_factory=dict)
    behind: Mapping[str, float] | None = None
    error_per_branch: Mapping[str, float] = field(default_factory=dict)
    error_between: float | None = None
    slope: float | None = None

    @property
    def gain(self) -> float:
        """The median speedup end to end; 1 for dense."""
        return self.speedup["total"]["median"] if self.speedup else 1.0

    @property
    def busy(self) -> str | None:
        """Why its times are unreliable, in a few words; None on a quiet machine."""
        return busy(self.load)


FACTS = (
    "model", "pipeline", "dtype", "offload", "vae_tiling", "settings", "method", "parameters",
    "options", "wanted", "fitted", "environment",
)  # fmt: skip


def row(group: Sequence[Mapping[str, Any]], distances: Mapping[str, Any]) -> Row:
    """One way from its runs, and from its distance to dense."""
    first = group[0]
    timed = [result for result in group if "seconds" in result]
    reports = [result["report"] for result in group if "report" in result]
    errors = [result["attention_error"] for result in group if "attention_error" in result]
    between = [x for error in errors if (x := error.get("difference")) is not None]
    slopes = [error["slope"] for error in errors if "slope" in error]
    peaks = [peak for r in timed if (peak := r["seconds"]["peak_gib"]) is not None]
    layers = _by_key(fmean, [report["kept_per_layer"] for report in reports])
    quality = [_numbers(result["quality"]) for result in group]
    return Row(
        setting=first["setting"],
        label=first["label"],
        kind=first["kind"],
        facts={key: first[key] for key in FACTS if key in first},
        runs=len(group),
        kept=fmean(result["kept"] for result in group),
        dense_steps=min((_leading(report["kept_per_step"]) for report in reports), default=0),
        dense_layers=sum(kept >= 1 for kept in layers.values()),
        seconds=_spreads([result["seconds"] for result in timed]),
        speedup=_spreads([result["speedup"] for result in timed if "speedup" in result]),
        peak_gib=max(peaks, default=None),
        dense_seconds=_spreads([r["dense"]["seconds"] for r in timed if "speedup" in r]),
        quality=_by_key(fmean, quality),
        middle=_by_key(median, quality),
        least=_by_key(min, quality),
        counts=_by_key(len, quality),
        each=tuple(_point(result) for result in timed if "speedup" in result),
        attention_error=fmean(error["mean"] for error in errors) if errors else None,
        kept_per_layer=layers,
        error_per_layer=_by_key(fmean, [error["per_layer"] for error in errors]),
        shared=any(result["shared"] for result in timed),
        load=worst(clock.get("load", {}) for clock in _clocks(timed)),
        patch=first.get("patch", {**first["parameters"], **first["options"]}),
        kept_map=tuple(map(tuple, reports[0].get("kept_map", ()))) if reports else (),
        distances=distances,
        by_prompt=_psnr_by_prompt(group),
        error_per_branch=_by_key(fmean, [error.get("per_branch", {}) for error in errors]),
        error_between=fmean(between) if between else None,
        slope=fmean(slopes) if slopes else None,
    )


def behind(row: Row, rows: Sequence[Row]) -> Mapping[str, float] | None:
    """How far the PSNR of a method is from that of the best one at the same cost."""
    if row.kind != "method" or not row.by_prompt:
        return None
    same = (row.setting, row.facts.get("wanted"))
    rivals = [
        o for o in rows
        if o.kind == "method" and o.by_prompt and (o.setting, o.facts.get("wanted")) == same
    ]  # fmt: skip
    leader = max(rivals, key=lambda one: fmean(one.by_prompt.values()))
    shared = [prompt for prompt in row.by_prompt if prompt in leader.by_prompt]
    if leader is row or len(shared) < FEWEST_PROMPTS:
        return None
    return paired_interval([row.by_prompt[p] - leader.by_prompt[p] for p in shared])


def prompt_of(result: Mapping[str, Any]) -> str:
    """What a run shows: its prompt, and the image that it starts from, if there is one."""
    text, image = str(result["prompt"]), result.get("image")
    if image is None:
        return text
    return f"{text} ({Path(image['path']).name}, {image['sha256'][:6]})".lstrip()


def _psnr_by_prompt(group: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for result in group:
        if "psnr" in result["quality"]:
            found.setdefault(prompt_of(result), []).append(float(result["quality"]["psnr"]))
    return {prompt: fmean(values) for prompt, values in found.items()}


def _spreads(clocks: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    known = [name for name in CLOCKS if clocks and all(c.get(name) is not None for c in clocks)]
    return {name: quartiles([clock[name] for clock in clocks]) for name in known}


def _by_key(of: Callable[[list[float]], T], tables: Sequence[Mapping[str, float]]) -> dict[str, T]:
    """A mean, median, minimum or count of every key, over the tables that have it."""
    keys = dict.fromkeys(key for table in tables for key in table)
    return {key: of([table[key] for table in tables if key in table]) for key in keys}


def _point(result: Mapping[str, Any]) -> dict[str, Any]:
    """One run, for a plot."""
    gain, psnr = result["speedup"]["total"], result["quality"]["psnr"]
    return {"prompt": prompt_of(result), "seed": result["seed"], "gain": gain, "psnr": psnr}


def _clocks(timed: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The times of runs, and of the dense runs that they were compared with."""
    for result in timed:
        yield result["seconds"]
        if "speedup" in result:
            yield result["dense"]["seconds"]


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in values.items() if isinstance(v, int | float)}


def _leading(kept: Sequence[float]) -> int:
    count = 0
    while count < len(kept) and kept[count] >= 1:
        count += 1
    return count
