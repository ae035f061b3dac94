"""Plans of packed sequences: the spans that a run reports, counted as it counts them."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import diffusers
import pytest

import diffpatch
from diffpatch import BadParameter, PackedGrid
from diffpatch.cli import main
from diffpatch.kernels.block_sparse.api import work_of
from diffpatch.pipelines.families.spans import joined
from diffpatch.pipelines.shapes.find import find_shape
from diffpatch.pipelines.shapes.table import shape_of
from tests.pipelines.test_families import LOCAL
from tests.tiny import Tiny, packed
from tests.tiny.packed import minimax_h3_seconds

pytestmark = pytest.mark.skipif(
    not hasattr(diffusers, "MiniMaxH3Transformer3DModel"), reason="diffusers is older than they are"
)
H3: dict[str, Any] = {"height": 128, "width": 192, "text_tokens": 7, "num_inference_steps": 1}
EVERYWHERE: dict[str, Any] = {"dense_steps": 0, "dense_layers": 0}


@pytest.mark.parametrize("references", [0, 1, 2])
@pytest.mark.parametrize("method", ["neighborhood", "radial", "linear"])
def test_a_plan_of_spans_is_what_the_run_reports(method: str, references: int) -> None:
    model = minimax_h3_seconds(22, references)
    plan = diffpatch.plan(
        model.pipe, method, num_frames=22, references=[(22, 96, 160)] * references, branches=1,
        dense_steps=0, dense_layers=0, **H3,
    )  # fmt: skip
    with diffpatch.patched(model.pipe, method, **EVERYWHERE):
        model.run()
        report = diffpatch.report(model.pipe)
    assert plan.tokens == len(model.call["position_ids"])
    assert plan.kept == pytest.approx(report.kept, abs=1e-9) and 0 < plan.kept < 1
    spans = ["7 text", *["74 text", "7×3×5"] * references, "74 text", "7×4×6"]
    spans[:2] = ["81 text"]
    if references:
        assert report.sequences == {" + ".join(spans): 2}
        assert str(plan.grid) == " + ".join(spans)
        assert f"spans     {plan.grid}: 2 calls" in str(report)
        assert "kept within 7×3×5" in str(plan) and "kept within 7×4×6" in str(plan)
        assert len(plan.kept_per_span) == len(spans) and plan.kept_per_span[0] == 1
        assert diffpatch.Report(**report.to_dict()) == report and plan.to_dict()["grid"]["spans"]
    else:
        assert report.sequences == {} and plan.kept_per_span == ()
        assert str(plan.grid) == "7×4×6 + 81 text"


@pytest.mark.parametrize(
    ("build", "size"),
    [
        (packed.prx, {"height": 64, "width": 96, "text_tokens": 8}),
        (packed.nucleus, {"height": 64, "width": 96, "text_tokens": 8}),
        (packed.cosmos3_pipeline, {"height": 64, "width": 96, "num_frames": 9, "text_tokens": 5}),
        (packed.qwen21_pipeline, {"height": 64, "width": 96, "text_tokens": 8}),
    ],
)
def test_text_without_queries_is_planned_as_it_is_reported(
    build: Any, size: dict[str, Any]
) -> None:
    model: Tiny = build()
    with diffpatch.patched(model.pipe, LOCAL, **EVERYWHERE):
        model.run()
        report = diffpatch.report(model.pipe)
    shape = find_shape(model.pipe)
    latents = {"image": (1, 4, 6), "video": (3, 4, 6)}[shape.kind]
    shape = replace(shape, space=8, time=4, patch=(1, 2, 2))
    assert shape.grid(size.get("num_frames", 1), 64, 96) == latents
    plan = diffpatch.plan(shape, LOCAL, num_inference_steps=report.steps, **size, **EVERYWHERE)
    assert not report.reasons
    assert plan.kept == pytest.approx(report.kept, abs=1e-9)
    # As fractions of the pairs of tokens that ask, too.
    (pattern,) = plan.patterns
    pairs = plan.tokens * (plan.tokens - size["text_tokens"])
    work, places = work_of(pattern.blocks, plan.backend), pattern.tile_map()[0]
    assert plan.computed == pytest.approx(work.computed / pairs)
    sizes = pattern.blocks.sizes.double()
    visited = sizes @ (places > 0).double() @ sizes
    assert plan.visited == pytest.approx(float(visited) / pairs)
    assert 0 < plan.kept_sparse <= (plan.visited or 0) <= (plan.computed or 0)


def test_the_shape_of_minimax_h3_is_that_of_diffusers() -> None:
    shape = shape_of("MiniMaxAI/MiniMax-H3")
    model = minimax_h3_seconds(22)
    read = find_shape(model.pipe)
    assert (read.groups, read.sound, read.packed) == (shape.groups, shape.sound, True)
    assert (read.head_dim, read.channels, read.space, read.time) == (16, 0, 16, 17)
    from diffusers.modular_pipelines.minimax_h3 import modular_pipeline as own

    for frames in range(5, 400, 17):
        assert shape.latent_frames(frames) == own.video_latent_num_frames(frames, 17, 5)
        assert shape.sound_tokens(frames) == 2 * own.audio_latent_num_frames(frames)
        assert shape.frames_up_to(frames + 16) == frames == own.align_num_frames(frames, 17, 5)
    defaults = inspect.signature(diffusers.MiniMaxH3Transformer3DModel).parameters
    sizes = (shape.layers, shape.heads, shape.head_dim, shape.channels, shape.patch)
    names = ("num_layers", "num_attention_heads", "attention_head_dim", "hidden_size", "patch_size")
    assert sizes == tuple(defaults[name].default for name in names)
    assert shape.ffn * 2 == defaults["ffn_dim"].default * 3


def test_heads_wider_than_the_tokens_are_read() -> None:
    from tests.tiny.parts import make

    model = make(
        "MiniMaxH3Transformer3DModel", num_attention_heads=3, attention_head_dim=16, hidden_size=32,
        num_layers=1, num_refiner_layers=1, ffn_dim=32, text_dim=32, freq_dim=16, rope_freq_dim=2,
        time_embed_hidden_dim=16, time_embed_dim=16,
    )  # fmt: skip
    shape = find_shape(model)
    assert (shape.heads, shape.head_dim, shape.channels) == (3, 16, 32)
    dense = replace(shape, channels=48)
    assert shape.linear_flops(10) < dense.linear_flops(10)
    assert shape.linear_flops(10) == 10 * (8 * 32 * 48 + 4 * 32 * shape.ffn)


def test_parts_are_joined_to_spans() -> None:
    assert joined([5, (1, 2, 3), 4, (3, 2, 2), 0, (2, 2, 2)]) == (15, (3, 2, 2), (2, 2, 2))
    assert joined([0, (2, 2, 2)]) == ((2, 2, 2),)
    assert joined([0, (3, 1, 1), 0, (2, 1, 1), 1, (3, 1, 2), 2]) == ((3, 1, 1), 3, (3, 1, 2), 2)


def test_images_to_refer_to_stay_exact() -> None:
    plan = diffpatch.plan(
        "minimax-h3", "radial", height=768, width=1344, num_frames=124, text_tokens=10,
        references=[(1, 512, 512), (124, 768, 1344)],
    )  # fmt: skip
    assert plan.grid == PackedGrid((10 + 256 + 414, (37, 24, 42), 414, (37, 24, 42)))


@pytest.mark.parametrize(
    ("model", "changes", "said"),
    [
        ("minimax-h3", {"num_frames": 120}, r"num_frames=120 must be 17·k \+ 5 .* 107 or 124"),
        ("minimax-h3", {"num_frames": 1}, "such as 345"),
        ("minimax-h3", {"references": [(100, 768, 1344)]}, "num_frames=100 must be 17·k"),
        ("minimax-h3", {"references": [(124, 768, 1300)]}, "width=1300 must be a multiple of 32"),
        ("minimax-h3", {"references": [(0, 768, 1344)]}, "num_frames=0 must be 17·k"),
        ("minimax-h3", {"references": [(124, 768)]}, "each three whole numbers"),
        ("wan-14b", {"num_frames": 81, "width": 1280, "references": [(81, 768, 1280)]}, "packs no"),
    ],
)
def test_layouts_that_do_not_add_up_are_refused(
    model: str, changes: dict[str, Any], said: str
) -> None:
    size = {"height": 768, "width": 1344, "num_frames": 124} | changes
    with pytest.raises(BadParameter, match=said):
        diffpatch.plan(model, "radial", **size)


def test_the_command_takes_references(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--height", "256", "--width", "256", "--num-frames", "124", "--method", "radial"]
    command = ["plan", "--model", "minimax-h3", *size]
    assert main([*command, "--reference", "22,256,256", "--reference", "1,64,64"]) == 0
    assert "586 text + 7×8×8 + 418 text + 37×8×8" in capsys.readouterr().out
    assert main([*command, "--reference", "22,256"]) == 2
    assert "must be frames,height,width" in capsys.readouterr().err
