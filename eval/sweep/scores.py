"""The quality of renderings: of one alone, next to the dense one, and of many as a set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffpatch.eval.media import load_frames
from diffpatch.eval.quality.details import details
from diffpatch.eval.quality.distances import compare
from diffpatch.eval.quality.scores import Tools, alone, load_tools, paired
from diffpatch.files import DamagedFile, read_json, write_json
from diffpatch.pipelines.running.loading import DEMOS

FEATURES = "features.npy"
FEWEST = 4  # clips below which a set has no distance


def score(
    frames: torch.Tensor,
    reference: torch.Tensor | None,
    prompt: str,
    tools: Tools,
    detailed: bool = False,
) -> dict[str, float]:
    """Everything that can be said about frames (F, 3, H, W) in [0, 1]; ready for JSON.

    Args:
        frames: what was rendered.
        reference: the dense frames; None for a dense run.
        prompt: what was asked for.
        tools: from `diffpatch.eval.quality.scores.load_tools`.
        detailed: add what `diffpatch.eval.quality.details` says.
    """
    beside = {} if reference is None else paired(frames, reference, tools)
    more = details(frames, prompt, tools) if detailed else {}
    return beside | alone(frames, prompt, tools) | more


def has_features(model: str, networks: Mapping[str, str]) -> bool:
    """Whether features mean something: those shipped know the demo's clips only."""
    return "features" in networks or model in DEMOS


def save_features(frames: torch.Tensor, folder: Path, tools: Tools) -> None:
    """Write the features of a clip, rows of float32, into the folder of its run."""
    [extractor] = tools.extractors
    np.save(folder / FEATURES, extractor(frames).float().numpy(), allow_pickle=False)


def set_distances(folder: Path, group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How far the clips of a way are, as a set, from the dense ones of the same scenes.

    Args:
        folder: of the sweep.
        group: the finished runs of one way in one setting.

    Returns:
        As `diffpatch.eval.quality.distances.compare`, with `clips`; empty for dense itself, below
        `FEWEST` clips, where features are missing, and where both sets are the same clips, which
        is so if two seeds are each other's noise floor.
    """
    own = [result.get("frames_of", result["name"]) for result in group]
    dense = [result["dense"]["name"] for result in group if "dense" in result]
    if len(dense) < FEWEST or set(own) <= set(dense):
        return {}
    files = [[folder / "runs" / name / FEATURES for name in names] for names in (own, dense)]
    if not all(path.is_file() for paths in files for path in paths):
        return {}
    candidate, reference = (torch.cat([_load_features(path) for path in paths]) for paths in files)
    return compare(candidate, reference) | {"clips": len(own)}


def _load_features(path: Path) -> torch.Tensor:
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, EOFError, ValueError):
        raise DamagedFile(f"{path} is damaged; add --rescore, which writes it anew") from None


def rescore(folder: Path) -> int:
    """Compute the quality of every run of a sweep anew, from the stored frames.

    Args:
        folder: of the sweep, whose sweep.json names the networks.

    Returns:
        How many runs were scored.
    """
    networks = read_json(folder / "sweep.json")["networks"]
    tools = load_tools(**networks)
    found = sorted((folder / "runs").iterdir())
    for path in found:
        result = read_json(path / "run.json")
        reference = None
        if "dense" in result:
            reference = load_frames(folder / "runs" / result["dense"]["name"] / "frames.npz")
        frames = folder / "runs" / result.get("frames_of", path.name) / "frames.npz"
        detailed = bool({"repetition", "objects"} & result["quality"].keys())  # of either length
        quality = score(load_frames(frames), reference, result["prompt"], tools, detailed)
        if has_features(result["model"], networks) and "frames_of" not in result:
            save_features(load_frames(frames), path, tools)
        else:
            (path / FEATURES).unlink(missing_ok=True)  # of a network that judges no more
        write_json(path / "run.json", {**result, "quality": quality, "judged_by": tools.names()})
    return len(found)
