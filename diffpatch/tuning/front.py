"""Rendering the front: what sparse attention, skipped steps and both come to on a model."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffpatch.checking import checked
from diffpatch.errors import BadParameter
from diffpatch.methods.base import Method
from diffpatch.methods.dense import Dense
from diffpatch.methods.dynamic.method import Dynamic
from diffpatch.patching.api import owners, patched, report
from diffpatch.patching.target import transformers
from diffpatch.pipelines.running.sampling import Sample, named, sample, warm_up
from diffpatch.targets.choice import Chosen, choose_for, chosen_for
from diffpatch.targets.front import Applied
from diffpatch.targets.settings import Checked, Measured, Settings, check_lengths
from diffpatch.targets.target import Target
from diffpatch.tuning.tune import psnr
from diffpatch.tuning.unfinished import Unfinished, ties_of

SPARSE = (0.25,)  # kept fractions of sparse calls that are rendered, beside dense attention
DENSE_STEPS = (0.15, 0.5)  # parts of a run that stay dense before: early errors grow, late ones not
STEPS = "steps"  # the unit that is no clip
CACHES = (0.05, 0.1, 0.2)  # thresholds of the step cache, beside none
DENSE = Dense()
EVERYTHING = Dynamic(kept=1.0, rest="drop")  # dense attention by the kernels of sparse attention
HOLDS = (0.0025, 0.005, 0.01)  # tolerances within which steps are held, beside none


@dataclass(frozen=True)
class Advance:
    """How far a long job is.

    Attributes:
        what: the unit that begins.
        done: units that are finished.
        units: units in all.
        left: seconds that the others will take, by those that are done; None before the first.
    """

    what: str
    done: int
    units: int
    left: float | None


OnAdvance = Callable[[Advance], None]


@checked()
def measure_front(
    pipe: Any,
    settings: Settings,
    prompts: Sequence[str] | None = None,
    *,
    call: Mapping[str, Any] | None = None,
    seed: int = 0,
    sparse: Sequence[float] = SPARSE,
    dense_steps: Sequence[float] = DENSE_STEPS,
    caches: Sequence[float] | None = None,
    holds: Sequence[float] = HOLDS,
    path: str | Path | None = None,
    on_progress: OnAdvance | None = None,
) -> Settings:
    """Render prompts with sparse attention, with steps cached or held, and with both; time them.

    Targets in dB and in speed are then chosen from what was seen. On n prompts with s fractions,
    each after d parts of the run, c thresholds and h tolerances it renders
    n · (s · d + 1) · (c + h + 1) clips, of which n are dense and the others faster, and one that is
    dense by another kernel: nothing can be closer to dense than that is.

    Args:
        pipe: the pipeline that the settings are of. A patch that it carries is back afterwards.
        settings: with curves, as `diffpatch.tune` returns them.
        prompts: to render; None takes the first two that the curves were made from. One does not
            tell how much prompts differ.
        call: other arguments of the pipeline's call, as in `diffpatch.tune`.
        seed: of the noise.
        sparse: kept fractions of sparse calls; each is dealt out over the heads by the curves.
        dense_steps: first steps that stay dense before sparse ones, as fractions of the run.
        caches: thresholds of diffusers' FirstBlockCache; None takes `CACHES`, and none where
            diffusers cannot cache the model.
        holds: tolerances within which steps are held, as in `diffpatch.patch`.
        path: where the result is written, and what is done kept beside it, so that the same call
            goes on after it was stopped and loses at most the clip it was at, and the dense one of
            its prompt, which is rendered again so that times of one process are compared.
        on_progress: called before every clip.

    Raises:
        BadParameter: there is nothing to render, or the settings are of another model.
    """
    if prompts is None:
        prompts = settings.measured_on.prompts[:2]
    prompts = list(dict.fromkeys(prompts))
    check_lengths(prompts)
    if caches is None:
        caches = CACHES if _can_cache(pipe) else ()
    ways = _ways(sparse, dense_steps, caches, holds)
    if not all(0 <= part < 1 for part in dense_steps):
        raise BadParameter(f"dense_steps={dense_steps!r} must be fractions of a run, below 1")
    if not prompts or not ways:
        raise BadParameter(
            f"prompts={prompts!r}, sparse={sparse!r}, caches={caches!r}, holds={holds!r}: there is"
            " nothing to render"
        )
    job = _Job(pipe, settings, dict(call or {}), seed, path, len(prompts) * (1 + len(ways)) + 1)
    floor = None
    for prompt in prompts:
        job.begin(prompt, on_progress)
        floor = job.floor(prompt, on_progress) if floor is None else floor
        for applied in ways:
            job.measure(prompt, applied, on_progress)
    seen = {"front": job.measured, "floor": floor, "steps": job.steps()}
    found = settings.model_copy(update=seen)
    if path is not None:
        found.save(path)
    job.finish()
    return found


@checked()
def check_prompts(
    pipe: Any,
    settings: Settings,
    target: str,
    prompts: Sequence[str],
    *,
    call: Mapping[str, Any] | None = None,
    seed: int = 0,
    path: str | Path | None = None,
    on_progress: OnAdvance | None = None,
) -> Settings:
    """Render prompts that no curve was made from, with what a target comes to, and note the result.

    Args:
        pipe: as in `measure_front`.
        settings: as there.
        target: such as "30 dB".
        prompts: to check with; those of the curves are refused.
        call: as there.
        seed: as there.
        path: as there.
        on_progress: as there.

    Raises:
        BadParameter: the target cannot be reached, or a prompt is not a fresh one.
    """
    wanted = Target.parse(target)
    check_lengths(prompts)
    known = {*settings.measured_on.prompts, *(run.prompt for run in settings.front)}
    stale = [prompt for prompt in prompts if prompt in known]
    if stale or not prompts:
        raise BadParameter(f"prompts={stale or prompts!r}: give some that were not tuned with")
    chosen = choose_for(settings, wanted)
    job = _Job(pipe, settings, dict(call or {}), seed, path, 2 * len(prompts))
    for prompt in prompts:
        job.begin(prompt, on_progress)
        job.check(prompt, str(wanted), chosen, on_progress)
    checked = [one for one in settings.checked if one.target != str(wanted)] + job.checked
    found = settings.model_copy(update={"checked": checked})
    if path is not None:
        found.save(path)
    job.finish()
    return found


def _can_cache(pipe: Any) -> bool:
    """Whether diffusers knows the blocks of every transformer."""
    try:
        with patched(pipe, Dense(), dense_steps=0, dense_layers=0, cache=CACHES[0]):
            pass
    except BadParameter:
        return False
    return True


def _ways(
    sparse: Sequence[float],
    dense_steps: Sequence[float],
    caches: Sequence[float],
    holds: Sequence[float],
) -> list[Applied]:
    """What is rendered beside dense, cheapest kernels first."""
    first = [(1.0, 0.0), *itertools.product((kept for kept in sparse if kept < 1), dense_steps)]
    skips = [(None, None), *((cache, None) for cache in caches), *((None, hold) for hold in holds)]
    found = [Applied(*one, *skip) for one in dict.fromkeys(first) for skip in skips]
    return list(dict.fromkeys(found))[1:]


class _Job:
    """Rendering one clip after the other, and remembering what is done."""

    def __init__(
        self, pipe: Any, settings: Settings, call: dict[str, Any], seed: int,
        path: str | Path | None, units: int,
    ) -> None:  # fmt: skip
        from diffpatch.patching.swap.cache import foreign_cache  # imports diffusers, which is slow

        found = transformers(pipe, None)
        for name, model, _ in found:
            if (other := foreign_cache(model)) is not None:
                raise BadParameter(
                    f"{other} is enabled on {name}, and tuning needs dense runs: call"
                    " disable_cache() first"
                )
        settings.check_model({name: model for name, model, _ in found})
        self._pipe, self._settings, self._seed = pipe, settings, seed
        self._call, self._units = call, units
        self._name = next(iter(settings.measured_on.transformers))
        curves = settings.model_dump_json(include={"measured_on", "curves"})
        self._done = Unfinished(path, ".clips", ties_of(curves, call, seed))
        self._warm: set[str] = set()
        self._spent: list[float] = []
        self._count = 0
        self.measured: list[Measured] = []
        self.checked: list[Checked] = []
        self._dense: tuple[str, _Clip] | None = None

    def begin(self, prompt: str, on_progress: OnAdvance | None) -> None:
        """A prompt, whose dense clip the others are compared with; rendered when it is needed."""
        self._tell(f"dense: {prompt}", on_progress)
        self._dense = None
        self._count += 1

    def measure(self, prompt: str, applied: Applied, on_progress: OnAdvance | None) -> None:
        """One clip of the front."""
        self._tell(f"{applied.label}: {prompt}", on_progress)
        unit = json.dumps([prompt, vars(applied)])
        if (known := self._done.get(unit)) is None:
            ran = self._run(prompt, chosen_for(self._settings, applied))
            known = Measured(
                prompt=prompt, sparse=applied.sparse, dense_steps=applied.dense_steps,
                cache=applied.cache, hold=applied.hold,
                kept=min(ran.kept, 1.0), calls=min(ran.calls, 1.0),
                psnr=ran.psnr, seconds=ran.seconds, dense_seconds=ran.dense_seconds,
            ).model_dump()  # fmt: skip
            self._done.put(unit, known)
        self._count += 1
        self.measured.append(Measured(**known))

    def floor(self, prompt: str, on_progress: OnAdvance | None) -> float:
        """PSNR of dense attention to the same by the kernels of sparse attention."""
        self._tell(f"dense by another kernel: {prompt}", on_progress)
        unit = json.dumps([prompt, "floor"])
        if (known := self._done.get(unit)) is None:
            dense = self._dense_of(prompt)
            known = psnr(self._sample(prompt, None, EVERYTHING).frames, dense.frames)
            self._done.put(unit, known)
        self._count += 1
        return float(known)

    def check(
        self, prompt: str, target: str, chosen: Chosen, on_progress: OnAdvance | None
    ) -> None:
        """One clip with what a target came to."""
        self._tell(f"{target}: {prompt}", on_progress)
        unit = json.dumps([prompt, target, str(chosen)])
        if (known := self._done.get(unit)) is None:
            ran = self._run(prompt, chosen)
            known = Checked(
                prompt=prompt, target=target, predicted=chosen.psnr, psnr=ran.psnr,
                predicted_speedup=chosen.speedup, seconds=ran.seconds,
                dense_seconds=ran.dense_seconds,
            ).model_dump()  # fmt: skip
            self._done.put(unit, known)
        self._count += 1
        self.checked.append(Checked(**known))

    def steps(self) -> int | None:
        """Denoising steps of the dense runs."""
        found: int | None = self._done.get(STEPS)
        return found

    def finish(self) -> None:
        """The result is written."""
        self._done.forget()

    def _run(self, prompt: str, chosen: Chosen) -> _Ran:
        dense, clip = self._dense_of(prompt), self._sample(prompt, chosen)
        return _Ran(psnr(clip.frames, dense.frames), clip.kept, clip.calls / dense.calls,
                    clip.seconds, dense.seconds)  # fmt: skip

    def _dense_of(self, prompt: str) -> _Clip:
        """The dense clip of a prompt, rendered once in this process, so that ratios are of one."""
        if self._dense is None or self._dense[0] != prompt:
            clip = self._sample(prompt, None)
            self._done.put(STEPS, clip.steps)
            self._dense = prompt, clip
        return self._dense[1]

    def _sample(self, prompt: str, chosen: Chosen | None, dense: Method = DENSE) -> _Clip:
        """One clip, by `dense` where nothing is chosen."""
        from diffpatch.internals import execution_device  # diffusers is slow to import

        began = time.monotonic()
        method = dense if chosen is None else chosen.method(self._name)
        cache, hold = (None, None) if chosen is None else (chosen.cache, chosen.hold)
        first = 0 if chosen is None else chosen.dense_steps
        call = {"prompt": prompt, **self._call}
        on_cpu = execution_device(self._pipe).type == "cpu"
        with torch.no_grad():
            # Each way once, for what it compiles; on a CPU, which compiles nothing, one of them.
            if not (self._warm if on_cpu else str(chosen) in self._warm):
                with patched(self._pipe, method, dense_steps=0, dense_layers=0, cache=cache):
                    warm_up(self._pipe, call, self._seed)
                self._warm.add(str(chosen))
            patch = patched(
                self._pipe, method, dense_steps=first, dense_layers=0, cache=cache, hold=hold
            )
            with named("dense" if chosen is None else str(chosen)), patch:
                clip = sample(self._pipe, call, self._seed)
                told = report(self._pipe)
                steps = owners(self._pipe)[0].patch.runs.of(self._pipe).total
        self._spent.append(time.monotonic() - began)
        return _Clip(clip.frames, told.calls, told.kept, _seconds(clip, on_cpu), steps)

    def _tell(self, what: str, on_progress: OnAdvance | None) -> None:
        if on_progress is not None:
            left = None
            if self._spent:
                left = sum(self._spent) / len(self._spent) * (self._units - self._count)
            on_progress(Advance(what, self._count, self._units, left))


@dataclass(frozen=True, eq=False)
class _Clip:
    """One rendered clip: frames (F, 3, H, W), attention calls, kept fraction, seconds, steps."""

    frames: torch.Tensor
    calls: int
    kept: float
    seconds: float
    steps: int | None = None


@dataclass(frozen=True)
class _Ran:
    """What one clip came to, as in `Measured`."""

    psnr: float
    kept: float
    calls: float
    seconds: float
    dense_seconds: float


def _seconds(clip: Sample, on_cpu: bool) -> float:
    """The denoising; on a CPU without the time in which others had the processor."""
    seconds = clip.clocks.get("denoising", clip.total_seconds)
    return seconds * clip.cpu_share if on_cpu else seconds
