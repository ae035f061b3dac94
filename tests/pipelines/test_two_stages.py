"""The second of two stages: enlarged, denoised in part, with a patch at work in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanVideoToVideoPipeline

import diffpatch
from diffpatch import BadParameter
from diffpatch.pipelines.running.two_stages import refiner_of
from tests.tiny import flux, videos, wan, wan22

WIDE: dict[str, Any] = {"height": 64, "width": 64}


def test_it_is_what_diffusers_makes_of_the_enlarged_clip() -> None:
    tiny = wan()
    small = tiny.run()[0].clamp(0, 1)
    call: dict[str, Any] = {"prompt": "a fox", "num_inference_steps": 4, "guidance_scale": 3.0}
    call |= {"output_type": "pt", "max_sequence_length": tiny.call["max_sequence_length"]}
    made = diffpatch.enlarge(
        tiny.pipe, small, **WIDE, strength=0.5, generator=torch.Generator().manual_seed(1), **call
    )
    larger = F.interpolate(small, (64, 64), mode="bilinear")
    parts = {k: v for k, v in tiny.pipe.components.items() if k != "transformer_2"}
    second: Any = WanVideoToVideoPipeline(**parts)
    expected = second(
        video=larger[None], strength=0.5, generator=torch.Generator().manual_seed(1), **WIDE, **call
    )
    assert torch.equal(made.frames, expected.frames)
    assert made.frames.shape == (1, 9, 3, 64, 64)


def test_a_patch_goes_on_in_it_and_counts_its_own_steps() -> None:
    tiny = wan()
    small = tiny.run()[0].clamp(0, 1)
    diffpatch.patch(tiny.pipe, "larger", trained=(2, 2))
    call: dict[str, Any] = {"prompt": "a fox", "num_inference_steps": 4, "output_type": "latent"}
    call["max_sequence_length"] = tiny.call["max_sequence_length"]
    diffpatch.enlarge(tiny.pipe, small, **WIDE, strength=0.5, **call)
    report = diffpatch.report(tiny.pipe)
    assert report.steps == 2
    # This pipeline of diffusers does not name its forwards, so that both branches are guided.
    assert report.notes == ("2 guide forwards ran dense beside the others: kept has them",)
    diffpatch.unpatch(tiny.pipe)


def test_pictures_go_to_the_pipeline_that_diffusers_names() -> None:
    tiny = flux()
    small = tiny.run().clamp(0, 1)
    call = {k: v for k, v in tiny.call.items() if k not in ("height", "width")}
    call |= {"num_inference_steps": 4, "output_type": "pt"}
    made = diffpatch.enlarge(tiny.pipe, small, height=64, width=96, strength=0.5, **call)
    assert made.images.shape[-2:] == (64, 96)


@pytest.mark.parametrize("strength", [0, -0.5, 1.5, float("nan"), "much"])
def test_a_strength_outside_is_one_sentence(strength: float) -> None:
    with pytest.raises(BadParameter, match=r"strength=.* must be in \(0, 1\], such as 0.7"):
        diffpatch.enlarge(wan().pipe, torch.zeros(9, 3, 8, 8), **WIDE, strength=strength)


def test_what_cannot_be_denoised_again_is_one_sentence() -> None:
    frames = torch.zeros(9, 3, 8, 8)
    with pytest.raises(BadParameter, match=r"not a whole step: raise it to 0\.25"):
        diffpatch.enlarge(wan().pipe, frames, **WIDE, strength=0.1, num_inference_steps=4)
    with pytest.raises(BadParameter, match=r"must be \(F, 3, height, width\)"):
        diffpatch.enlarge(wan().pipe, frames[0], **WIDE)
    for tiny in (wan22(), videos.mochi()):
        with pytest.raises(BadParameter, match="no pipeline that denoises again what"):
            refiner_of(tiny.pipe)
