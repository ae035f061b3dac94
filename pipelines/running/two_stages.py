"""Two stages: a clip or picture at the trained size, then enlarged and denoised again in part.

FreeSwim's recipe (arXiv 2511.14712; SDEdit, arXiv 2108.01073): what is enlarged is taken back to
the noise that the last `strength` of a run begins with, and denoised from there at the new size.
diffusers has pipelines that do the second part, over the same components; a patch of the first goes
on in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from diffpatch.checking import Count, checked
from diffpatch.errors import BadParameter
from diffpatch.pipelines.running.loading import Pipeline, call_arguments

STRENGTH = 0.7  # FreeSwim's
# Pipelines that denoise a clip again; for pictures diffusers itself knows which.
REFINERS = {
    "WanPipeline": "WanVideoToVideoPipeline",
    "CogVideoXPipeline": "CogVideoXVideoToVideoPipeline",
}

SCALES = ("vae_scale_factor_spatial", "vae_scale_factor_temporal", "video_processor")


@checked("strength")
def enlarge(
    pipe: Pipeline,
    frames: torch.Tensor,
    *,
    height: Count,
    width: Count,
    strength: float = STRENGTH,
    **call: Any,
) -> Any:
    """Make a clip or picture larger and denoise it again, as the second of two stages.

    ::

        small = pipe(prompt, output_type="pt").frames[0]       # at the size of training
        diffpatch.patch(pipe, "larger")
        large = diffpatch.enlarge(pipe, small, prompt=prompt, height=1088, width=1920).frames[0]

    Args:
        pipe: the pipeline that made it; a patch that it carries does its work here.
        frames: (F, 3, h, w) floats in [0, 1]; one frame of a picture.
        height: of the result, in pixels.
        width: of the result, in pixels.
        strength: part of the denoising steps that are taken again, in (0, 1].
        **call: further arguments of the call: prompt, num_inference_steps, generator, ….

    Returns:
        What diffusers' pipeline for the second stage returns.

    Raises:
        BadParameter: the strength or the frames cannot work, or diffusers has no such pipeline.
    """
    refiner, arguments = second_stage(
        pipe, frames, {**call, "height": height, "width": width}, strength
    )
    return refiner(**arguments)


def second_stage(
    pipe: Pipeline, frames: torch.Tensor, call: Mapping[str, Any], strength: float
) -> tuple[Pipeline, dict[str, Any]]:
    """The pipeline of the second stage, and the arguments of its call.

    Args:
        pipe: of the first stage.
        frames: what it made, (F, 3, h, w) floats in [0, 1].
        call: arguments of a call of `pipe` for the larger size, with height and width.
        strength: as in `enlarge`.
    """
    check_strength(strength, call.get("num_inference_steps"))
    if frames.ndim != 4 or frames.shape[1] != 3 or not frames.is_floating_point():
        raise BadParameter(
            f"frames of shape {tuple(frames.shape)} must be (F, 3, height, width), floats in [0, 1]"
        )
    refiner = refiner_of(pipe)
    known = call_arguments(refiner)
    size = call["height"], call["width"]
    larger = F.interpolate(frames.float(), size, mode="bilinear", align_corners=False)
    given = {"video": larger[None]} if "video" in known else {"image": larger[:1]}
    arguments = {name: value for name, value in call.items() if name in known}
    return refiner, {**arguments, **given, "strength": strength}


def check_strength(strength: float, steps: int | None = None) -> None:
    """Refuse a strength that leaves nothing to do, or more than there is.

    Raises:
        BadParameter: says which would do.
    """
    if not isinstance(strength, int | float) or not 0 < strength <= 1:
        raise BadParameter(f"strength={strength!r} must be in (0, 1], such as {STRENGTH}")
    if steps is not None and int(steps * strength) < 1:
        raise BadParameter(
            f"strength={strength!r} of {steps} steps is not a whole step: raise it to"
            f" {1 / steps:.2g}"
        )


def refiner_of(pipe: Pipeline) -> Pipeline:
    """The pipeline over the same components that denoises what is given to it.

    Raises:
        BadParameter: diffusers has none for this one.
    """
    import diffusers

    name = type(pipe).__name__
    if {"strength"} <= set(call_arguments(pipe)):
        return pipe
    if name in REFINERS and getattr(pipe, "transformer_2", None) is None:
        kind = getattr(diffusers, REFINERS[name])
        refiner = kind(**{k: v for k, v in pipe.components.items() if k in _needed(kind)})
        # It counts layers of the autoencoder, which tell its scale only in those of Wan 2.1.
        for known in SCALES:
            setattr(refiner, known, getattr(pipe, known))
    else:
        try:
            refiner = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
        except ValueError:
            raise BadParameter(
                f"diffusers has no pipeline that denoises again what {name} made: render at the"
                " larger size in one stage"
            ) from None
    refiner.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return refiner


def _needed(kind: type[Any]) -> set[str]:
    """The components that a pipeline class takes."""
    required, optional = kind._get_signature_keys(kind)
    return set(required) | set(optional)
