"""The quality of one rendering: of the frames alone, and next to the dense ones."""

from __future__ import annotations

from pathlib import Path

import torch

from diffpatch.eval.quality import Tools, alone, load_tools, paired
from diffpatch.eval.sweep_store import load_frames, read_json, write_json


def score(
    frames: torch.Tensor, reference: torch.Tensor | None, prompt: str, tools: Tools
) -> dict[str, float]:
    """Everything that can be said about frames (F, 3, H, W) in [0, 1]; ready for JSON.

    Args:
        frames: what was rendered.
        reference: the dense frames; None for a dense run.
        prompt: what was asked for.
        tools: from `diffpatch.eval.quality.load_tools`.
    """
    beside = {} if reference is None else paired(frames, reference, tools)
    return beside | alone(frames, prompt, tools)


def rescore(folder: Path) -> int:
    """Compute the quality of every run of a sweep anew, from the stored frames.

    Args:
        folder: of the sweep, whose sweep.json names the networks.

    Returns:
        How many runs were scored.
    """
    tools = load_tools(**read_json(folder / "sweep.json")["networks"])
    found = sorted((folder / "runs").iterdir())
    for path in found:
        result = read_json(path / "run.json")
        reference = None
        if "dense" in result:
            reference = load_frames(folder / "runs" / result["dense"]["name"] / "frames.npz")
        frames = folder / "runs" / result.get("frames_of", path.name) / "frames.npz"
        quality = score(load_frames(frames), reference, result["prompt"], tools)
        write_json(path / "run.json", {**result, "quality": quality, "judged_by": tools.names()})
    return len(found)
