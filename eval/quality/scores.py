"""Everything that can be said about clips: beside a reference, alone, and as sets.

Three functions that return plain numbers, and `load_tools` for the networks behind them. What
cannot be measured is missing from the numbers, and `absent` says why; nothing is ever made up.
Clips are frames (F, 3, H, W) in [0, 1], as the pipeline decoded them, not read back from an mp4.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffpatch.eval.quality import metrics
from diffpatch.eval.quality.distances import FeatureSet, compare
from diffpatch.eval.quality.networks import judge as judging
from diffpatch.eval.quality.networks import towers
from diffpatch.eval.quality.networks.clip import TextImage, load_clip
from diffpatch.eval.quality.networks.features import Extractor, load_features
from diffpatch.eval.quality.networks.lpips import SMALLEST, Lpips, load_lpips, lpips
from diffpatch.pipelines.demo.clips import parse_caption


@dataclass(frozen=True)
class Tools:
    """The networks that judge clips; see `load_tools`.

    Attributes:
        clip: scores frames against texts and against each other.
        extractors: give the features of set distances.
        lpips: None without weights.
        device: where LPIPS and the judge compute.
    """

    clip: TextImage
    extractors: tuple[Extractor, ...]
    lpips: Lpips | None = None
    device: torch.device = torch.device("cpu")

    @functools.cached_property
    def judge(self) -> judging.Judge:
        """The attribute judge of the demo, loaded when first asked for."""
        return judging.load_judge().to(self.device)

    def names(self) -> dict[str, str]:
        """What made the numbers, for result files: scores of other networks cannot be compared."""
        return {
            "clip": self.clip.name,
            "features": ", ".join(extractor.name for extractor in self.extractors),
            **({"lpips": "alex, version 0.1, inputs in [-1, 1]"} if self.lpips else {}),
            "ssim": "Gaussian window 11×11, sigma 1.5, data range 1",
            "averages": "per frame, then over frames, then over clips",
        }


def load_tools(
    clip: str | Path = "contrast",
    features: str | Path | Sequence[str | Path] = "contrast",
    lpips: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> Tools:
    """Load the networks that judge clips; without arguments nothing is fetched.

    Args:
        clip: "contrast" (shipped, knows the demo's captions), or a folder or hub id of a CLIP.
        features: one or several of "contrast", "frames" and "judge" (shipped), a folder or hub id
            of CLIP, DINOv2, SigLIP, VideoMAE, or a safetensors file with FID's
            Inception.
        lpips: a safetensors file, or a folder of them, with AlexNet and the linear heads.
        device: where to compute.

    Raises:
        WeightsError: something cannot be loaded.
    """
    network = None if lpips is None else load_lpips(lpips, device)
    wanted = [features] if isinstance(features, str | Path) else features
    extractors = tuple(load_features(source, device) for source in dict.fromkeys(wanted))
    return Tools(load_clip(clip, device), extractors, network, torch.device(device))


def paired(frames: Tensor, reference: Tensor, tools: Tools | None = None) -> dict[str, float]:
    """How close a clip is to its reference.

    Args:
        frames: (F, 3, H, W) floats in [0, 1].
        reference: the same clip rendered dense, of the same shape.
        tools: adds lpips, if it has the weights, and clip_i.

    Returns:
        psnr in dB (at most 100), ssim, ms_ssim (from 176 pixels a side), relative_l1, lpips, and
        clip_i, the mean cosine of the frames' CLIP embeddings. Means over frames.
    """
    result = {
        "psnr": metrics.psnr(frames, reference).mean,
        "ssim": metrics.ssim(frames, reference).mean,
        "relative_l1": metrics.relative_l1(frames, reference),
    }
    if min(frames.shape[-2:]) >= metrics.MS_SSIM_SIDE:
        result["ms_ssim"] = metrics.ms_ssim(frames, reference).mean
    if tools is None:
        return result
    if tools.lpips is not None and min(frames.shape[-2:]) >= SMALLEST:
        result["lpips"] = lpips(tools.lpips, frames, reference).mean
    own, others = tools.clip.frames(frames), tools.clip.frames(reference)
    return result | {"clip_i": float((own * others).sum(1).mean())}


def alone(frames: Tensor, prompt: str | None, tools: Tools) -> dict[str, float]:
    """What can be said about a clip without a reference.

    Args:
        frames: (F, 3, H, W) floats in [0, 1].
        prompt: what the clip should show; None leaves out what needs it.
        tools: the networks.

    Returns:
        These numbers, except those that `absent` explains. ``clip_score`` is 100 times the cosine
        with the prompt. ``temporal_consistency`` is the mean cosine of consecutive frames, and
        ``flicker`` their mean absolute difference; motion counts too, so compare with dense.
        ``caption_accuracy`` is the share of the demo caption's six attributes that the judge reads
        from the clip, and ``caption_exact`` is 1 if all are right. ``caption_log_prob`` is the mean
        logarithm of the probability that the judge gives to the right attributes; it still tells
        clips apart where all are read right.
    """
    metrics.check_frames(frames)
    result = {}
    if prompt is not None and tools.clip.refuses(prompt) is None:
        text = tools.clip.texts([prompt])
        result["clip_score"] = 100 * float((tools.clip.clip(frames) @ text.T).mean())
    if len(frames) > 1:
        seen = tools.clip.frames(frames)
        result["temporal_consistency"] = float((seen[1:] * seen[:-1]).sum(1).mean())
        result["flicker"] = float((frames[1:].float() - frames[:-1].float()).abs().mean())
    if prompt is not None and _no_caption(prompt, frames) is None:
        right, log_prob = _judged(frames, prompt, tools)
        result["caption_accuracy"] = sum(right) / len(right)
        result["caption_exact"] = float(all(right))
        result["caption_log_prob"] = log_prob
    return result


def sets(candidate: Tensor | FeatureSet, reference: Tensor | FeatureSet) -> dict[str, Any]:
    """Fréchet and kernel distance of two sets; see `diffpatch.eval.quality.distances.compare`.

    Args:
        candidate: features (N, D), such as those an extractor gives of every clip together, or a
            FeatureSet, which several processes can fill and merge.
        reference: the same of the references.

    Returns:
        fd, kd, kd_std, count, reference_count, features, and small_sample: true with fewer than two
        rows per feature, where a Fréchet distance says little.
    """
    both = (candidate, reference)
    makers = {given.extractor for given in both if isinstance(given, FeatureSet)}
    if len(makers) > 1:
        raise ValueError(f"features of {' and '.join(sorted(makers))} have no distance")
    return compare(*(g.stacked() if isinstance(g, FeatureSet) else g for g in both))


def absent(
    tools: Tools, *, frames: Tensor | None = None, prompt: str | None = None
) -> dict[str, str]:
    """Why metrics are missing from the results: metric -> reason, for one clip."""
    reasons = {}
    if tools.lpips is None:
        reasons["lpips"] = "no weights; give AlexNet and the linear heads as safetensors"
    if prompt is None:
        reasons["clip_score"] = reasons["caption_accuracy"] = "no prompt is known for the clip"
    else:
        if (refusal := tools.clip.refuses(prompt)) is not None:
            reasons["clip_score"] = refusal
        if (refusal := _no_caption(prompt, frames)) is not None:
            reasons["caption_accuracy"] = refusal
    if frames is None:
        return reasons
    size = f"{frames.shape[-2]}×{frames.shape[-1]}"
    if min(frames.shape[-2:]) < metrics.MS_SSIM_SIDE:
        reasons["ms_ssim"] = f"needs {metrics.MS_SSIM_SIDE} pixels a side, frames have {size}"
    if tools.lpips is not None and min(frames.shape[-2:]) < SMALLEST:
        reasons["lpips"] = f"needs {SMALLEST} pixels a side, frames have {size}"
    if len(frames) < 2:
        reasons["temporal_consistency"] = reasons["flicker"] = "a single frame has no motion"
    return reasons


def _no_caption(prompt: str, frames: Tensor | None) -> str | None:
    """Why the judge cannot tell whether a clip shows its prompt; None if it can."""
    try:
        parse_caption(prompt)
    except ValueError:
        return "the judge knows the captions of the demo's world only"
    if frames is not None and len(frames) < towers.MOMENTS:
        return f"the judge needs {towers.MOMENTS} frames, got {len(frames)}"
    return None


@torch.no_grad()
def _judged(frames: Tensor, prompt: str, tools: Tools) -> tuple[list[bool], float]:
    """For every attribute of the caption, whether the judge reads it from the clip; and the mean
    logarithm of the probability that it gives to it."""
    labels = parse_caption(prompt).labels()
    video = 2 * frames.float().to(tools.device).transpose(0, 1)[None] - 1
    given = tools.judge(video)
    right = [int(given[name][0].argmax()) == wanted for name, wanted in labels.items()]
    logs = [float(given[name][0].log_softmax(0)[wanted]) for name, wanted in labels.items()]
    return right, sum(logs) / len(logs)
