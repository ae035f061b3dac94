"""The result of a rendering: as data for the JSON file, and as a table for people."""

from __future__ import annotations

from typing import Any

from diffpatch.eval.card import CardText, machine
from diffpatch.eval.load import busy, worst
from diffpatch.eval.quality.metrics import Score, psnr, ssim
from diffpatch.eval.sweep.paste import arguments, line
from diffpatch.pipelines.running.sampling import CLOCKS, Sample
from diffpatch.tables import table

MEASURED = (
    "Wall-clock seconds, with the device synchronised before every reading. denoising: all steps, "
    "from the first call of the transformer to the end of the last step. total: denoising, plus "
    "encoding the prompt and decoding the frames. Every variant was first warmed up by a two-step "
    "call that is not counted; then each ran once, one after the other, from the same noise."
)
COMPILED = " Compilation happened in one more whole call before each, not counted either."
QUALITY = (
    "Means over frames, of the frames in memory before encoding. PSNR in dB, at most 100; SSIM "
    "with a Gaussian window, 11×11, sigma 1.5, data range 1."
)


def timing(sample: Sample) -> dict[str, Any]:
    """The times of one run."""
    found = {name: sample.clocks.get(name) for name in CLOCKS}
    times: dict[str, Any] = {
        **{name: None if value is None else round(value, 4) for name, value in found.items()},
        "steps": [round(seconds, 4) for seconds in sample.step_seconds],
    }
    if sample.peak_bytes is not None:
        times["peak_gib"] = round(sample.peak_bytes / 2**30, 3)
    return times


def quality(sample: Sample, reference: Sample) -> dict[str, Any]:
    """PSNR and SSIM of one run to another."""

    def entry(score: Score, digits: int) -> dict[str, Any]:
        return {
            "mean": round(score.mean, digits),
            "per_frame": [round(value, digits) for value in score.per_frame],
        }

    scores = psnr(sample.frames, reference.frames), ssim(sample.frames, reference.frames)
    return {
        "reference": "dense",
        "psnr": entry(scores[0], 3),
        "ssim": entry(scores[1], 5),
        "definition": QUALITY,
    }


def speedup(dense: dict[str, Any], fast: dict[str, Any]) -> dict[str, float]:
    """How many times faster, by each of the clocks."""
    return {
        name: round(dense[name] / fast[name], 3) for name in CLOCKS if dense[name] and fast[name]
    }


def busy_with(result: dict[str, Any]) -> str | None:
    """Why the times of a result are unreliable, if they are."""
    return busy(worst(run.get("load", {}) for run in result["runs"].values()))


def card_text(result: dict[str, Any]) -> CardText:
    """What the card of a comparison says."""
    name, fast = list(result["runs"].items())[-1]  # dense is the first
    options = arguments(None, {}, fast["options"])
    return CardText(
        label=name,
        speedup=result["speedup"]["total"],
        psnr=result["quality"]["psnr"]["mean"],
        kept=fast["kept"],
        line=line(name, options),
        prompt=result["prompt"],
        small=machine(result["environment"], [result["model"]]),
        busy=busy_with(result),
    )


def lines(result: dict[str, Any]) -> list[list[str]]:
    """The figures of one prompt: a heading, and a line each."""
    runs: dict[str, Any] = result["runs"]
    gains = result.get("speedup", {})
    rows = [["", *runs] + (["speedup"] if gains else [])]
    for label, key in (("denoising", "denoising"), ("a step", "step_median"), ("total", "total")):
        times = [run["seconds"][key] for run in runs.values()]
        if all(time is not None for time in times):
            gain = [f"{gains[key]:.2f}×"] if key in gains else [""] * bool(gains)
            rows.append([label, *(f"{time:.2f} s" for time in times), *gain])
    blank = [""] * bool(gains)
    rows.append(["pairs kept", *(f"{run['kept']:.1%}" for run in runs.values()), *blank])
    for name, digits, unit in _METRICS if "quality" in result else ():
        score = result["quality"][name]["mean"]
        rows.append([f"{name.upper()} to dense", "", f"{score:.{digits}f}{unit}", *blank])
    return rows


def describe(result: dict[str, Any]) -> str:
    """The result of one prompt as a short table."""
    head = [f"“{result['prompt']}”, seed {result['seed']}", table(lines(result))]
    fallbacks = _fallbacks(result["runs"])
    if noise := busy_with(result):
        fallbacks.append(f"The machine was busy ({noise}): these times are unreliable, try again")
    return "\n".join(head + fallbacks + [f"wrote {path}" for path in result["files"].values()])


_METRICS = (("psnr", 1, " dB"), ("ssim", 3, ""))


def _fallbacks(runs: dict[str, Any]) -> list[str]:
    """Why calls of an accelerated run were dense."""
    reports = [run["report"] for run in runs.values() if "report" in run]
    return [
        f"dense: {count} of {report['calls']} attention calls ({why})"
        for report in reports
        for why, count in report["reasons"].items()
    ]
