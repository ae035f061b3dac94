"""The built-in demo model: a small text-to-video transformer trained on moving shapes."""

from __future__ import annotations

from diffpatch.pipelines.demo.model import PRESETS, DemoPreset, load_demo, pipeline_num_frames

__all__ = ["PRESETS", "DemoPreset", "load_demo", "pipeline_num_frames"]
