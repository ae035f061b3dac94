"""The quality of one rendering: of the frames alone, and next to the dense ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffpatch.eval.metrics import psnr, ssim
from diffpatch.eval.sweep_store import load_frames, read_json, write_json


def load_tools() -> Any:
    """What scoring needs, loaded once."""
    return None


def score(
    frames: torch.Tensor, reference: torch.Tensor | None, prompt: str, tools: Any
) -> dict[str, Any]:
    """Everything that can be said about frames (F, 3, H, W) in [0, 1]; ready for JSON.

    Args:
        frames: what was rendered.
        reference: the dense frames; None for a dense run.
        prompt: what was asked for.
        tools: from `load_tools`.
    """
    if reference is None:
        return {}
    scores = {"psnr": psnr(frames, reference), "ssim": ssim(frames, reference)}
    return {name: value.mean for name, value in scores.items()}


def rescore(folder: Path) -> int:
    """Compute the quality of every run of a sweep anew, from the stored frames.

    Args:
        folder: of the sweep.

    Returns:
        How many runs were scored.
    """
    tools, found = load_tools(), sorted((folder / "runs").iterdir())
    for path in found:
        result = read_json(path / "run.json")
        reference = None
        if "dense" in result:
            reference = load_frames(folder / "runs" / result["dense"]["name"] / "frames.npz")
        frames = folder / "runs" / result.get("frames_of", path.name) / "frames.npz"
        quality = score(load_frames(frames), reference, result["prompt"], tools)
        write_json(path / "run.json", {**result, "quality": quality})
    return len(found)
