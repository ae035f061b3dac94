"""A sweep of a tiny model, and the folder after it ran."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from diffpatch.cli import main
from tests import tiny
from tests.eval.sweep.tiny_sweep import HOSTILE, write


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and lose a lot where other work wants the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A sweep of a tiny model: 2 prompts × (dense, two floors, two methods at a kept fraction)."""
    model = tmp_path_factory.mktemp("model") / "wan"
    tiny.wan().pipe.save_pretrained(model)
    return {
        "title": "tiny <b>sweep</b>",
        "model": str(model),
        "prompts": ["a cat", HOSTILE],
        "sizes": {"height": 32, "width": 64, "num_frames": 17},
        "steps": 2,
        "schedules": {"dense_steps": 0, "dense_layers": 0},
        "methods": [
            {"method": "radial", "vary": {"rule": ["tiles"]}},
            {"method": "neighborhood", "set": {"stride": 1}, "dense_layers": 1, "kept": [0.75]},
        ],
        "attention_error": 1,
        "bar": {"psnr": 10},
        "networks": {"features": "contrast"},
    }


@pytest.fixture(scope="module")
def swept(sweep: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that sweep after it ran."""
    folder = tmp_path_factory.mktemp("swept")
    assert main(["sweep", write(sweep, folder), "-o", str(folder / "runs"), "--quiet"]) == 0
    return folder / "runs"
