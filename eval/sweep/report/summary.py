"""From the runs of a sweep to its rows, and to the method to pick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from diffpatch.eval.sweep.report.rows import Row, behind, row
from diffpatch.eval.sweep.report.verdict import Verdict, verdict
from diffpatch.eval.sweep.schema import BadSweep
from diffpatch.eval.sweep.scores import set_distances
from diffpatch.files import read_json

MEASURED = (
    "Times are wall-clock seconds of whole pipeline calls (total) or of their denoising steps, the"
    " device synchronised before every reading; medians over prompts and seeds. Every method was"
    " warmed up by a two-step call that does not count. A speedup is the median of ratios to dense"
    " from the same process, on the same prompt and noise, timed shortly before;"
    " “dense beside” is its time. “Busy” says that the machine did other work at the same time, so"
    " that times are unreliable."
)
QUALITY = (
    "Quality compares the frames, with 8 bits a channel and before any video compression, to the"
    " dense frames of the same prompt and seed: PSNR in dB (at most 100) and SSIM (Gaussian window,"
    " 11×11, sigma 1.5), means over frames, then over prompts and seeds. “Kept” counts query-key"
    " pairs of all self-attention of a run, dense steps and layers included. “Caption”, for the"
    " demo model, is the share of the caption's six attributes that a classifier reads from the"
    " clip, and “log p” the mean logarithm of the probability it gives to the right ones, which"
    " tells apart what is read alike; the CLIP score is 100 times the cosine with the prompt."
    " “By branch” is the attention error of each guidance branch, and “between branches” how far"
    " their errors are apart, relative to their outputs, which guidance multiplies. “Slope” is how"
    " much of what differs from token to token is left in attention outputs, 1 in dense ones."
    " “dB to the best” is the mean difference of PSNR to the method with the highest at the same"
    " cost, in brackets its 95 % bootstrap interval over prompts, which are drawn in pairs. The"
    " dense rows marked “other” are the noise floor: the same run by other code, and from other"
    " noise. KD is the kernel distance between all clips of a row and the dense ones: 0"
    " for independent sets that differ by chance only. Clips of the same prompts and noise are not"
    " independent, so that rows close to dense fall below 0; it is rough for so few clips."
)


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
        BadSweep: its runs were judged by different networks.
    """
    plan = read_json(folder / "sweep.json")
    if plan is None:
        raise FileNotFoundError(f"{folder} has no sweep.json")
    found = [read_json(folder / "runs" / name / "run.json") for name in plan["runs"]]
    failed = [read_json(folder / "failed" / f"{name}.json") for name in plan["runs"]]
    results = [result for result in found if result is not None]
    _check_judges(folder, results)
    failures = [failure for failure in failed if failure is not None]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["setting"], result["label"]), []).append(result)
    rows = [row(group, set_distances(folder, group)) for group in groups.values()]
    rows = [_ranked(one, rows) for one in rows]
    rows = [replace(one, behind=behind(one, rows)) for one in rows]
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


def _check_judges(folder: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Scores of different networks do not meet in one table, also where a rescore was cut off."""
    judges = [result["judged_by"] for result in results if "judged_by" in result]
    other = next((each for each in judges if each != judges[0]), None)
    if other is None:
        return
    name = next(key for key in {**judges[0], **other} if judges[0].get(key) != other.get(key))
    raise BadSweep(
        f"{name}: runs in {folder} were judged by {judges[0].get(name, 'none')} and others by"
        f" {other.get(name, 'none')}; add --rescore to judge all of them anew"
    )


def _ranked(row: Row, rows: Sequence[Row]) -> Row:
    """The row, marked if nothing in its setting, dense included, is both faster and closer."""
    if row.kind != "method" or row.gain <= 1:
        return row
    rivals = [o for o in rows if o.setting == row.setting and o.kind == "method" and o is not row]
    own = row.gain, row.quality["psnr"]
    beaten = any(o.gain >= own[0] and o.quality["psnr"] >= own[1] for o in rivals)
    return Row(**{**vars(row), "best": not beaten})
