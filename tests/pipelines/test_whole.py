"""Families that the matrix runs as transformers alone, through their pipelines."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import pytest
import torch

import diffpatch
from diffpatch import PackedGrid, TokenGrid
from diffpatch.methods.packed import pattern_on
from tests.pipelines.test_derived import masked
from tests.pipelines.test_families import LOCAL, KeepAll, error
from tests.tiny import Tiny, newest, whole

pytestmark = pytest.mark.skipif(
    not hasattr(diffusers, "Flux3AutoBlocks"), reason="diffusers is older than they are"
)
VIDEO, IMAGE = TokenGrid(3, 4, 6), TokenGrid(1, 4, 6)
BEFORE = TokenGrid(1, 4, 6, 8)
# Builder, the grids of its calls of attention, and how many of these a step makes.
PIPELINES: dict[str, tuple[Callable[[], Tiny], tuple[TokenGrid | PackedGrid, ...], int]] = {
    "chronoedit": (whole.chronoedit, (VIDEO,), 4),
    "anyflow": (whole.anyflow, (VIDEO,), 2),
    "consisid": (whole.consisid, (TokenGrid(3, 4, 6, 8),), 2),
    "easyanimate": (whole.easyanimate, (TokenGrid(3, 4, 6, 8),), 2),
    "cogview4": (whole.cogview4, (BEFORE,), 4),
    "cogview3": (whole.cogview3, (BEFORE,), 2),
    "bria": (whole.bria, (BEFORE,), 2),
    "longcat": (whole.longcat, (BEFORE, TokenGrid(1, 4, 6, 9)), 4),
    "ovis": (whole.ovis, (BEFORE,), 4),
    "hunyuan-image": (whole.hunyuan_image, (TokenGrid(1, 4, 6, 0, 12),), 4),
    "bria-fibo": (whole.bria_fibo, (BEFORE,), 2),
    "bria-fibo2": (whole.bria_fibo2, (BEFORE,), 4),
    "glm-image": (whole.glm_image, (BEFORE,), 4),
    "ernie-image": (whole.ernie_image, (TokenGrid(1, 4, 6, 0, 8),), 2),
    "motif-video": (
        whole.motif_video, (TokenGrid(3, 4, 6, 0, 8), TokenGrid(3, 4, 6, 0, 72)), 6,
    ),
    "krea2": (whole.krea2, (BEFORE,), 4),
    "kandinsky6": (whole.kandinsky6, (VIDEO,), 4),
    "lumina-next": (whole.lumina_next, (IMAGE,), 2),
    "joy-image": (whole.joy_image, (TokenGrid(1, 4, 6, 0, 32),), 4),
    "joy-image-plus": (whole.joy_image_plus, (TokenGrid(1, 4, 6, 0, 14),), 2),
    "flux3": (whole.flux3, (BEFORE, IMAGE), 4),
    "anima": (whole.anima, (IMAGE,), 4),
    "framepack": (whole.framepack, (TokenGrid(3, 4, 6, 62, 10),), 4),
    "ltx-2": (newest.ltx2, (VIDEO,), 2),
    "ltx-2.3": (newest.ltx23, (VIDEO,), 5),
    "ltx-2.5": (newest.ltx25, (VIDEO,), 5),
    "minimax-h3": (newest.minimax_h3, (TokenGrid(37, 3, 4, 419),), 2),
    "minimax-h3-keyframes": (newest.minimax_h3_keyframes, (TokenGrid(37, 3, 4, 481),), 2),
    "minimax-h3-references": (
        newest.minimax_h3_references, (PackedGrid((164, (12, 3, 4), 414, (37, 3, 4))),), 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_runs_sparsely_counts_its_steps_and_is_undone(name: str) -> None:
    build, grids, calls = PIPELINES[name]
    model = build()
    plain = model.run()
    assert torch.isfinite(plain).all() and torch.equal(model.run(), plain)
    with diffpatch.patched(model.pipe, KeepAll(), dense_steps=0):
        assert error(model.run(), plain) <= 5e-6
    with masked(*grids):
        expected = model.run()
    assert error(expected, plain) > 1e-5  # else the comparison would say nothing
    with diffpatch.patched(model.pipe, LOCAL, dense_steps=0, dense_layers=0):
        assert error(model.run(), expected) <= 1e-4
        report = diffpatch.report(model.pipe)
    assert (report.steps, report.calls, report.dense_calls) == (2, 2 * calls, 0)
    if len(grids) == 1:
        assert report.kept == pytest.approx(pattern_on(LOCAL, grids[0], None).kept)
    with diffpatch.patched(model.pipe, LOCAL, dense_steps=1, dense_layers=0):
        first, second = model.run(), model.run()
        report = diffpatch.report(model.pipe)
    assert report.reasons == {"dense first steps": calls}
    assert torch.equal(first, second) and not torch.equal(first, plain)
    assert torch.equal(model.run(), plain)


def test_a_forward_before_the_loop_needs_no_steps_where_it_is_dense_anyway() -> None:
    model = whole.glm_image_edit()
    plain = model.run()
    diffpatch.patch(model.pipe, LOCAL, dense_steps=1, dense_layers=0)
    for _ in range(2):  # the scheduler has never run, or has taken all its steps
        assert torch.equal(model.run(), plain)
        reasons = diffpatch.report(model.pipe).reasons
        assert set(reasons) == {"dense first steps", "reference images are cached keys"}
