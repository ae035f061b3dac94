"""Doing one run of a sweep: warm up, render, compare with dense, and write down how."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import socket
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

import diffpatch
from diffpatch.eval.card import thumbnail
from diffpatch.eval.environment import environment
from diffpatch.eval.load import load_of
from diffpatch.eval.media import load_frames, save_frames
from diffpatch.eval.processes import Process
from diffpatch.eval.quality.scores import load_tools
from diffpatch.eval.sweep.fit import fit_run
from diffpatch.eval.sweep.paste import arguments
from diffpatch.eval.sweep.pictures import (
    pattern_of,
    save_attention,
    save_pattern,
    save_pictures,
)
from diffpatch.eval.sweep.plan import Rendering, Scene
from diffpatch.eval.sweep.scores import has_features, save_features, score
from diffpatch.eval.sweep.spec import TUNED, Prompt, SweepSpec
from diffpatch.eval.sweep.store import Store
from diffpatch.files import DiskFull
from diffpatch.patching.api import owners
from diffpatch.pipelines.running import loading, sampling
from diffpatch.pipelines.running.calls import fitted_call, frames_per_second, settings_of
from diffpatch.tuning.chosen import chosen_tiles

SCHEMA = 1


class DenseFailed(RuntimeError):
    """The dense run that a run is compared with has failed."""


class Session:
    """One process at work on the runs of one model."""

    def __init__(
        self, store: Store, spec: SweepSpec, model: str, process: Process, device: str | None = None
    ) -> None:
        """Load the model; `device` is the one that the user asked for.

        Raises:
            ModelError: it cannot be loaded.
        """
        self.store, self.spec, self.process = store, spec, process
        self.device = torch.device(process.device(device))
        self._crowded = process.crowded(device)
        self.source = loading.find(model)
        self.pipe = loading.load_pipeline(
            self.source,
            dtype=loading.DTYPES.get(spec.dtype),
            device=self.device,
            offload=spec.offload,
            vae_tiling=spec.vae_tiling,
            image_input=spec.prompts[0].image is not None,
        )
        self.pipe.set_progress_bar_config(disable=True)
        self.tools = load_tools(**spec.networks)
        self._methods: dict[Any, diffpatch.Method | None] = {}
        self._patterns: dict[Any, Image.Image | None] = {}
        self._warm: set[Any] = set()
        self._clock: dict[str, tuple[dict[str, Any], int]] = {}  # dense: clocks, runs since
        self._environment = environment(self.device)

    def check(self, runs: list[Rendering]) -> None:
        """Patch once with every method, so that what cannot work is known before anything runs.

        Raises:
            DiffpatchError: a method, a schedule or a kept fraction does not fit the model.
        """
        seen = set()
        for run in runs:
            if run.way.method is None or (place := _place(run)) in seen:
                continue
            seen.add(place)
            with self._applied(run):
                pass

    def do(self, run: Rendering) -> dict[str, Any]:
        """Render a run that this process claimed and store the result; returns it."""
        with self.store.stage(run) as stage:
            if run.way.kind == "seed":
                result = self._compare_seeds(run)
            elif run.way.kind == "dense":
                result = self._render_dense(run, stage)
            else:
                result = self._render(run, stage)
            self.store.finish(run, self.facts(run) | result, stage)
        return self.facts(run) | result

    def facts(self, run: Rendering) -> dict[str, Any]:
        """What there is to know about a run before it starts."""
        scene, way = run.scene, run.way
        call = {**scene.call, "num_inference_steps": scene.steps}
        return {
            "schema": SCHEMA,
            "name": run.name,
            "kind": way.kind,
            "label": way.label,
            "setting": scene.setting,
            "model": scene.model,
            "pipeline": type(self.pipe).__name__,
            "dtype": str(self.pipe.dtype).removeprefix("torch."),
            "offload": self.spec.offload,
            "vae_tiling": self.spec.vae_tiling,
            "prompt": scene.prompt.text,
            "image": _image_facts(scene.prompt.image),
            "seed": scene.seed,
            "call": dict(scene.call),
            "settings": settings_of(call, self.source),
            "method": way.method.name if way.method else None,
            "parameters": dict(way.method.parameters) if way.method else {},
            "options": _options(run),
            "wanted": way.wanted,
            "judged_by": self.tools.names(),
            "process": {
                "rank": self.process.rank, "world": self.process.count,
                "host": socket.gethostname(), "pid": os.getpid(),
            },
            "environment": self._environment,
        }  # fmt: skip

    def _render_dense(self, run: Rendering, stage: Path) -> dict[str, Any]:
        sample, _ = self._sample(run)
        own = clocks(sample, self.device)
        self._clock[run.key] = own, 0
        frames = self._keep(sample, stage)
        return {
            "seconds": own,
            "clip": save_pictures(frames, None, stage, frames_per_second(self.source)),
            "shared": self._shared(),
            "kept": 1.0,
            "quality": self._score(frames, None, run),
        }

    def _render(self, run: Rendering, stage: Path) -> dict[str, Any]:
        reference = self._dense_frames(run.dense)
        dense = self._dense_clock(run.dense)
        sample, facts = self._sample(run)
        own = clocks(sample, self.device)
        result: dict[str, Any] = {
            "seconds": own,
            "dense": {"name": run.dense.name, **dense},
            "speedup": {
                key: dense["seconds"][key] / own[key]
                for key in sampling.CLOCKS
                if own[key] is not None
            },
            "shared": self._shared(),
            "kept": 1.0,
            **facts,
        }
        frames = self._keep(sample, stage)
        result["clip"] = save_pictures(frames, reference, stage, frames_per_second(self.source))
        save_pattern(self._patterns.get(_place(run)), stage)
        result["quality"] = self._score(frames, reference, run)
        if run.errors:
            steps = [n for n, kept in enumerate(facts["report"]["kept_per_step"]) if kept < 1]
            result |= self._second_pass(run, steps, stage)
        return result

    def _compare_seeds(self, run: Rendering) -> dict[str, Any]:
        """The floor that another seed gives; no frames of its own."""
        reference = self._dense_frames(run.dense)
        frames = self._dense_frames(run.other_seed)
        return {
            "frames_of": run.other_seed.name,
            "dense": {"name": run.dense.name},
            "kept": 1.0,
            "quality": self._score(frames, reference, run),
        }

    def _score(
        self, frames: torch.Tensor, reference: torch.Tensor | None, run: Rendering
    ) -> dict[str, float]:
        return score(frames, reference, run.scene.prompt.text, self.tools, self.spec.details)

    def _sample(self, run: Rendering) -> tuple[sampling.Sample, dict[str, Any]]:
        """Warm up where this process did not yet, then one timed call; and what the patch did."""
        call = self._call(run.scene)
        place = _place(run)
        if place not in self._warm:
            applied = self._applied(run, dense_steps=0, dense_last_steps=0)
            with applied, chosen_tiles(self.pipe) as seen:
                sampling.warm_up(self.pipe, call, run.scene.seed)
            if seen.map is not None:
                self._patterns[place] = thumbnail(seen.map)
            self._warm.add(place)
        with self._applied(run) as method:
            sample = sampling.sample(self.pipe, call, run.scene.seed)
            if run.way.kind != "method":
                return sample, {}
            report = diffpatch.report(self.pipe)
        assert run.way.method is not None
        if place not in self._patterns:
            self._patterns[place] = pattern_of(self.pipe, run, method)
        patch = arguments(self._fitted(run), run.way.method.parameters, _options(run))
        return sample, {
            "kept": report.kept,
            "fitted": str(method),
            "patch": patch,
            "report": report.to_dict(),
        }

    def _second_pass(self, run: Rendering, steps: list[int], stage: Path) -> dict[str, Any]:
        """Attention errors, and where attention looks in the middle one of the sparse steps."""
        with self._applied(run), contextlib.ExitStack() as watched:
            errors = watched.enter_context(diffpatch.attention_error(self.pipe))
            maps = None
            if steps:
                looked = diffpatch.attention_maps(self.pipe, step=steps[len(steps) // 2])
                maps = watched.enter_context(looked)
            sampling.sample(self.pipe, self._call(run.scene), run.scene.seed)
        found = errors.to_dict()
        shown = ("mean", "per_layer", "per_branch", "difference", "slope")
        result: dict[str, Any] = {"attention_error": {key: found[key] for key in shown}}
        if maps is not None and maps.grid is not None:
            result["attention"] = save_attention(maps, stage)
        return result

    def _dense_frames(self, dense: Rendering) -> torch.Tensor:
        """The frames of a dense run, which is rendered here unless somebody did already."""
        if not self.store.is_done(dense):
            with self.store.claim(dense, wait=True):
                if self.store.failure(dense) is not None:
                    raise DenseFailed(f"dense has failed: failed/{dense.name}.json says why")
                if not self.store.is_done(dense):
                    try:
                        self.do(dense)
                    except DiskFull:
                        raise
                    except Exception as error:
                        self.store.fail(dense, error, self.facts(dense))
                        raise DenseFailed(
                            f"dense has failed: failed/{dense.name}.json says why"
                        ) from error
        return self.store.frames(dense)

    def _dense_clock(self, dense: Rendering) -> dict[str, Any]:
        """Dense seconds from this process, at most `dense_every` timed runs old."""
        every = self.spec.dense_every
        if dense.key in self._clock:
            seconds, age = self._clock[dense.key]
            if not every or age < every:
                self._clock[dense.key] = seconds, age + 1
                return {"seconds": seconds, "runs_since": age}
        elif not every:
            stored = self.store.result(dense) or {}
            return {"seconds": stored["seconds"], "runs_since": None}
        seconds = clocks(self._sample(dense)[0], self.device)
        self._clock = {dense.key: (seconds, 1)}  # earlier scenes are over
        return {"seconds": seconds, "runs_since": 0}

    def _shared(self) -> bool:
        """Whether other processes computed on the same device, which spoils the clocks."""
        if self.device.type == "cpu":
            return self._crowded or self.store.others() > 0
        alone = self.process.count == 1  # else the processes were dealt to devices
        return self._crowded or (alone and self.store.others() > 0)

    def _keep(self, sample: sampling.Sample, stage: Path) -> torch.Tensor:
        """Write frames, clip and features; returns the frames as they can be read back."""
        save_frames(sample.frames, stage / "frames.npz")
        frames = load_frames(stage / "frames.npz")
        if has_features(self.source.name, self.spec.networks):
            save_features(frames, stage, self.tools)
        return frames

    def _call(self, scene: Scene) -> dict[str, Any]:
        call = fitted_call(scene.call, self.pipe) | {"prompt": scene.prompt.text}
        if scene.prompt.image is not None:
            with Image.open(scene.prompt.image) as image:
                call["image"] = image.convert("RGB")
        return call

    @contextlib.contextmanager
    def _applied(self, run: Rendering, **changes: Any) -> Any:
        """The pipeline as the run wants it, for the length of a with block; yields the method."""
        way = run.way
        if way.kind == "kernel":
            with sdpa_kernel(other_kernels(self.device)):
                yield None
            return
        if way.method is None:
            yield None
            return
        method = self._fitted(run)
        options = _options(run) | changes
        if way.method.name == TUNED:
            with diffpatch.patched(self.pipe, **options, **way.method.parameters):
                yield owners(self.pipe)[0].patch.method
            return
        if method is None:
            parameters = {**way.method.parameters}
            with diffpatch.patched(self.pipe, way.method.name, **options, **parameters):
                yield diffpatch.make_method(way.method.name, **parameters)
        else:
            with diffpatch.patched(self.pipe, method, **options):
                yield method

    def _fitted(self, run: Rendering) -> diffpatch.Method | None:
        """The method of a run with a kept fraction, fitted to it; None without one."""
        place = _place(run)
        if run.way.wanted is None:
            return None
        if place not in self._methods:
            self._methods[place] = fit_run(self.pipe, run)
        return self._methods[place]


def clocks(sample: sampling.Sample, device: torch.device) -> dict[str, Any]:
    """The times of one run in seconds, its peak memory, and how busy the machine was."""
    return {
        **{name: sample.clocks.get(name) for name in sampling.CLOCKS},
        "steps": sample.step_seconds,
        "peak_gib": None if sample.peak_bytes is None else sample.peak_bytes / 2**30,
        "load": load_of(sample, device),
    }


def other_kernels(device: torch.device) -> list[SDPBackend]:
    """Dense attention by other code than torch chooses by itself."""
    fused = [SDPBackend.EFFICIENT_ATTENTION] if device.type == "cuda" else []
    return [*fused, SDPBackend.MATH]


def _options(run: Rendering) -> dict[str, Any]:
    method = run.way.method
    return {**run.way.options, **(method.options if method else {})}


def _place(run: Rendering) -> str:
    """What a warm-up, a check or a fitted method holds for: everything but prompt and seed."""
    scene = dataclasses.replace(run.scene, prompt=Prompt(""), number=0, seed=0)
    return dataclasses.replace(run, scene=scene, errors=False).key


def _image_facts(path: str | None) -> dict[str, str] | None:
    if path is None:
        return None
    return {"path": path, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
