"""VBench (Huang et al. 2023): the files it expects, and the scores it writes.

VBench needs an environment of its own (older numpy and transformers, CUDA), so nothing of it runs
here: render a prompt list into a folder, run VBench on that folder, read its result back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffpatch.errors import BadParameter
from diffpatch.files import read_text

SAMPLES = 5
FLICKER_SAMPLES = 25  # of the prompts for temporal flickering, which VBench filters afterwards
QUALITY: Mapping[str, tuple[float, float, float]] = {
    "subject_consistency": (0.1462, 1.0, 1.0),
    "background_consistency": (0.2615, 1.0, 1.0),
    "temporal_flickering": (0.6293, 1.0, 1.0),
    "motion_smoothness": (0.706, 0.9975, 1.0),
    "aesthetic_quality": (0.0, 1.0, 1.0),
    "imaging_quality": (0.0, 1.0, 1.0),
    "dynamic_degree": (0.0, 1.0, 0.5),
}
"""Lowest value, highest value and weight of the dimensions that judge the video alone."""

SEMANTIC: Mapping[str, tuple[float, float, float]] = {
    "object_class": (0.0, 1.0, 1.0),
    "multiple_objects": (0.0, 1.0, 1.0),
    "human_action": (0.0, 1.0, 1.0),
    "color": (0.0, 1.0, 1.0),
    "spatial_relationship": (0.0, 1.0, 1.0),
    "scene": (0.0, 0.8222, 1.0),
    "appearance_style": (0.0009, 0.2855, 1.0),
    "temporal_style": (0.0, 0.364, 1.0),
    "overall_consistency": (0.0, 0.364, 1.0),
}
"""The same for the dimensions that compare the video with its prompt."""

_QUALITY_SHARE, _LONGEST = 0.8, 255


class VBenchError(BadParameter):
    """A prompt list or a result is not what VBench reads or writes."""


def file_name(prompt: str, index: int) -> str:
    """`prompt-index.mp4`, the name by which VBench finds the prompt of a video.

    Raises:
        VBenchError: the prompt cannot be part of a file name.
    """
    name = f"{prompt}-{index}.mp4"
    if not prompt or "/" in prompt or "\0" in prompt or len(name.encode()) > _LONGEST:
        raise VBenchError(
            f"{prompt[:60]!r} cannot be a file name, which VBench needs; use VBench's own prompts"
        )
    return name


def videos(path: Path, samples: int = SAMPLES) -> list[tuple[str, int]]:
    """Which videos a prompt list asks for: (prompt, index), without repetition.

    Args:
        path: a prompt on each line, such as all_dimension.txt, or VBench_full_info.json, whose
            prompts for temporal flickering get 25 videos.
        samples: videos for every other prompt.

    Raises:
        VBenchError: the file is neither.
    """
    try:
        text = read_text(path)
        if path.suffix == ".json":
            entries = [(e["prompt_en"], e.get("dimension", [])) for e in json.loads(text)]
        else:
            entries = [(line.strip(), []) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise VBenchError(f"{path} is not a prompt list of VBench: {error}") from error
    counts: dict[str, int] = {}
    for prompt, dimensions in entries:
        many = FLICKER_SAMPLES if "temporal_flickering" in dimensions else samples
        counts[prompt] = max(many, counts.get(prompt, 0))
    for prompt in counts:
        file_name(prompt, 0)
    return [(prompt, index) for prompt, count in counts.items() for index in range(count)]


def read_result(paths: Sequence[Path]) -> dict[str, Any]:
    """The scores in one or more `*_eval_results.json` files.

    Returns:
        dimensions (raw, as VBench reports them), videos (how many each was measured on), missing
        dimensions, and quality, semantic and total where their dimensions are complete: the mean
        of min-max normalised scores, and ``0.8 quality + 0.2 semantic``.

    Raises:
        VBenchError: a file is not a result of VBench.
    """
    scores: dict[str, float] = {}
    counts: dict[str, int] = {}
    for path in paths:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            for name, (score, details) in found.items():
                scores[name], counts[name] = float(score), len(details)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise VBenchError(f"{path} is not a result of VBench: {error}") from error
    if scores.get("imaging_quality", 0) > 1:
        scores["imaging_quality"] /= 100  # older versions leave it in percent
    known = [*QUALITY, *SEMANTIC]
    result: dict[str, Any] = {
        "dimensions": {name: scores[name] for name in known if name in scores},
        "videos": counts,
        "missing": [name for name in known if name not in scores],
    }
    for part, bounds in (("quality", QUALITY), ("semantic", SEMANTIC)):
        if set(bounds) <= set(scores):
            result[part] = _weighted(scores, bounds)
    if {"quality", "semantic"} <= set(result):
        share = _QUALITY_SHARE
        result["total"] = share * result["quality"] + (1 - share) * result["semantic"]
    return result


def _weighted(
    scores: Mapping[str, float], bounds: Mapping[str, tuple[float, float, float]]
) -> float:
    parts = [(scores[n] - low) / (high - low) * weight for n, (low, high, weight) in bounds.items()]
    return sum(parts) / sum(weight for *_, weight in bounds.values())
