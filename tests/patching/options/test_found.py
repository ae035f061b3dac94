"""Weights that lie in the folder a pipeline was loaded from are found, or it is said."""

from __future__ import annotations

import logging
from pathlib import Path

import diffusers
import pytest

import diffpatch
from diffpatch.methods.learned import checkpoint, files
from diffpatch.methods.linear import distilled
from tests.methods.dynamic.test_trained import released
from tests.tiny import wan


def test_dynamic_finds_what_the_model_was_trained_with(tmp_path: Path) -> None:
    folder = released(tmp_path, wan(), checkpoint.VSA)
    pipe = diffusers.WanPipeline.from_pretrained(folder)
    diffpatch.patch(pipe, "dynamic")
    assert pipe.transformer._diffpatch.patch.method.weights == str(folder)
    diffpatch.patch(pipe, "dynamic", kept=0.5)
    method = pipe.transformer._diffpatch.patch.method
    assert method.weights == str(folder) and method.kept == 0.5
    assert vars(diffpatch.settled(pipe, "dynamic")[0])["weights"] == str(folder)
    diffpatch.unpatch(pipe)
    model = diffusers.WanTransformer3DModel.from_pretrained(folder / "transformer")
    diffpatch.patch(model, "dynamic")
    assert model._diffpatch.patch.method.weights == str(folder / "transformer")


def test_other_parameters_go_without_them_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = released(tmp_path, wan(), checkpoint.SLA)
    pipe = diffusers.WanPipeline.from_pretrained(folder)
    with caplog.at_level(logging.WARNING, logger="diffpatch"):
        diffpatch.patch(pipe, "dynamic", rule="pooled")
    assert pipe.transformer._diffpatch.patch.method.weights is None
    assert "rule='pooled' goes without them" in caplog.text and str(folder) in caplog.text


def test_found_weights_that_leave_a_level_of_quality_no_choice_are_said(tmp_path: Path) -> None:
    tiny = wan()
    tiny.pipe.save_pretrained(tmp_path)
    learned = {
        f"transformer.blocks.{layer}.attn1": distilled.initial(2, 2, 12, features=False, rank=2)
        for layer in range(2)
    }
    files.save(tmp_path, learned, "WanTransformer3DModel", {"kept": 0.125})
    pipe = diffusers.WanPipeline.from_pretrained(tmp_path)
    diffpatch.patch(pipe, "linear", quality="high")
    [note] = diffpatch.report(pipe).notes
    assert note.startswith(f"quality='high' has no effect beside weights={str(tmp_path)!r}")


def test_plain_folders_and_models_from_memory_have_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, "dynamic")
    assert tiny.pipe.transformer._diffpatch.patch.method.weights is None
    diffpatch.unpatch(tiny.pipe)
    tiny.pipe.save_pretrained(tmp_path / "plain")
    pipe = diffusers.WanPipeline.from_pretrained(tmp_path / "plain")
    with caplog.at_level(logging.WARNING, logger="diffpatch"):
        diffpatch.patch(pipe, "dynamic")
    assert pipe.transformer._diffpatch.patch.method.weights is None
    assert not [record for record in caplog.records if record.name.startswith("diffpatch")]
