"""What goes wrong beyond the trained size, as numbers: things shown twice, clips that repeat."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffpatch.eval.quality import metrics
from diffpatch.eval.quality.networks import towers
from diffpatch.eval.quality.scores import Tools
from diffpatch.pipelines.demo import clips

SIDE = 64  # pixels of the frames that objects are counted in
LEAST = 0.004  # of a frame, that a patch of colour must cover to be an object
FEWEST = 8  # frames that a repetition is looked for in
STILL = 1e-3  # mean difference below which a clip does not move at all


def details(frames: Tensor, prompt: str, tools: Tools) -> dict[str, float]:
    """What a clip of the demo's world gets right, one by one, and how it fails beyond training.

    Args:
        frames: (F, 3, H, W) floats in [0, 1].
        prompt: a caption of the demo's world; of others only what needs none is said.
        tools: with the judge.

    Returns:
        caption_motion, caption_color, caption_shape (1 where the judge reads it right), objects
        (patches of the caption's colour, the mean over frames) and repetition (see `repetition`);
        what cannot be measured is missing.
    """
    metrics.check_frames(frames)
    found = {}
    if len(frames) >= FEWEST:
        found["repetition"] = repetition(frames)
    try:
        spec = clips.parse_caption(prompt)
    except ValueError:
        return found
    found["objects"] = objects(frames, clips.COLORS[spec.color], clips.BACKGROUNDS[spec.background])
    if len(frames) >= towers.MOMENTS:
        with torch.no_grad():
            given = tools.judge(2 * frames.float().to(tools.device).transpose(0, 1)[None] - 1)
        for name in ("motion", "color", "shape"):
            right = int(given[name][0].argmax()) == spec.labels()[name]
            found[f"caption_{name}"] = float(right)
    return found


def repetition(frames: Tensor) -> float:
    """How much a clip comes back to what it showed before, from 0 (never) to 1 (exactly).

    Frames that lie farther apart in time differ more, in a clip that moves on; if it repeats
    itself, there is a distance at which they differ less again. With d(n) the mean absolute
    difference of frames n apart, it is the largest fall of d, from its highest value at a smaller
    distance, as a fraction of the highest of all; 0 for a clip that does not move.

    Args:
        frames: (F, 3, H, W) floats in [0, 1].
    """
    count = len(frames)
    small = F.adaptive_avg_pool2d(frames.float(), min(SIDE, *frames.shape[-2:]))
    lags = range(1, count - count // 4)  # beyond, too few pairs of frames are left
    apart = torch.tensor([float((small[n:] - small[:-n]).abs().mean()) for n in lags])
    highest = float(apart.max())
    fall = float((apart.cummax(0).values - apart).max())
    return 0.0 if highest < STILL else fall / highest


def objects(
    frames: Tensor, color: tuple[float, float, float], ground: tuple[float, float, float]
) -> float:
    """Connected patches of a colour on a background of another, the mean over frames.

    Args:
        frames: (F, 3, H, W) floats in [0, 1].
        color: of the objects, RGB in [0, 1].
        ground: of the background.
    """
    side = min(SIDE, *frames.shape[-2:])
    small = F.adaptive_avg_pool2d(frames.float(), side)
    wanted, other = (torch.tensor(rgb).view(1, 3, 1, 1) for rgb in (color, ground))
    inside = (small - wanted).norm(dim=1) < (small - other).norm(dim=1)
    labels = torch.arange(1, side**2 + 1, dtype=torch.float32).view(1, side, side) * inside
    while True:  # every pixel takes the highest label around it, until each patch has one
        grown = F.max_pool2d(labels[:, None], 3, 1, 1)[:, 0] * inside
        if torch.equal(grown, labels):
            break
        labels = grown
    counts = [frame[frame > 0].unique(return_counts=True)[1] for frame in labels]
    return sum(int((count >= LEAST * side**2).sum()) for count in counts) / len(counts)
