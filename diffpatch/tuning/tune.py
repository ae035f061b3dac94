"""Curves of error against kept fraction for a model, from a few dense runs of it."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffpatch.checking import Natural, checked
from diffpatch.errors import BadParameter
from diffpatch.methods.dense import Dense
from diffpatch.methods.dynamic import Dynamic
from diffpatch.patching.api import named_owners, patched, report
from diffpatch.patching.target import transformers
from diffpatch.patterns.grid import TokenGrid
from diffpatch.pipelines.families.table import attention_modules
from diffpatch.pipelines.running.likeness import BEST_PSNR, psnr_by_frame
from diffpatch.pipelines.running.sampling import Sample, named, sample
from diffpatch.targets.settings import (
    MeasuredOn,
    Rendered,
    Settings,
    check_lengths,
    fingerprint,
)
from diffpatch.tuning.probe import Candidate, Probe
from diffpatch.tuning.unfinished import Unfinished, ties_of

SIZES = (0.06, 0.125, 0.25, 0.5)  # kept fractions that every head is tried at
PAIRS = (0.125, 0.25, 0.5)  # those that are rendered, to learn how errors become pictures
RULES = ("virtual", "drop")
PACKAGES = ("diffpatch", "torch", "diffusers")

Progress = Callable[[str, int, int], None]  # what was done, how many of how many


@dataclass(frozen=True)
class _Found:
    """What one prompt told: curves of every head, and rendered pairs."""

    curves: dict[str, dict[str, list[tuple[float, float]]]]
    rendered: list[dict[str, Any]]
    floor: float

    def mean_error(self, kept: float) -> float:
        """Over all heads, at the size nearest to a kept fraction, with virtual tokens."""
        near = [min(c["virtual"], key=lambda p: abs(p[0] - kept))[1] for c in self.curves.values()]
        return math.fsum(near) / len(near)


@checked()
def tune(
    pipe: Any,
    prompts: Sequence[str],
    *,
    call: Mapping[str, Any] | None = None,
    seed: int = 0,
    dense_steps: float = 0.15,
    pairs: Natural = 2,
    path: str | Path | None = None,
    on_progress: Progress | None = None,
) -> Settings:
    """Measure what every head of a model loses to sparse attention; settings follow from that.

    Each prompt is run dense once. At three of its steps all candidates are tried beside dense
    attention. With few steps this takes two to three times as long as the dense run alone, with
    many steps hardly longer. For the first `pairs` prompts a dense clip and three sparse ones are
    rendered as well.

    Two experts of the same architecture, as in Wan 2.2, get the same settings, from the errors of
    both. A patch that the pipeline carries is taken off for the measurement and put back.

    Args:
        pipe: a diffusers pipeline of a known family.
        prompts: typical prompts; four give far better settings than one.
        call: other arguments of the pipeline's call, such as ``num_inference_steps``.
        seed: of the noise.
        dense_steps: first steps that stay dense, as a fraction of the run.
        pairs: number of prompts that are also rendered. One is enough to predict PSNR and time
            from settings; two also tell how good the prediction is.
        path: the file to write the result to. Finished prompts are kept beside it: if the call is
            stopped, the same call resumes and repeats at most the prompt that was under way.
        on_progress: called after each prompt with the prompt, its number from 1, and how many
            there are.

    Raises:
        BadParameter: there is no prompt, `path` is a folder, or a parameter cannot work.
        UnknownFamily: the pipeline holds no transformer of a known family.
    """
    prompts = list(dict.fromkeys(prompts))
    if not prompts:
        raise BadParameter(f"prompts={prompts!r} must be a list of at least one text")
    check_lengths(prompts)
    if not 0 <= dense_steps < 1:
        raise BadParameter(f"dense_steps={dense_steps} must be a fraction of the run, below 1")
    call = dict(call or {})
    model = _model(pipe)
    ties = ties_of(model, call, seed, dense_steps, SIZES)
    done = _Done(path, ties)
    for number, prompt in enumerate(prompts):
        wanted = PAIRS if number < pairs else ()
        if not done.has(prompt, len(wanted)):
            done.add(prompt, *_of_prompt(pipe, prompt, call, seed, dense_steps, wanted))
        if on_progress is not None:
            on_progress(prompt, number + 1, len(prompts))
    settings = _joined(model, prompts, seed, dense_steps, done)
    if path is not None:
        settings.save(path)
        done.forget()
    return settings


def _of_prompt(
    pipe: Any, prompt: str, call: dict[str, Any], seed: int, dense_steps: float,
    sizes: Sequence[float],
) -> tuple[_Found, dict[str, Any]]:  # fmt: skip
    """What one prompt tells, and what the run was like."""
    candidates = tuple(
        Candidate(rest, Dynamic(kept=kept, rest=rest, refresh=1))
        for rest in RULES
        for kept in SIZES
    )
    probe = Probe.of(candidates, dense_steps)
    arguments = {"prompt": prompt, **call}
    with patched(pipe, probe, dense_steps=0, dense_layers=0), torch.no_grad():
        exact = sample(pipe, arguments, seed)
        place = {"grid": _grid(probe), "steps": report(pipe).steps}
        name = next(iter(named_owners(pipe)))  # experts share what is found out
    found = _Found(probe.curves(name), [], BEST_PSNR)
    if not sizes:
        return found, place
    with patched(pipe, Dense(), dense_steps=0, dense_layers=0), torch.no_grad():
        dense = sample(pipe, arguments, seed)  # also where the pipeline carries another patch
    rendered = [
        _pair(pipe, arguments, seed, dense_steps, kept, dense, found.mean_error(kept))
        for kept in sizes
    ]
    return _Found(found.curves, rendered, psnr(exact.frames, dense.frames)), place


def _pair(
    pipe: Any, arguments: dict[str, Any], seed: int, dense_steps: float, kept: float,
    dense: Sample, error: float,
) -> dict[str, Any]:  # fmt: skip
    method = Dynamic(kept=kept)
    with named(str(method)), patched(pipe, method, dense_steps=dense_steps, dense_layers=0):
        sparse = sample(pipe, arguments, seed)
        counted = report(pipe).kept
    return Rendered(
        prompt=arguments["prompt"],
        kept=min(counted, 1.0),
        error=error,
        psnr=psnr(sparse.frames, dense.frames),
        seconds=sparse.clocks.get("denoising", sparse.total_seconds),
        dense_seconds=dense.clocks.get("denoising", dense.total_seconds),
    ).model_dump()


def psnr(frames: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean PSNR of the frames (F, 3, H, W) in [0, 1], in dB, equal ones counted as 100."""
    return float(psnr_by_frame(frames, reference).mean())


def _grid(probe: Probe) -> tuple[int, int, int, int]:
    """The grid of a run, and its tokens of text.

    Raises:
        BadParameter: it had none, or several.
    """
    grids = [grid for grid in probe.grids if isinstance(grid, TokenGrid)]
    if len(grids) != 1 or len(probe.grids) != 1:
        raise BadParameter(
            f"tune knows runs over one grid of tokens, and this one had {len(probe.grids)}: choose"
            " settings for this model by hand"
        )
    return (*grids[0].shape, grids[0].text_before + grids[0].text_after)


def _model(pipe: Any) -> dict[str, Any]:
    """Fingerprint, dtype and class of the transformers, under their names in the pipeline."""
    found = transformers(pipe, None)
    classes = {
        name: (type(model).__name__, len(attention_modules(model, family)))
        for name, model, family in found
    }
    if len(set(classes.values())) != 1:
        raise BadParameter(
            "tune knows pipelines of one transformer or of experts that are alike, and this has"
            f" {', '.join(f'{name}: {cls}' for name, (cls, _) in classes.items())}: choose settings"
            " for this model by hand"
        )
    return {
        "fingerprint": fingerprint({name: model for name, model, _ in found}),
        "dtype": str(found[0][1].dtype).removeprefix("torch."),
        "classes": classes,
    }


class _Done:
    """What the prompts told that are finished, and what their runs were like."""

    def __init__(self, path: str | Path | None, ties: str) -> None:
        self._kept = Unfinished(path, ".part", ties)
        self.found: dict[str, _Found] = {}
        self.place: dict[str, Any] = {}

    def has(self, prompt: str, pairs: int) -> bool:
        """Whether a prompt is finished, with that many pairs."""
        known = self._kept.get(prompt)
        try:
            found, place = _Found(**known["found"]), known["place"]
            if len(found.rendered) < pairs or not (found.curves.keys() and place["steps"]):
                return False
        except (AttributeError, KeyError, TypeError):  # not done, or damaged
            return False
        self.found[prompt], self.place = found, place
        return True

    def add(self, prompt: str, found: _Found, place: dict[str, Any]) -> None:
        """One prompt is finished."""
        self.found[prompt], self.place = found, place
        self._kept.put(prompt, {"found": vars(found), "place": place})

    def forget(self) -> None:
        """The result is written."""
        self._kept.forget()


def _joined(
    model: Mapping[str, Any],
    prompts: Sequence[str],
    seed: int,
    dense_steps: float,
    done: _Done,
) -> Settings:
    """The settings from what all prompts told: means of their curves."""
    found = [done.found[prompt] for prompt in prompts]
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for unit, rules in found[0].curves.items():
        curves[unit] = {}
        for rule, points in rules.items():
            each = [one.curves[unit][rule] for one in found]
            curves[unit][rule] = [
                (sum(c[i][0] for c in each) / len(each), sum(c[i][1] for c in each) / len(each))
                for i in range(len(points))
            ]
    heads = 1 + max(int(unit.rpartition(".")[2]) for unit in curves)
    grid = tuple(done.place["grid"])
    first = Dynamic()
    shape = TokenGrid(*grid[:3])
    return Settings(
        measured_on=MeasuredOn(
            model=model["fingerprint"],
            transformers={
                name: (cls, layers, heads) for name, (cls, layers) in model["classes"].items()
            },
            grid=grid,
            kind="image" if grid[0] == 1 else "video",
            tile=first.pattern(shape).blocks.max_tile,
            pool=first.pool,
            steps=done.place["steps"],
            dense_steps=dense_steps,
            dtype=model["dtype"],
            prompts=list(prompts),
            seeds=[seed],
            versions={name: _version(name) for name in PACKAGES},
            time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        ),
        curves=curves,
        rendered=[Rendered(**pair) for one in found for pair in one.rendered],
        floor=min(one.floor for one in found),
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
