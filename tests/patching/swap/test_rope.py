"""`longer` on tiny models: the slowed frequency inside runs, undone with the patch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import diffpatch
from diffpatch import BadParameter
from tests.tiny import flux, videos, wan


def tables(model: Any, frames: int) -> torch.Tensor:
    return model.rope(torch.zeros(1, 16, frames, 8, 8))[0]


def test_only_longer_clips_turn_more_slowly_and_unpatch_undoes_it() -> None:
    model = wan().pipe.transformer
    short, long = tables(model, 3), tables(model, 7)
    diffpatch.patch(model, "longer", trained=4)
    assert torch.equal(tables(model, 3), short)
    columns = (tables(model, 7) != long).flatten(0, 2).any(0).nonzero()[:, 0]
    assert len(columns) == 2 and columns[1] == columns[0] + 1 and columns[0] < model.rope.t_dim
    copied = copy.deepcopy(model)
    assert torch.equal(tables(copied, 7), long)
    diffpatch.unpatch(model)
    assert torch.equal(tables(model, 7), long)
    assert not model.rope._forward_hooks


def test_without_riflex_the_embedding_stays() -> None:
    model = wan().pipe.transformer
    long = tables(model, 7)
    diffpatch.patch(model, "longer", trained=4, riflex=False)
    assert torch.equal(tables(model, 7), long)


@pytest.mark.parametrize("build", ["wan", "hunyuan", "hunyuan15", "ltx", "cogvideox", "skyreels"])
def test_known_families_run_longer_and_come_back_bit_for_bit(build: str) -> None:
    maker = getattr(videos, build, None)
    if maker is None:
        pytest.fail(f"no tiny model {build}")
    tiny = maker()
    before = tiny.run()
    diffpatch.patch(tiny.pipe, "longer", trained=1, window=0, first=0, dense_steps=0)
    during = tiny.run()
    report = diffpatch.report(tiny.pipe)
    assert report.kept < 1 and not torch.equal(during, before)
    diffpatch.patch(tiny.pipe, "longer", trained=1, window=0, first=0, riflex=False, dense_steps=0)
    assert not torch.equal(tiny.run(), during), "the slowed frequency changed nothing"
    diffpatch.unpatch(tiny.pipe)
    assert torch.equal(tiny.run(), before)


def test_the_family_says_what_it_was_trained_at() -> None:
    pipe = diffpatch.patch(wan().pipe, "longer")
    assert pipe.transformer._diffpatch.patch.method.trained == 21
    with pytest.raises(BadParameter, match="how many latent frames the model was trained at"):
        diffpatch.patch(videos.mochi().pipe, "longer")
    with pytest.raises(BadParameter, match="rotary embedding is not known: pass riflex=False"):
        diffpatch.patch(videos.mochi().pipe, "longer", trained=2)
    diffpatch.patch(videos.mochi().pipe, "longer", trained=2, riflex=False)
    with pytest.raises(BadParameter, match="works on video models only"):
        diffpatch.patch(flux().pipe, "longer")
