"""Sequences that families pack: what of them is read, what is refused, and text without queries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch

import diffpatch
from diffpatch import Neighborhood, PackedGrid, Window
from diffpatch.methods.packed import pattern_on
from diffpatch.patterns.packed import without_queries
from diffpatch.pipelines.families import spans
from tests.pipelines.test_families import LOCAL
from tests.pipelines.test_family_limits import runs_dense
from tests.tiny import Tiny, packed
from tests.tiny.parts import make, noise

pytestmark = pytest.mark.skipif(
    not hasattr(diffusers, "MiniMaxH3Transformer3DModel"), reason="diffusers is older than they are"
)


def read(rows: list[tuple[float, float, float]], video: list[int]) -> Any:
    """The spans of hand-made rows (time, row, column), of which some are video."""
    ids = torch.tensor(rows, dtype=torch.float64)
    arguments = {"position_ids": ids, "video_indices": torch.tensor(video, dtype=torch.long)}
    return spans.packed_rows(None, arguments)


def frames(times: list[float], height: int, width: int) -> list[tuple[float, float, float]]:
    return [(t, r / 4, c / 4) for t in times for r in range(height) for c in range(width)]


def test_spans_follow_from_the_rows() -> None:
    text = [(float(i), 0.0, 0.0) for i in range(5)]
    sound = [(5.0 + i, 0.0, 2.5) for i in range(4)]
    video = frames([5.0, 6.7, 13.3, 20.0], 2, 3)
    t, v, s = len(text), len(video), len(sound)
    assert read(text + video, list(range(t, t + v))) == (5, (4, 2, 3))
    # Rows of other kinds part two videos, and so do other sizes and a clock that falls back.
    parted = text + video + sound + video
    rows = [*range(t, t + v), *range(t + v + s, t + v + s + v)]
    assert read(parted, rows) == (5, (4, 2, 3), 4, (4, 2, 3))
    assert read(video + video, list(range(2 * v))) == ((4, 2, 3), (4, 2, 3))
    other = frames([21.0, 22.0, 23.0], 3, 2)
    assert read(video + other, list(range(v + len(other)))) == ((4, 2, 3), (3, 3, 2))
    # The video may stand first, and frames of one row or column are frames.
    assert read(video + text, list(range(v))) == ((4, 2, 3), 5)
    for height, width in ((1, 6), (6, 1), (1, 1)):
        line = frames([1.0, 2.0, 3.0], height, width)
        assert read(line, list(range(len(line)))) == ((3, height, width),)
    # Images and keyframes stay exact, of one frame or two, but not the video itself.
    image = frames([1.0], 3, 3)
    assert read(image + video[:12] + video, list(range(9 + 12 + v))) == (21, (4, 2, 3))
    assert read(text + image, list(range(t, t + 9))) == (5, (1, 3, 3))
    assert read(text, []) == "the video rows are not whole frames"


def test_rows_that_are_not_frames_run_dense() -> None:
    model = packed.minimax_h3()
    broken = model.call["position_ids"].clone()
    broken[-1, 1] += 7
    runs_dense(model, "the video rows are not whole frames", position_ids=broken)


def test_the_answer_is_read_once_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reads = packed.minimax_h3(), []
    original = spans._spans_of_rows
    monkeypatch.setattr(
        spans,
        "_spans_of_rows",
        lambda *a: reads.append(1) or original(*a),  # type: ignore[func-returns-value]
    )
    with diffpatch.patched(model.pipe, LOCAL):
        for _ in range(3):
            model.run()
    assert len(reads) == 1


def test_a_cosmos_whose_parts_stand_elsewhere_runs_dense() -> None:
    model = packed.cosmos3(sound=0)
    places = model.call["vision_sequence_indexes"].flip(0)
    runs_dense(model, "do not follow the prompt", vision_sequence_indexes=places)


def test_a_packed_sequence_of_several_videos_is_reported_whole() -> None:
    model = packed.minimax_h3_references()
    with diffpatch.patched(model.pipe, LOCAL, dense_steps=0):
        model.run()
        report = diffpatch.report(model.pipe)
    grid = PackedGrid((23, (4, 3, 5), 10, (3, 4, 6)))
    assert report.kept == pytest.approx(pattern_on(LOCAL, grid, None).kept)
    assert report.dense_calls == 0


def test_a_method_for_videos_leaves_a_sequence_of_images_alone() -> None:
    model = packed.cosmos3(shapes=((1, 3, 5), (1, 4, 6)))
    plain = model.run()
    with diffpatch.patched(model.pipe, "radial", dense_steps=0, dense_layers=0):
        out, report = model.run(), diffpatch.report(model.pipe)
    assert torch.equal(out, plain) and report.calls == report.dense_calls > 0
    assert "saves between frames" in next(iter(report.reasons))


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("linear", {}),
        ("window+temporal", {}),
        ("dense+temporal", {"mode": "mask"}),
        ("dense+temporal", {"mode": "skip"}),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "build",
    [
        packed.prx,
        packed.nucleus,
        packed.cosmos3_pipeline,
        packed.qwen21_pipeline,
        packed.helios_pipeline,
    ],
)
def test_every_kind_of_method_runs_over_them(
    build: Any, method: str, params: dict[str, Any]
) -> None:
    model: Tiny = build()
    plain = model.run()
    with diffpatch.patched(model.pipe, method, dense_steps=0, dense_layers=0, **params):
        out, report = model.run(), diffpatch.report(model.pipe)
    assert torch.isfinite(out).all() and out.shape == plain.shape
    assert 0 < report.kept <= 1
    assert torch.equal(model.run(), plain)


def test_text_without_queries_is_not_computed() -> None:
    grid = diffpatch.TokenGrid(1, 6, 7, text_before=5, text_after=3)
    for silent in (range(5), range(47, 50)):
        pattern = Neighborhood(window=(1, 3, 3)).pattern(grid)
        quiet = without_queries(pattern, silent)
        quiet.blocks.validate()
        wanted = pattern.dense()[0].clone()
        wanted[silent.start : silent.stop] = False
        assert torch.equal(quiet.dense()[0], wanted)
        assert quiet.kept == pytest.approx(wanted.float().mean().item(), abs=1e-6)
    with pytest.raises(diffpatch.BadParameter, match="share tiles"):
        without_queries(Neighborhood(window=(1, 3, 3)).pattern(grid), range(3))


@pytest.mark.parametrize("cached", [False, True])
def test_qwen_asks_cached_keys_sparsely(cached: bool) -> None:
    """The prompt of the first step is computed as ever; the image is sparse in every step."""
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    model = packed.qwen21()

    def steps() -> Iterator[torch.Tensor]:
        more: dict[str, Any] = {"kv_cache": QwenImage21KVCache(2)} if cached else {}
        for mode in ("extract", "cached"):
            yield model.run(**more | ({"kv_cache_mode": mode} if cached else {}))[:, -24:]

    plain = list(steps())
    with diffpatch.patched(model.pipe, LOCAL, dense_steps=0):
        out = []
        for step in steps():
            report = diffpatch.report(model.pipe)
            assert report.calls == 2 and not report.dense_calls
            out.append(step)
    assert torch.allclose(out[0], out[1], atol=1e-6)
    assert not torch.allclose(out[0], plain[0], atol=1e-4)


def test_compiled_blocks_of_a_packed_model_follow() -> None:
    model = packed.minimax_h3_references()
    diffpatch.patch(model.pipe, LOCAL)
    eager = model.run()
    model.pipe.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert torch.allclose(model.run(), eager, atol=1e-5)


class Packs(torch.nn.Module):
    """A model of nobody's, with two videos in a sequence."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 32, "ffn_dim": 32}
        self.inner = make("WanTransformer3DModel", num_layers=1, **sizes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner.blocks[0].attn1(tokens, None, None, None)
        return out


@pytest.mark.parametrize("between", ["exact", "aligned"])
@pytest.mark.parametrize("called", [False, True])
def test_own_models_may_pack(between: str, called: bool) -> None:
    torch.manual_seed(0)
    model, grid = Packs(), PackedGrid((4, (3, 4, 5), 2, (2, 4, 6)), between)
    tokens = noise(1, grid.num_tokens, 32)
    method = Window(window=(0.5, 0.5, 0.5))
    given: Any = (lambda tokens: grid) if called else grid
    with (
        torch.no_grad(),
        diffpatch.patched(
            model, method, grid=given, modules=r"inner\.blocks\.0\.attn1", dense_steps=0
        ),
    ):
        model(tokens)
        report = diffpatch.report(model)
        shorter = model(tokens[:, 1:])
        after = diffpatch.report(model)
    assert report.kept == pytest.approx(pattern_on(method, grid, 0).kept) and not report.reasons
    with torch.no_grad():
        assert torch.equal(shorter, model(tokens[:, 1:]))
    why = f"a sequence of {grid.num_tokens - 1} tokens does not hold the spans {grid}"
    assert list(after.reasons) == [why]
