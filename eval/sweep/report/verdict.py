"""Which method to pick: the fastest whose pictures are good enough, on every prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffpatch.eval.load import busy, worst
from diffpatch.eval.sweep.paste import line
from diffpatch.eval.sweep.report.rows import METRICS, Row

UNITS = {"psnr": " dB"}
FASTER = 1.02  # speedup from which a method counts as faster: less is what times scatter by


@dataclass(frozen=True)
class Verdict:
    """Which method to pick in one setting, and by which rule.

    Attributes:
        setting: model, size and steps.
        pick: label of the row; None to stay dense.
        text: the verdict.
        rule: how it was found.
        sure: whether every prompt clears the bar, on a machine that was quiet.
        line: what to paste; None without a pick.
    """

    setting: str
    pick: str | None
    text: str
    rule: str
    sure: bool = True
    line: str | None = None


def verdict(rows: Sequence[Row], bar: Mapping[str, float]) -> Verdict:
    """The fastest method above the bar of quality: on every prompt, or at least in the mean."""
    able = [row for row in rows if row.kind == "method"]
    fast = [row for row in able if row.gain >= FASTER]
    in_the_mean = [row for row in fast if _clears(row.quality, bar)]
    always = [row for row in in_the_mean if _clears(row.least, bar)]
    noise = busy(worst(row.load for row in rows))
    pick = max(always or in_the_mean, key=lambda row: row.gain, default=None)
    if pick is not None:
        text = _picked(pick, bar, sure=bool(always), bolder=in_the_mean)
    else:
        text = _none(able, fast, bar, noise)
    if any(row.shared for row in rows):
        text += " Processes shared the processor, so speedups are rough."
    if noise:
        text += f" The machine was busy ({noise}): times are unreliable, so run it again."
    return Verdict(
        setting=rows[0].setting if rows else "",
        pick=None if pick is None else pick.label,
        text=text,
        rule=_rule(bar),
        sure=bool(always) and not noise,
        line=None if pick is None else paste(pick),
    )


def paste(row: Row) -> str:
    """The line of Python that does what a row did, with what it gained here."""
    remark = f"{row.gain:.1f}×, {row.quality['psnr']:.0f} dB here"
    if row.busy:
        remark += ", on a busy machine"
    return line(str(row.facts["method"]), row.patch, remark)


def quality_text(row: Row) -> str:
    """How close a row is to dense, its worst prompt included."""
    spread = ""
    if row.runs > 1:
        spread = f" (worst {row.least['psnr']:.1f}, median {row.middle['psnr']:.1f})"
    parts = [f"PSNR {row.quality['psnr']:.1f} dB{spread}", f"SSIM {row.quality['ssim']:.3f}"]
    return f"{', '.join(parts)}, {row.kept:.0%} of the pairs kept"


def _clears(quality: Mapping[str, float], bar: Mapping[str, float]) -> bool:
    return all(quality.get(key, 0.0) >= least for key, least in bar.items())


def _rule(bar: Mapping[str, float]) -> str:
    wanted = _wanted(bar)
    good = f" that have {wanted} on every prompt, else in the mean" if bar else ""
    return (
        f"Rule: the highest median speedup of a whole call, at least {FASTER:g}×, among the"
        f" methods{good}."
    )


def _wanted(bar: Mapping[str, float]) -> str:
    return " and ".join(
        f"{METRICS[key].heading} ≥ {least:g}{UNITS.get(key, '')}" for key, least in bar.items()
    )


def _picked(pick: Row, bar: Mapping[str, float], sure: bool, bolder: Sequence[Row]) -> str:
    found = f"{pick.gain:.2f}× faster end to end, {quality_text(pick)}."
    if not sure:
        failed = " and ".join(
            f"{METRICS[key].heading} {METRICS[key].form.format(pick.least[key])}"
            for key, least in bar.items()
            if pick.least.get(key, 0.0) < least
        )
        return f"Pick {pick.label} with care: {found} Its worst prompt has {failed}, below the bar."
    other = max(bolder, key=lambda row: row.gain)
    if other is pick:
        return f"Pick {pick.label}: {found}"
    return (
        f"Pick {pick.label}: {found} In the mean {other.label} clears the bar too, at"
        f" {other.gain:.2f}×, but not on every prompt."
    )


def _none(
    able: Sequence[Row], fast: Sequence[Row], bar: Mapping[str, float], noise: str | None
) -> str:
    unmeasured = [key for key in bar if not any(key in row.quality for row in able)]
    if not able:
        return "No verdict: no method was measured yet."
    if not fast and noise:
        return "No verdict: no method was faster here, which may be the machine's fault."
    if not fast:
        return "Stay dense: no method is faster here."
    if unmeasured:
        names = " and ".join(METRICS[key].heading for key in unmeasured)
        return f"No verdict: {names} could not be measured on these clips; set another bar."
    near = max(fast, key=lambda row: row.quality["psnr"])
    return (
        f"No method clears the bar. The closest to dense is {near.label}: {near.gain:.2f}×"
        f" faster, {quality_text(near)}."
    )
