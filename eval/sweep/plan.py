"""From a sweep's description to the list of its runs, each with a name that says what it is."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from diffpatch.errors import choices
from diffpatch.eval.sweep.schema import BadSweep
from diffpatch.eval.sweep.spec import TUNED, MethodSpec, Prompt, SweepSpec
from diffpatch.pipelines.running import loading
from diffpatch.pipelines.running.calls import preset_call, steps_of, too_many_dense


@dataclass(frozen=True)
class Scene:
    """One thing to render: all that a pipeline call needs, but no method.

    Attributes:
        model: as in `SweepSpec`.
        dtype: of the weights.
        prompt: text, and the first frame for image-to-video models.
        number: of the prompt in the sweep, from 0.
        seed: of the noise.
        call: every other argument of the call.
        steps: denoising steps, None if the pipeline does not tell.
        offload: as in `SweepSpec`; it decides the time.
        vae_tiling: as in `SweepSpec`.
    """

    model: str
    dtype: str
    prompt: Prompt
    number: int
    seed: int
    call: Mapping[str, Any]
    steps: int | None
    offload: str = "none"
    vae_tiling: bool = False

    @property
    def setting(self) -> str:
        """What results may be averaged over prompts and seeds: model, size and steps."""
        call = self.call
        size = "×".join(str(call[key]) for key in ("width", "height") if key in call)
        frames = f"{call['num_frames']} frames" if "num_frames" in call else ""
        steps = f"{self.steps} steps" if self.steps else ""
        return ", ".join(part for part in (self.model, size, frames, steps) if part)


@dataclass(frozen=True)
class Way:
    """One way to render: dense, dense for the noise floor, or a method.

    Attributes:
        kind: "dense", "kernel" (dense by another kernel), "seed" (dense from other noise), or
            "method".
        method: which, with its parameters.
        options: schedule and backend, as `diffpatch.patch` takes them.
        wanted: kept fraction of the run that the method is to be fitted to.
        told: whether the label names the options, because others in the sweep differ.
    """

    kind: str
    method: MethodSpec | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    wanted: float | None = None
    told: bool = False

    @property
    def label(self) -> str:
        """For people."""
        if self.method is None:
            return _DENSE[self.kind]
        options = self.options.items() if self.told else ()
        words = [self.method.label, *(f"{key}={value}" for key, value in options)]
        if self.wanted is not None:
            words.append(f"at {100 * self.wanted:g}%")
        return " ".join(words)


_DENSE = {"dense": "dense", "kernel": "dense, other kernel", "seed": "dense, other seed"}


@dataclass(frozen=True)
class Rendering:
    """One entry of a sweep: a scene rendered in one way.

    Attributes:
        scene: what.
        way: how.
        errors: whether attention errors are measured too, in a second pass.
    """

    scene: Scene
    way: Way
    errors: bool = False

    @property
    def dense(self) -> Rendering:
        """The run that this one is compared with."""
        return Rendering(self.scene, Way("dense"))

    @property
    def other_seed(self) -> Rendering:
        """Dense from other noise: seeds 0 and 1 serve each other, so do 2 and 3, and so on."""
        return Rendering(replace(self.scene, seed=self.scene.seed ^ 1), Way("dense"))

    @cached_property
    def key(self) -> str:
        """A fingerprint of everything that decides the result."""
        facts = asdict(self)
        # Under the names by which results that are stored were fingerprinted.
        scene, way = facts["case"], facts["variant"] = facts.pop("scene"), facts.pop("way")
        del scene["number"], way["told"]  # these are about the sweep
        if (image := self.scene.prompt.image) is not None:  # what it shows, wherever it lies
            scene["prompt"]["image"] = hashlib.sha256(Path(image).read_bytes()).hexdigest()
        if (method := self.way.method) is not None:
            del way["method"]["kept"]
            if method.name == TUNED:  # likewise
                settings = Path(method.parameters["settings"]).read_bytes()
                digest = hashlib.sha256(settings).hexdigest()
                way["method"]["parameters"] = {**method.parameters, "settings": digest}
        text = json.dumps(facts, sort_keys=True, ensure_ascii=False, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @cached_property
    def name(self) -> str:
        """The name of its folder."""
        words = _slug(self.way.label), _slug(self.scene.prompt.text), f"s{self.scene.seed}"
        return "-".join(word for word in (*words, self.key) if word)

    @property
    def title(self) -> str:
        """For progress."""
        text = self.scene.prompt.text
        text = text if len(text) <= 40 else text[:39] + "…"
        return f"{self.way.label} | “{text}” seed {self.scene.seed}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:32].rstrip("-")


def plan_sweep(spec: SweepSpec) -> dict[str, list[Rendering]]:
    """All runs by model, those of one scene together and dense first; loads no weights.

    Raises:
        BadSweep, ModelError: a model is not there, or cannot be called like that.
    """
    return {model: _runs(spec, model) for model in spec.model}


def _runs(spec: SweepSpec, model: str) -> list[Rendering]:
    source = loading.find(model)
    _check_call(spec, source)
    ways = _ways(spec)
    runs = []
    for size, steps in itertools.product(spec.sizes, spec.steps):
        call = preset_call(source) | dict(spec.call) | dict(size)
        if steps is not None:
            call["num_inference_steps"] = steps
        total = steps_of(call, source)
        _check_steps(ways, total)
        pairs: Iterable[tuple[tuple[int, Prompt], int]]
        if spec.seeds_in_turn:
            pairs = zip(enumerate(spec.prompts), itertools.cycle(spec.seeds), strict=False)
        else:
            pairs = itertools.product(enumerate(spec.prompts), spec.seeds)
        for (number, prompt), seed in pairs:
            scene = Scene(
                model, spec.dtype, prompt, number, seed, call, total, spec.offload, spec.vae_tiling
            )
            wanted = number < spec.attention_error
            runs += [Rendering(scene, v, errors=wanted and v.kind == "method") for v in ways]
    return runs


def _ways(spec: SweepSpec) -> list[Way]:
    """Every way to render that the sweep compares, dense first."""
    found = [Way("dense"), *(Way(kind) for kind in spec.noise_floor)]
    for method, schedule in itertools.product(spec.methods, spec.schedules):
        options = {key: value for key, value in schedule.items() if key not in method.options}
        if method.name == TUNED:  # chosen with a schedule of its own
            options = {}
        kept = spec.kept if method.kept is None else method.kept
        told = len(spec.schedules) > 1
        for wanted in kept or (None,):
            way = Way("method", method, options, wanted, told)
            if way not in found:  # a method's own schedule takes the place of the common ones
                found.append(way)
    return found


def _check_call(spec: SweepSpec, source: loading.Source) -> None:
    known, name = source.arguments, source.pipeline.__name__
    given = dict.fromkeys(spec.call, "call")
    given |= {key: "sizes" for size in spec.sizes for key in size}
    given |= {"num_inference_steps": "steps"} if spec.steps != (None,) else {}
    for key, where in given.items():
        if key not in known:
            raise BadSweep(f"{where}: {name} has no argument {key!r}: {choices(key, known)}")
    if "prompt" not in known:
        raise BadSweep(f"model: {name} takes no prompt, so that there is nothing to sweep")
    image = spec.prompts[0].image
    if image is None and source.is_video and "image" in source.required:
        raise BadSweep(f"prompts: {name} starts from an image; write {{prompt: …, image: FILE}}")
    if image is not None and source.is_video and "image" not in known:
        raise BadSweep(f"prompts: {name} takes no image")


def _check_steps(ways: list[Way], steps: int | None) -> None:
    for way in ways:
        options = {**way.options, **(way.method.options if way.method else {})}
        if key := too_many_dense(options, steps):
            raise BadSweep(f"{way.label}: {key}={options[key]} is more than the {steps} steps")


def describe_plan(plan: Mapping[str, list[Rendering]], folder: Path) -> str:
    """What a dry run prints."""
    runs = [run for found in plan.values() for run in found]
    scenes = {run.dense.key for run in runs}
    lines = [run.title + f" | {run.scene.setting}" for run in runs]
    lines.append(f"{len(runs)} runs, {len(scenes)} of them dense, into {folder}")
    return "\n".join(lines)
