"""From the runs of a sweep to one row a method, and to the method to pick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from diffpatch.eval.files import read_json
from diffpatch.eval.medians import quartiles
from diffpatch.eval.sweep.scores import set_distances
from diffpatch.pipelines.running.sampling import CLOCKS


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
}
KD = "KD ×1000"

MEASURED = (
    "Times are wall-clock seconds of whole pipeline calls (total) or of their denoising steps, the"
    " device synchronised before every reading; medians over prompts and seeds. Every method was"
    " warmed up by a two-step call that does not count. A speedup is the median of ratios to dense"
    " from the same process, on the same prompt and noise, timed shortly before."
)
QUALITY = (
    "Quality compares the frames, with 8 bits a channel and before any video compression, to the"
    " dense frames of the same prompt and seed: PSNR in dB (at most 100) and SSIM (Gaussian window,"
    " 11×11, sigma 1.5), means over frames, then over prompts and seeds. “Kept” counts query-key"
    " pairs of all self-attention of a run, dense steps and layers included. “Caption”, for the"
    " demo model, is the share of the caption's six attributes that a classifier reads from the"
    " clip; the CLIP score is 100 times the cosine with the prompt. The dense rows marked “other”"
    " are the noise floor: the same run by other code, and from other noise. KD is the kernel"
    " distance between all clips of a row and the dense ones: 0 for independent sets that differ by"
    " chance only. Clips of the same prompts and noise are not independent, so that rows close to"
    " dense fall below 0; it is rough for so few clips."
)


@dataclass(frozen=True)
class Row:
    """All runs of one variant in one setting.

    Attributes:
        setting: model, size and steps.
        label: the variant, for people.
        kind: "dense", "kernel", "seed" or "method".
        facts: what all its runs have in common: model, method, parameters, dtype, ….
        runs: how many.
        kept: mean kept fraction of a run.
        dense_steps: first denoising steps that kept everything.
        dense_layers: layers that kept everything.
        seconds: clock -> median and quartiles; empty where nothing was timed.
        speedup: clock -> median and quartiles.
        peak_gib: most accelerator memory.
        quality: metric -> mean.
        attention_error: mean relative L1 distance of attention outputs to dense, if measured.
        kept_per_layer: layer -> mean kept fraction.
        error_per_layer: layer -> mean attention error.
        distances: of all its clips to the dense ones, as sets; empty for few clips.
        shared: whether processes shared the device while it was timed.
        best: whether nothing else, dense included, is both faster and closer to dense.
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
    quality: Mapping[str, float]
    attention_error: float | None
    kept_per_layer: Mapping[str, float]
    error_per_layer: Mapping[str, float]
    shared: bool
    distances: Mapping[str, Any]
    best: bool = False

    @property
    def gain(self) -> float:
        """The median speedup end to end; 1 for dense."""
        return self.speedup["total"]["median"] if self.speedup else 1.0


@dataclass(frozen=True)
class Verdict:
    """Which method to pick in one setting, and by which rule."""

    setting: str
    pick: str | None
    text: str
    rule: str


@dataclass(frozen=True)
class Summary:
    """A whole sweep.

    Attributes:
        title: of the sweep.
        rows: by setting, dense first.
        verdicts: one a setting.
        results: every finished run, as its run.json holds it.
        failures: every failed run, with its error.
        missing: runs that are neither.
        bar: the quality that a method must have to be picked.
    """

    title: str
    rows: tuple[Row, ...]
    verdicts: tuple[Verdict, ...]
    results: tuple[dict[str, Any], ...]
    failures: tuple[dict[str, Any], ...]
    missing: int
    bar: Mapping[str, float]

    @property
    def settings(self) -> list[str]:
        """In the order of the sweep."""
        return list(dict.fromkeys(row.setting for row in self.rows))

    def to_dict(self) -> dict[str, Any]:
        """Rows and verdicts, ready for JSON."""
        return {
            "title": self.title,
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
            "rows": [asdict(row) for row in self.rows],
            "failures": [
                {key: f[key] for key in ("name", "label", "error")} for f in self.failures
            ],
            "missing": self.missing,
            "measured": MEASURED,
            "quality": QUALITY,
        }


def summarize(folder: Path) -> Summary:
    """Read the folder of a sweep.

    Raises:
        FileNotFoundError: it is none.
    """
    plan = read_json(folder / "sweep.json")
    if plan is None:
        raise FileNotFoundError(f"{folder} has no sweep.json")
    found = [read_json(folder / "runs" / name / "run.json") for name in plan["runs"]]
    failed = [read_json(folder / "failed" / f"{name}.json") for name in plan["runs"]]
    results = [result for result in found if result is not None]
    failures = [failure for failure in failed if failure is not None]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["setting"], result["label"]), []).append(result)
    rows = [row(group, set_distances(folder, group)) for group in groups.values()]
    rows = [_ranked(one, rows) for one in rows]
    settings = dict.fromkeys(one.setting for one in rows)
    return Summary(
        title=plan["title"],
        rows=tuple(rows),
        verdicts=tuple(
            verdict([one for one in rows if one.setting == name], plan["bar"]) for name in settings
        ),
        results=tuple(results),
        failures=tuple(failures),
        missing=len(found) - len(results) - len(failures),
        bar=plan["bar"],
    )


FACTS = (
    "model", "pipeline", "dtype", "offload", "vae_tiling", "settings", "method", "parameters",
    "options", "wanted", "fitted", "environment",
)  # fmt: skip


def row(group: Sequence[Mapping[str, Any]], distances: Mapping[str, Any]) -> Row:
    """One variant from its runs, and from its distance to dense."""
    first = group[0]
    timed = [result for result in group if "seconds" in result]
    reports = [result["report"] for result in group if "report" in result]
    errors = [result["attention_error"] for result in group if "attention_error" in result]
    peaks = [peak for r in timed if (peak := r["seconds"]["peak_gib"]) is not None]
    layers = _mean_by_key([report["kept_per_layer"] for report in reports])
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
        quality=_mean_by_key([_numbers(result["quality"]) for result in group]),
        attention_error=fmean(error["mean"] for error in errors) if errors else None,
        kept_per_layer=layers,
        error_per_layer=_mean_by_key([error["per_layer"] for error in errors]),
        shared=any(result["shared"] for result in timed),
        distances=distances,
    )


def verdict(rows: Sequence[Row], bar: Mapping[str, float]) -> Verdict:
    """The fastest method above the bar of quality."""
    wanted = " and ".join(
        f"{METRICS[key].heading} ≥ {value:g}{_UNITS.get(key, '')}" for key, value in bar.items()
    )
    rule = (
        "Rule: the highest median speedup of a whole call among the methods that are faster than"
        f" dense{' and have a mean ' + wanted if wanted else ''}."
    )
    able = [one for one in rows if one.kind == "method"]
    fast = [one for one in able if one.gain > 1]
    good = [
        one for one in fast if all(one.quality.get(key, 0.0) >= least for key, least in bar.items())
    ]
    notes = ""
    if any(one.shared for one in rows):
        notes += " Processes shared the processor, so speedups are rough."
    setting = rows[0].setting if rows else ""
    if good:
        pick = max(good, key=lambda one: one.gain)
        text = f"Pick {pick.label}: {pick.gain:.2f}× faster end to end, {_quality_text(pick)}."
        return Verdict(setting, pick.label, text + notes, rule)
    unmeasured = [key for key in bar if not any(key in one.quality for one in able)]
    if not fast:
        text = "Stay dense: no method is faster here."
    elif unmeasured:
        names = " and ".join(METRICS[key].heading for key in unmeasured)
        text = f"No verdict: {names} could not be measured on these clips; set another bar."
    else:
        near = max(fast, key=lambda one: one.quality["psnr"])
        text = (
            f"No method clears the bar. The closest to dense is {near.label}: {near.gain:.2f}×"
            f" faster, {_quality_text(near)}."
        )
    return Verdict(setting, None, text + notes, rule)


_UNITS = {"psnr": " dB"}


def _quality_text(row: Row) -> str:
    parts = [f"PSNR {row.quality['psnr']:.1f} dB", f"SSIM {row.quality['ssim']:.3f}"]
    return f"{', '.join(parts)}, {row.kept:.0%} of the pairs kept"


def _ranked(row: Row, rows: Sequence[Row]) -> Row:
    """The row, marked if nothing in its setting, dense included, is both faster and closer."""
    if row.kind != "method" or row.gain <= 1:
        return row
    rivals = [o for o in rows if o.setting == row.setting and o.kind == "method" and o is not row]
    own = row.gain, row.quality["psnr"]
    beaten = any(o.gain >= own[0] and o.quality["psnr"] >= own[1] for o in rivals)
    return Row(**{**vars(row), "best": not beaten})


def _spreads(clocks: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    known = [name for name in CLOCKS if clocks and all(c.get(name) is not None for c in clocks)]
    return {name: quartiles([clock[name] for clock in clocks]) for name in known}


def _mean_by_key(tables: Sequence[Mapping[str, float]]) -> dict[str, float]:
    keys = dict.fromkeys(key for table in tables for key in table)
    return {key: fmean(table[key] for table in tables if key in table) for key in keys}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in values.items() if isinstance(v, int | float)}


def _leading(kept: Sequence[float]) -> int:
    count = 0
    while count < len(kept) and kept[count] >= 1:
        count += 1
    return count
