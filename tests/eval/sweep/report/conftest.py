"""The folder of a sweep, its summary and its page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffpatch.eval.media import save_clip
from diffpatch.eval.sweep.report.files import write_reports
from diffpatch.eval.sweep.report.summary import Summary, summarize
from diffpatch.eval.sweep.scores import FEATURES
from diffpatch.files import write_json
from tests.eval.sweep.report.tiny_report import (
    HOSTILE,
    METHODS,
    PROMPTS,
    made,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep of four prompts, with a clip a run; one more run has failed."""
    root = tmp_path_factory.mktemp("swept")
    (root / "failed").mkdir()
    generator = torch.Generator().manual_seed(0)
    names = []
    for number, prompt in enumerate(PROMPTS):
        found = [made("dense", "dense", prompt)]
        for name, (seconds, psnr, steps) in METHODS.items():
            values = seconds[number], psnr[number], steps[number]
            found.append(made("method", name, prompt, *values))
        for result in found:
            run = root / "runs" / result["name"]
            run.mkdir(parents=True)
            write_json(run / "run.json", result)
            save_clip(torch.rand(8, 3, 32, 64, generator=generator), run, fps=8)
            np.save(run / FEATURES, torch.randn(1, 3, generator=generator).numpy())
            names.append(result["name"])
    failed = made("method", "disc", HOSTILE, 1.0, 1.0)
    failed |= {"error": "OutOfMemoryError: <b>much</b>", "traceback": "Traceback\n  <i>x</i>"}
    write_json(root / "failed" / f"{failed['name']}.json", failed)
    about = {"title": "A & <b>B</b>", "bar": {"psnr": 25.0}, "networks": {}}
    write_json(root / "sweep.json", about | {"runs": [*names, failed["name"], "missing"]})
    write_reports(summarize(root), root)
    return root


@pytest.fixture(scope="module")
def summary(folder: Path) -> Summary:
    return summarize(folder)


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")
