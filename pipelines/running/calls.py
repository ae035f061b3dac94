"""What a pipeline call needs besides what the user says: presets, and oddities of some models."""

from __future__ import annotations

import dataclasses
from typing import Any

from diffpatch.pipelines.running.loading import Pipeline, Source


def preset_call(source: Source) -> dict[str, Any]:
    """The arguments that suit a model: those of its preset for the demos, none for others."""
    if source.kind != "demo":
        return {}
    from diffpatch.pipelines.demo.model import PRESETS

    preset = dataclasses.asdict(PRESETS[source.name])
    del preset["name"]
    return preset


def fitted_call(call: dict[str, Any], pipe: Pipeline) -> dict[str, Any]:
    """The call as this very pipeline wants it: some Wan models count frames differently."""
    if type(pipe).__name__.startswith("Wan") and "num_frames" in call:
        from diffpatch.pipelines.demo.model import pipeline_num_frames

        return call | {"num_frames": pipeline_num_frames(pipe, call["num_frames"])}
    return dict(call)
