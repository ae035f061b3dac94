"""What the page of a sweep shows of a run: its clip, where it differs from dense, its pattern."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

import diffpatch
from diffpatch.eval.card import thumbnail
from diffpatch.eval.media import difference, save_clip
from diffpatch.eval.sweep.fit import plan_run
from diffpatch.eval.sweep.plan import Rendering
from diffpatch.files import naming

CLIP, DIFFERENCE, PATTERN, ATTENTION = "clip", "difference", "pattern.png", "attention.png"


def save_pictures(
    frames: torch.Tensor, reference: torch.Tensor | None, stage: Path, fps: float
) -> dict[str, Any]:
    """Write the clip of a run and its difference to dense, and say how long they are.

    Args:
        frames: (F, 3, H, W) in [0, 1].
        reference: the dense frames; None for dense itself.
        stage: the folder of the run.
        fps: frames per second.
    """
    save_clip(frames, stage, fps, CLIP)
    if reference is not None and reference.shape == frames.shape:
        save_clip(difference(frames, reference), stage, fps, DIFFERENCE)
    return {"frames": len(frames), "fps": fps}


def pattern_of(pipe: Any, run: Rendering, method: diffpatch.Method) -> Image.Image | None:
    """A small picture of a method's pattern in a run; None where it is chosen by content, or sizes
    lack."""
    try:
        plan = plan_run(pipe, run, method)
    except diffpatch.DiffpatchError:  # the run itself says what is wrong with it, if anything is
        return None
    return planned_pattern(plan)


def planned_pattern(plan: diffpatch.Plan) -> Image.Image | None:
    """A small picture of a plan's pattern; None where it says nothing: all that there is to choose
    from."""
    if plan.at_most or not plan.patterns or plan.patterns[0].kept >= 1:
        return None
    return thumbnail(plan.patterns[0].tile_map().mean(0))


def save_attention(maps: diffpatch.AttentionMaps, stage: Path) -> dict[str, Any]:
    """Write the picture of where attention looks, and return its figures."""
    with naming(stage / ATTENTION):
        maps.draw().save(stage / ATTENTION)
    return maps.to_dict()


def save_pattern(picture: Image.Image | None, stage: Path) -> None:
    """Write the picture of a pattern, if there is one."""
    if picture is not None:
        with naming(stage / PATTERN):
            picture.save(stage / PATTERN)
