"""`longer` on tiny models: the slowed frequency inside runs, undone with the patch."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import diffpatch
from diffpatch import BadParameter
from tests.tiny import Tiny, flux, videos, wan


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
    tiny.call["num_frames"] = 65 if build == "ltx" else 33  # 9 latent frames; periods begin at 6.3
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


@pytest.mark.parametrize("whole", [True, False], ids=["model", "blocks"])
def test_compiled_models_turn_as_slowly(whole: bool) -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, "longer", trained=1, window=0, first=0)
    lengths = (9, 33)  # 3 and 9 latent frames; periods begin at 6.3
    expected = [tiny.run(num_frames=n) for n in lengths]
    model = tiny.pipe.transformer
    parts = [model] if whole else list(model.blocks)
    for part in parts:
        part.compile(backend="eager")
    for length, wanted in zip(lengths, expected, strict=True):
        assert torch.allclose(tiny.run(num_frames=length), wanted, atol=1e-5)
    assert diffpatch.report(tiny.pipe).kept < 1


def test_two_lengths_at_once() -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, "longer", trained=2, window=0, first=0)
    lengths = (5, 9, 33)  # 2, 3 and 9 latent frames: one as in training, two beyond
    pipes = [
        type(tiny.pipe)(**{**tiny.pipe.components, "scheduler": copy.deepcopy(tiny.pipe.scheduler)})
        for _ in lengths
    ]

    def run(i: int) -> torch.Tensor:
        pipes[i].set_progress_bar_config(disable=True)
        # The autoencoder of Wan holds state while it decodes.
        return Tiny(pipes[i], tiny.call).run(num_frames=lengths[i], output_type="latent")

    alone = [run(i) for i in range(len(lengths))]
    with ThreadPoolExecutor(len(lengths)) as pool:
        together = list(pool.map(run, range(len(lengths))))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


def test_bad_input_is_one_sentence() -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, "longer", trained=1, first=4)  # more than the 3 frames of the clip
    with pytest.raises(BadParameter, match=r"first=4 frames, but the clip has 3: lower first"):
        tiny.run()
    diffpatch.patch(tiny.pipe, "longer", trained=3)
    tiny.run()
    reasons = diffpatch.report(tiny.pipe).reasons
    assert list(reasons) == ["3 frames are no longer than the 3 of training"]
