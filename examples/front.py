"""Caches, held steps, sparse attention and both on one front, for the demo models.

    python examples/front.py --models demo --steps 30 --reduced         # about 7 minutes
    python examples/front.py --models demo-long --steps 30 --reduced    # about 20 minutes
    python examples/front.py                                            # all of it: some hours

Stopped at any moment, the same command goes on. Writes ``front.json`` and ``front.md`` with
versions, device and commit, and the settings, page and picture of every model and number of steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffpatch.cli import main
from diffpatch.eval.environment import environment
from diffpatch.eval.tuned.table import answer, describe, gains
from diffpatch.files import write_json, write_text
from diffpatch.targets.front import measured_points
from diffpatch.targets.settings import Settings

TARGET = "30 dB"
TUNED_WITH = [
    "a large red circle moves left over a black background",
    "a small blue ring grows over a gray background",
    "a large yellow square moves down over a navy background",
    "a small white cross shrinks over a striped green background",
]
FRESH = [
    "a small purple circle shrinks over a striped gray background",
    "a small green square grows over a gray background",
    "a large red square moves right over a striped gray background",
    "a small green circle moves right over a navy background",
    "a small yellow cross moves right over a gray background",
    "a large blue circle moves left over a brown background",
    "a small orange triangle moves up over a gray background",
    "a large blue cross moves up over a pink background",
    "a large cyan triangle moves left over a brown background",
    "a large yellow ring moves left over a gray background",
    "a large red triangle shrinks over a black background",
    "a small cyan cross moves down over a brown background",
]
MANY = {"demo": 12, "demo-long": 4}  # fresh prompts
FEW = {"demo": 2, "demo-long": 0}  # with --reduced


def run() -> None:
    """Tune every model at every number of steps, and write one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MANY, default=list(MANY))
    parser.add_argument("--steps", nargs="+", type=int, default=[10, 30])
    parser.add_argument("--reduced", action="store_true", help="one prompt, fewer clips")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/front"))
    args = parser.parse_args()
    found: dict[str, Any] = {"environment": environment(), "reduced": args.reduced, "settings": {}}
    texts = []
    for model in args.models:
        for steps in args.steps:
            name = f"{model}, {steps} steps"
            settings = tuned(model, steps, args.reduced, args.output)
            chosen = answer(settings, TARGET)
            found["settings"][name] = facts(settings)
            texts += [f"## {name}", "", "```", describe(settings, chosen), "```", ""]
    write_json(args.output / "front.json", found)
    write_text(args.output / "front.md", "\n".join(texts))
    print(f"wrote {args.output / 'front.json'} and {args.output / 'front.md'}")


def tuned(model: str, steps: int, reduced: bool, folder: Path) -> Settings:
    """What `diffpatch tune` finds out, from its file where it is there."""
    path = folder / f"{model}-{steps}.json"
    if not path.is_file():
        own = TUNED_WITH[:1] if reduced else TUNED_WITH
        fresh = FRESH[: (FEW if reduced else MANY)[model]]
        words = ["tune", "-m", model, "--steps", str(steps), "--curve-steps", str(min(steps, 10))]
        words += [word for prompt in own + fresh for word in ("-p", prompt)]
        words += ["--hold-out", str(len(fresh)), "--target", TARGET, "-o", str(path)]
        words += [
            "--render",
            str(len(own)),
            "--kept",
            *(["0.25"] if reduced else ["0.25", "0.125"]),
        ]
        words += ["--caches", *(["0.1", "0.2"] if reduced else ["0.05", "0.1", "0.15", "0.2"])]
        words += ["--holds", "0.0025", "0.005", "0.01", *([] if reduced else ["0.02"])]
        words += ["--dense-steps", *(["0.5"] if reduced else ["0.15", "0.5"])]
        if main(words):
            raise SystemExit(1)
    return Settings.load(path)


def facts(settings: Settings) -> dict[str, Any]:
    """Every point of the front, the gains at equal quality, and the checks."""
    return {
        "measured_on": settings.measured_on.model_dump(),
        "points": [
            {"label": p.applied.label, "speedup": 1 / p.time, "psnr": p.psnr, "low": p.low,
             "calls": p.calls} for p in measured_points(settings.front)
        ],
        "runs": [run.model_dump() for run in settings.front],
        "gains": [
            {"psnr": level, "cache_alone": alone, "best": best}
            for level, alone, best in gains(settings)
        ],
        "checked": [one.model_dump() for one in settings.checked],
    }  # fmt: skip


if __name__ == "__main__":
    run()
