"""What a pipeline call needs besides what the user says: presets, and oddities of some models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from diffpatch.pipelines.running.loading import Pipeline, Source

DEMO_FPS, DEFAULT_FPS = 8.0, 16.0


def preset_call(source: Source) -> dict[str, Any]:
    """The arguments that suit a model: those of its preset for the demos, none for others."""
    if source.kind != "demo":
        return {}
    from diffpatch.pipelines.demo.model import PRESETS

    preset = dataclasses.asdict(PRESETS[source.name])
    del preset["name"]
    return preset


def fitted_call(call: Mapping[str, Any], pipe: Pipeline) -> dict[str, Any]:
    """The call as this very pipeline wants it: some Wan models count frames differently."""
    if type(pipe).__name__.startswith("Wan") and "num_frames" in call:
        from diffpatch.pipelines.demo.model import pipeline_num_frames

        return {**call, "num_frames": pipeline_num_frames(pipe, call["num_frames"])}
    return dict(call)


def steps_of(call: Mapping[str, Any], source: Source) -> int | None:
    """The number of denoising steps that a call asks for, None if the pipeline decides."""
    return call.get("num_inference_steps") or source.arguments.get("num_inference_steps")


def settings_of(call: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """Every plain setting of a call, defaults of the pipeline included, for result files."""
    plain = (str, int, float, bool)
    told_elsewhere = ("prompt", "output_type", "return_dict")
    used = {**source.arguments, **call}
    return {
        key: value
        for key, value in used.items()
        if isinstance(value, plain) and key not in told_elsewhere
    }


def too_many_dense(options: Mapping[str, Any], steps: int | None) -> str | None:
    """The option that asks for more dense steps than there are steps, if one does."""
    for name in ("dense_steps", "dense_last_steps"):
        count = options.get(name)
        if isinstance(count, int) and steps is not None and count > steps:
            return name
    return None


def frames_per_second(source: Source) -> float:
    """What suits the model."""
    if source.kind == "demo":
        return DEMO_FPS
    return float(source.arguments.get("frame_rate") or DEFAULT_FPS)
