"""Pipelines and models of others over supported transformers: what they are is what is patched."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F

import diffpatch
from diffpatch import PackedGrid, TokenGrid
from diffpatch.methods.packed import pattern_on
from tests.pipelines.test_families import LOCAL, KeepAll, error
from tests.tiny import Tiny, derived, whole

pytestmark = pytest.mark.skipif(
    not hasattr(diffusers, "EchoBlocks"), reason="diffusers is older than they are"
)
# Builder, the grid of its sequence, calls of attention in a run, and what table row it is. The loop
# of Echo has no scheduler, so that each of its forwards is a run of its own.
MODELS: dict[str, tuple[Callable[[], Tiny], TokenGrid | PackedGrid, int, str]] = {
    "minimax-h3": (
        derived.minimax_h3, PackedGrid((23, (4, 3, 5), 10, (3, 4, 6))), 4,
        "MiniMaxH3Transformer3DModel",
    ),
    "lucy": (derived.lucy, TokenGrid(3, 4, 6), 8, "WanTransformer3DModel"),
    "visual-cloze": (
        derived.visual_cloze, TokenGrid(1, 6, 18, 48, 108), 4, "FluxTransformer2DModel",
    ),
    "anima": (derived.anima, TokenGrid(1, 4, 6), 8, "CosmosTransformer3DModel"),
    "echo": (derived.echo, TokenGrid(3, 4, 6, 48), 2, "LTX2VideoTransformer3DModel"),
    "echo-alone": (
        functools.partial(derived.echo, 0), TokenGrid(3, 4, 6), 2, "LTX2VideoTransformer3DModel",
    ),
    "echo-blocks": (
        whole.echo, TokenGrid(3, 4, 6, 48), 2, "LTX2VideoTransformer3DModel",
    ),
    "ltx-2.3": (
        functools.partial(derived.ltx2, derived.LTX23), TokenGrid(3, 4, 6), 2,
        "LTX2VideoTransformer3DModel",
    ),
    "ltx-2.5": (
        functools.partial(derived.ltx2, derived.LTX25), TokenGrid(3, 4, 6), 2,
        "LTX2VideoTransformer3DModel",
    ),
}  # fmt: skip


@contextmanager
def masked(*grids: TokenGrid | PackedGrid) -> Iterator[None]:
    """Every attention of a sequence of such a grid to itself is under the mask of `LOCAL`."""
    masks = {grid.num_tokens: pattern_on(LOCAL, grid, None).dense()[0] for grid in grids}
    original = F.scaled_dot_product_attention

    def attend(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        if query.shape[2] == key.shape[2] and (mask := masks.get(query.shape[2])) is not None:
            kwargs = {k: v for k, v in kwargs.items() if k != "attn_mask"} | {"attn_mask": mask}
            return original(query, key, value, **kwargs)
        return original(query, key, value, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attend)
        yield


@pytest.mark.parametrize("name", MODELS)
def test_it_is_patched_as_what_it_is(name: str) -> None:
    build, grid, calls, transformer = MODELS[name]
    model = build()
    parts = vars(model.pipe).get("_component_specs") or getattr(model.pipe, "components", {})
    inner = [model.pipe, *(getattr(model.pipe, name, None) for name in parts)]
    assert transformer in {type(part).__name__ for part in inner}
    plain = model.run()
    with diffpatch.patched(model.pipe, KeepAll(), dense_steps=0):
        assert error(model.run(), plain) <= 1e-6
    with masked(grid):
        expected = model.run()
    assert error(expected, plain) > 1e-5  # else the comparison would say nothing
    with diffpatch.patched(model.pipe, LOCAL, dense_steps=0):
        assert error(model.run(), expected) <= 5e-5
        report = diffpatch.report(model.pipe)
    assert (report.calls, report.dense_calls) == (calls, 0)
    assert report.kept == pytest.approx(pattern_on(LOCAL, grid, None).kept)
    assert torch.equal(model.run(), plain)


def test_steps_of_two_schedulers_in_one_loop_are_counted() -> None:
    model = derived.minimax_h3()
    with diffpatch.patched(model.pipe, LOCAL, dense_steps=1):
        model.run()
        report = diffpatch.report(model.pipe)
    assert report.steps == 2 and report.reasons == {"dense first steps": 2}


def test_dense_steps_of_a_loop_without_a_scheduler_are_refused() -> None:
    model = derived.echo()
    plain = model.run()
    diffpatch.patch(model.pipe, LOCAL, dense_steps=1)
    with pytest.raises(diffpatch.DiffpatchError, match="dense_steps"):
        model.run()
    diffpatch.unpatch(model.pipe)
    assert torch.equal(model.run(), plain)


def test_memory_that_cannot_be_told_apart_runs_dense() -> None:
    """Coordinates in which the video stands at neither end."""
    model = derived.echo()
    plain = model.run()
    coords = torch.cat([model.call["video_coords"], model.call["memory_video_coords"]], 2)
    turned = model.call | {
        "memory_video_coords": coords.flip(2)[:, :, :48],
        "video_coords": coords.flip(2)[:, :, 48:],
    }
    with diffpatch.patched(model.pipe, LOCAL, dense_steps=0):
        out, report = model.run(**turned), diffpatch.report(model.pipe)
    assert list(report.reasons) == ["video_coords have no grid (3, 4, 6) at either end of the"
                                    " sequence"]  # fmt: skip
    assert torch.equal(out, model.run(**turned)) and not torch.equal(out, plain)
