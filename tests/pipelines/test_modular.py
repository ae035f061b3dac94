"""Pipelines that diffusers assembles of blocks: patched, reported and undone like any other."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

import diffpatch
from diffpatch import Window
from tests.tiny import wan

CALL: dict[str, Any] = {
    "prompt": "a cat",
    "negative_prompt": "bad",
    "height": 32,
    "width": 64,
    "num_frames": 9,
    "num_inference_steps": 2,
    "max_sequence_length": 16,
}


@pytest.mark.skipif(not hasattr(diffusers, "WanBlocks"), reason="diffusers has no blocks for Wan")
def test_a_modular_pipeline_is_patched_reported_and_undone() -> None:
    blocks: Any = diffusers.WanBlocks()
    pipe: Any = blocks.init_pipeline()
    parts = wan().pipe.components
    pipe.update_components(**{name: parts[name] for name in pipe.components if name in parts})
    pipe.set_progress_bar_config(disable=True)

    def run() -> torch.Tensor:
        generator = torch.Generator("cpu").manual_seed(0)
        return torch.as_tensor(pipe(**CALL, generator=generator, output_type="pt", output="videos"))

    plain = run()
    diffpatch.patch(pipe, Window(window=(0.5, 0.5, 0.5)), dense_steps=1)
    out, report = run(), diffpatch.report(pipe)
    diffpatch.unpatch(pipe)
    assert not torch.equal(out, plain)
    assert report.steps == 2 and report.reasons == {"dense first steps": 4}
    assert report.calls == 8 and report.dense_calls == 4
    assert torch.equal(run(), plain)
