"""What families cannot do is refused by name, or runs dense and says why. Never wrong silently."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import diffpatch
from diffpatch import Neighborhood, TokenGrid, UnknownFamily, Window, make_method
from diffpatch.methods.base import Attended, AttentionCall
from diffpatch.patching.options.schedule import Schedule
from diffpatch.patching.run.tracker import tracker_of
from diffpatch.pipelines.families import grids
from diffpatch.pipelines.families.table import FamilyInfo
from tests.pipelines.test_families import LOCAL
from tests.tiny import Tiny, images, videos
from tests.tiny import more as tiny_more
from tests.tiny.families import CASES
from tests.tiny.parts import Bare, make, noise

ROWS = diffpatch.list_families()


def runs_dense(model: Tiny, reason: str, **changes: Any) -> None:
    """Every call of a patched run is dense for that reason, and the result is the unpatched one."""
    plain = model.run(**changes)
    with diffpatch.patched(model.pipe, LOCAL, dense_steps=0):
        out, report = model.run(**changes), diffpatch.report(model.pipe)
    assert torch.equal(out, plain)
    assert report.calls == report.dense_calls > 0
    assert [why for why in report.reasons if not re.search(reason, why)] == []


def skip_without(name: str) -> None:
    """A diffusers that lacks the model of a case has nothing to test."""
    if reason := CASES[name].missing():
        pytest.skip(reason)


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.transformer)
def test_rows_are_complete(row: FamilyInfo) -> None:
    assert row.kind in (("video", "image", "audio") if row.refused else ("video", "image"))
    assert row.text in ("none", "before", "after", "packed")
    assert [r.transformer for r in ROWS].count(row.transformer) == 1
    assert bool(row.refused) != bool(row.modules)
    re.compile(row.modules)
    for name, preset in row.presets.items():
        method = make_method(name, **preset.params)
        assert row.kind in method.kinds and preset.source
        Schedule(preset.dense_steps or 0, 0, preset.dense_layers or 0)


def test_every_row_is_in_the_matrix() -> None:
    tested = {case.transformer for case in CASES.values()}
    assert tested == {row.transformer for row in ROWS if not row.refused}


def test_published_windows_keep_what_was_published() -> None:
    row = next(r for r in ROWS if r.name == "HunyuanVideo")
    pattern = Neighborhood(**row.presets["neighborhood"].params).pattern(TokenGrid(30, 48, 80))
    assert pattern.kept == pytest.approx(18 * 24 * 24 / (30 * 48 * 80), rel=0.01)


def test_linear_attention_is_refused_by_name() -> None:
    model = make(
        "SanaTransformer2DModel",
        num_layers=1,
        num_attention_heads=1,
        attention_head_dim=8,
        num_cross_attention_heads=1,
        cross_attention_head_dim=8,
        cross_attention_dim=8,
        caption_channels=8,
    )
    with pytest.raises(UnknownFamily, match=r"\(Sana\) cannot be patched: .* already linear"):
        diffpatch.patch(model, "window")
    assert not hasattr(model, "_diffpatch")


def test_prompts_of_different_lengths_in_lumina() -> None:
    lengths = torch.tensor([[5], [3]])
    mask = (torch.arange(8) < lengths).long()
    inputs = {
        "hidden_states": noise(2, 4, 8, 12),
        "timestep": torch.tensor([0.5, 0.5]),
        "encoder_hidden_states": noise(2, 8, 32),
        "encoder_attention_mask": mask,
    }
    model = images.lumina2().pipe.transformer
    runs_dense(Bare(model, inputs), "prompts of different lengths")


def test_cached_references_of_flux2() -> None:
    from diffusers.models.transformers import transformer_flux2 as module

    if not hasattr(module, "Flux2KVAttnProcessor"):
        pytest.skip("this diffusers caches no references of Flux 2 yet")
    model = images.flux2_references()
    for block in model.pipe.transformer_blocks:
        block.attn.set_processor(module.Flux2KVAttnProcessor())
    for block in model.pipe.single_transformer_blocks:
        block.attn.set_processor(module.Flux2KVParallelSelfAttnProcessor())
    # More reference tokens than the image has: their own attention could pass for the image's.
    ids = model.call["img_ids"].flip(1)
    changes = {"kv_cache_mode": "extract", "num_ref_tokens": 12, "img_ids": ids}
    runs_dense(model, "cached reference images", **changes)


def test_references_of_flux3_leave_the_layers_of_the_image_alone_dense() -> None:
    skip_without("flux3")
    ids = torch.cartesian_prod(*map(torch.arange, (1, 2, 3, 1))) + torch.tensor([1, 0, 0, 0])
    more = {"image_cond_hidden_states": noise(1, 6, 16), "image_cond_ids": ids.float()}
    model = tiny_more.flux3(**more)
    with diffpatch.patched(model.pipe, LOCAL):
        model.run()
        report = diffpatch.report(model.pipe)
    assert report.calls == 2
    assert report.reasons == {"a sequence of 24 tokens does not hold the grid (1, 4, 6, -1, 6)": 1}


@pytest.mark.parametrize("mode", ["write", "skip"])
def test_cached_references_of_glm_image(mode: str) -> None:
    skip_without("glm-image")
    from diffusers.models.transformers import transformer_glm_image as module

    caches = module.GlmImageKVCache(num_layers=2)
    caches.set_mode(mode)
    runs_dense(tiny_more.glm_image(), "reference images are cached keys", kv_caches=caches)


def test_prompts_of_different_lengths_in_fibo2() -> None:
    skip_without("bria-fibo2")
    model = tiny_more.bria_fibo2()
    both = {k: v.expand(2, *v.shape[1:]) for k, v in model.call.items() if torch.is_tensor(v)}
    both["encoder_hidden_states"] = noise(2, 2, 32, 32)
    both["timestep"] = torch.tensor([0.5, 0.5])
    mask = torch.arange(32) < torch.tensor([[32], [10]])
    references = [x.expand(2, -1, -1, -1) for x in model.call["context_latents"]]
    more = {"encoder_attention_mask": mask, "context_latents": references}
    runs_dense(model, "prompts of different lengths", **both, **more)


def test_block_causal_masks_of_skyreels() -> None:
    model = videos.skyreels()
    model.pipe.transformer.register_to_config(num_frame_per_block=3)
    runs_dense(model, r"the model's own mask \(1, 1, 72, 72\)")


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_checkpoints_that_are_sparse_by_themselves() -> None:
    nabla = {f"attention_{name}": 3 for name in ("wT", "wW", "wH")}
    model = videos.kandinsky(
        attention_type="nabla", attention_P=0.9, attention_add_sta=True, **nabla
    )
    for block in model.pipe.transformer.visual_transformer_blocks:
        block.self_attention.processor._attention_backend = "flex"
    runs_dense(model, "the model's own BlockMask", height=128, width=256)


def test_a_grid_that_does_not_fit_the_sequence() -> None:
    model = videos.ltx2()
    with diffpatch.patched(model.pipe, LOCAL):
        diffpatch.patch(model.pipe, LOCAL, grid=TokenGrid(3, 4, 6), modules=r".*\.attn1")
        model.run()
        reasons = diffpatch.report(model.pipe).reasons
    assert list(reasons) == ["a sequence of 96 tokens does not hold the grid (3, 4, 6, 0, 0)"]


@pytest.mark.parametrize(
    ("read", "arguments"),
    [
        (grids.image_list, {"x": [[noise(4, 1, 8, 8)]]}),
        (grids.image_list, {"x": [noise(4, 1, 8, 8), noise(4, 1, 8, 4)]}),
        (grids.image_shapes, {"img_shapes": [[(1, 4, 6)], [(1, 6, 4)]]}),
        (grids.packed_video, {"hidden_states": noise(1, 8, 4)}),
        (grids.placed_video, {"hidden_states": noise(1, 8, 4)}),
        (grids.placed_video, {"hidden_states": noise(1, 8, 4), "video_coords": noise(1, 3, 8)}),
        (grids.latents("BCHW"), {"hidden_states": noise(1, 8, 4)}),
        (grids.unknown, {}),
    ],
)
def test_grids_that_cannot_be_read_say_why(read: grids.GridFunction, arguments: Any) -> None:
    assert isinstance(read(None, arguments), str)


def test_frames_around_the_longest_stretch_condition_it() -> None:
    times = [5, 0, 1, 2, 3, 0, 1, -1]  # a condition; the video; frames of the window before it
    coordinates = torch.cartesian_prod(torch.arange(8), torch.arange(2), torch.arange(3)).mT[None]
    coordinates[0, 0] = torch.tensor(times).repeat_interleave(6)
    arguments: dict[str, Any] = {"hidden_states": noise(1, 48, 4)}
    arguments |= {"video_coords": coordinates.float()} | dict.fromkeys(
        ("num_frames", "height", "width"), 1
    )  # as one pipeline does
    assert grids.placed_video(None, arguments) == (4, 2, 3, 6, 18)


def test_image_ids_are_read_once_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    reads, read = [], torch.Tensor.tolist

    def count(self: torch.Tensor) -> Any:
        reads.append(inspect.stack()[1].filename)
        return read(self)

    monkeypatch.setattr(torch.Tensor, "tolist", count)
    model = images.flux()
    diffpatch.patch(model.pipe, LOCAL, dense_steps=0)
    model.run(num_inference_steps=3)
    assert sum(Path(name).name == "grids.py" for name in reads) == 1


def test_image_ids_in_bfloat16() -> None:
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(300), torch.arange(700))
    arguments = {"img_ids": ids.bfloat16(), "encoder_hidden_states": noise(1, 8, 4)}
    assert grids.image_ids(None, arguments) == (1, 300, 700, 8, 0)


def test_image_ids_that_change_in_place_are_read_again() -> None:
    ids = torch.cartesian_prod(*map(torch.arange, (1, 4, 6)))
    arguments = {"img_ids": ids, "encoder_hidden_states": noise(1, 8, 4)}
    assert grids.image_ids(None, arguments) == (1, 4, 6, 8, 0)
    ids.copy_(torch.cartesian_prod(*map(torch.arange, (1, 6, 4))))
    assert grids.image_ids(None, arguments) == (1, 6, 4, 8, 0)
    with torch.inference_mode():
        arguments["img_ids"] = ids * 1
        assert grids.image_ids(None, arguments) == (1, 6, 4, 8, 0)


def test_samples_that_are_called_one_by_one_are_one_forward() -> None:
    model = videos.mochi()
    diffpatch.patch(model.pipe, LOCAL, dense_steps=0)
    model.run()
    tracker = tracker_of(model.pipe.scheduler)
    assert tracker is not None and (tracker.step, tracker.branch) == (1, 0)
    assert diffpatch.report(model.pipe).calls == 2 * 2 * 2  # steps, layers, samples


@dataclass(frozen=True)
class Remember(Neighborhood):
    """Local attention that keeps the length of the sequence it saw."""

    only_skips = True
    window: Any = (1, 3, 3)
    stride: Any = 1
    states: dict[int, dict[str, Any]] = field(default_factory=dict, compare=False)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall
    ) -> Attended:
        assert call.state.setdefault("tokens", q.shape[1]) == q.shape[1]
        self.states[id(call.state)] = call.state.copy()
        return super().attend(q, k, v, call)


def test_samples_that_are_called_one_by_one_share_no_state() -> None:
    model = videos.mochi()  # of 5 and 3 prompt tokens
    method = Remember()
    diffpatch.patch(model.pipe, method, dense_steps=0)
    model.run()
    assert sorted(s["tokens"] for s in method.states.values()) == [75, 75, 77, 77]


COMPILED = ("wan-vace", "mochi", "kandinsky", "flux2-references", "chroma", "qwen", "z-image")


@pytest.mark.parametrize("name", [*COMPILED, "ltx-condition"])
def test_compiled_forwards_are_the_same(name: str) -> None:
    skip_without(name)
    model = CASES[name].build()
    with diffpatch.patched(model.pipe, Window(window=(1, 2, 3)), dense_steps=0):
        expected = model.run()
        kept = diffpatch.report(model.pipe).kept
    torch._dynamo.reset()
    target = model.pipe if isinstance(model, Bare) else model.pipe.transformer
    target.compile(fullgraph=True, backend="eager")
    with diffpatch.patched(model.pipe, Window(window=(1, 2, 3)), dense_steps=0):
        out, report = model.run(), diffpatch.report(model.pipe)
    if name == "ltx-condition":
        assert report.dense_calls == report.calls
        return
    assert report.kept == kept
    assert torch.allclose(out, expected, atol=1e-5)
