"""Sweeps: methods × parameters × prompts × seeds, each run once, whatever happens in between.

Runs are claimed one by one, so that any number of processes may work on the same folder, in one
`accelerate launch` or in several terminals. A process that ends in the middle of a run, by kill -9
or otherwise, loses that run only, and whoever is left or comes next does it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffpatch.eval.processes import Process
from diffpatch.eval.sweep.plan import Rendering
from diffpatch.eval.sweep.schema import BadSweep
from diffpatch.eval.sweep.session import Session
from diffpatch.eval.sweep.spec import SweepSpec
from diffpatch.eval.sweep.store import Store
from diffpatch.files import DamagedFile, DiskFull, read_json, write_json

Say = Callable[[str], None]


@dataclass
class Progress:
    """What is done and how long the rest takes, for stderr."""

    total: int
    done: int
    say: Say
    workers: int = 1
    durations: list[float] = field(default_factory=list)
    limit: float | None = None  # of the monotonic clock

    @property
    def is_over(self) -> bool:
        """Whether there is no time for another run."""
        longest = max(self.durations, default=0.0)
        return self.limit is not None and time.monotonic() + longest > self.limit

    def finished(self, run: Rendering, result: Mapping[str, Any], seconds: float) -> None:
        """A run of this process ended well."""
        self.durations.append(seconds)
        facts = []
        if "seconds" in result:
            facts.append(f"{result['seconds']['denoising'] or result['seconds']['total']:.1f} s")
        if "speedup" in result:
            gain = result["speedup"]
            facts.append(f"{gain.get('denoising') or gain['total']:.2f}×")
        if "psnr" in result["quality"]:
            facts.append(f"{result['quality']['psnr']:.1f} dB")
        self._line(run, ", ".join(facts))

    def failed(self, run: Rendering, error: BaseException) -> None:
        """A run of this process failed."""
        lines = str(error).strip().splitlines() or [""]
        self._line(run, f"FAILED, {type(error).__name__}: {lines[0]}")

    def _line(self, run: Rendering, text: str) -> None:
        width = len(str(self.total))
        left = f" | {_duration(self.left)} left" if self.durations and self.left else ""
        self.say(f"[{self.done:{width}}/{self.total}] {run.title}: {text}{left}")

    @property
    def left(self) -> float:
        """Seconds until everything is done, at the pace so far."""
        pace = sum(self.durations) / max(1, len(self.durations))
        return pace * (self.total - self.done) / self.workers


def run_sweep(
    spec: SweepSpec,
    plan: Mapping[str, list[Rendering]],
    store: Store,
    process: Process,
    say: Say,
    *,
    device: str | None = None,
    rescore: bool = False,
    minutes: float | None = None,
) -> list[Rendering]:
    """Do every run of a plan that is neither done nor failed.

    Args:
        spec: what is swept.
        plan: its runs by model.
        store: where they go.
        process: which of several processes this is.
        say: told about progress.
        device: the one that the user asked for.
        minutes: begin no run that would not end within so many, judged by the longest so far.
        rescore: whether the quality of earlier runs is computed anew afterwards.

    Returns:
        The runs that have failed, by this process or another.

    Raises:
        BadSweep: the runs in the folder were judged by other networks.
        DiffpatchError: a model cannot be loaded, or a method does not fit it; nothing was run.
    """
    if not rescore:
        _check_networks(store, spec)
    runs = [run for found in plan.values() for run in found]
    for run in runs:
        if (damaged := store.mend(run)) is not None:
            say(f"{damaged} is damaged: {run.title} is done again")
    limit = None if minutes is None else time.monotonic() + 60 * minutes
    progress = Progress(len(runs), 0, say, limit=limit)
    for model, found in plan.items():
        if not progress.is_over and any(store.is_pending(run) for run in found):
            say(f"loading {model}")
            session = Session(store, spec, model, process, device)
            session.check(found)
            _write_plan(store, spec, runs)
            _work(session, found, runs, progress)
    left = sum(store.is_pending(run) for run in runs)
    if left and progress.is_over:
        verb = "runs do" if left > 1 else "run does"
        say(f"{left} {verb} not fit into {minutes:g} minutes; the same command goes on")
    _write_plan(store, spec, runs)  # also where nothing was left to do: the bar may be another
    return [run for run in runs if store.failure(run) is not None]


def _work(
    session: Session, found: list[Rendering], runs: list[Rendering], progress: Progress
) -> None:
    """Do the runs of one model: first those that nobody else does, then wait for the others."""
    store, process = session.store, session.process
    # Processes begin at different scenes, so that each has its own dense run and clock.
    scenes = list(dict.fromkeys(run.dense.key for run in found))
    start = len(scenes) * process.rank // process.count
    rank = {scene: number for number, scene in enumerate(scenes[start:] + scenes[:start])}
    ordered = sorted(found, key=lambda run: rank[run.dense.key])
    for wait in (False, True):
        for run in ordered:
            if progress.is_over:
                return
            if not store.is_pending(run):
                continue
            with store.claim(run, wait) as mine:
                if mine and store.is_pending(run):
                    _attempt(session, run, runs, progress)


def _attempt(session: Session, run: Rendering, runs: list[Rendering], progress: Progress) -> None:
    store, start = session.store, time.monotonic()
    result: dict[str, Any] | None = None
    failure: Exception | None = None
    try:
        result = session.do(run)
    except DiskFull:  # no other run would have space either
        raise
    except Exception as error:  # whatever it is, the other runs go on
        failure = error
        store.fail(run, error, session.facts(run))
    progress.workers = 1 + store.others()
    progress.done = sum(not store.is_pending(other) for other in runs)
    if result is not None:
        progress.finished(run, result, time.monotonic() - start)
    elif failure is not None:
        progress.failed(run, failure)


def _check_networks(store: Store, spec: SweepSpec) -> None:
    """Scores of different networks must not meet in one table."""
    path = store.root / "sweep.json"
    try:
        found = read_json(path)
    except DamagedFile:  # it is written anew
        return
    before = (found or {}).get("networks", {})
    if found is not None and before != dict(spec.networks):
        raise BadSweep(
            f"networks: the runs in {store.root} were judged by {before or 'those shipped'}; add"
            " --rescore to judge them anew, or choose another -o"
        )


def _write_plan(store: Store, spec: SweepSpec, runs: list[Rendering]) -> None:
    """What the report is about; the same from every process."""
    about = {"title": spec.title, "bar": dict(spec.bar), "networks": dict(spec.networks)}
    write_json(store.root / "sweep.json", about | {"runs": [run.name for run in runs]})


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"
