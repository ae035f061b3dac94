"""What models were trained at, and what is said beyond it: in plans, warnings and reports."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from diffusers import CogVideoXTransformer3DModel

import diffpatch
from diffpatch import TokenGrid, list_families
from diffpatch.patching.options.beyond import beyond
from diffpatch.pipelines.families.info import Trained
from diffpatch.pipelines.families.table import family_of
from tests.tiny import wan

WAN = Trained(21, 30, 52)


@pytest.mark.parametrize(
    ("grid", "method", "said"),
    [
        (TokenGrid(21, 30, 52), "radial", []),
        (TokenGrid(21, 52, 30), "radial", []),
        (TokenGrid(21, 31, 52), "radial", []),  # another aspect ratio, not another size
        (TokenGrid(22, 30, 52), "radial", ["22 frames", "trained at 21", "'longer'"]),
        (TokenGrid(22, 30, 52), "longer", []),
        (TokenGrid(21, 68, 120), "radial+temporal", ["68×120", "trained at 30×52", "'larger'"]),
        (TokenGrid(21, 68, 120), "larger", []),
        (TokenGrid(42, 68, 120), "larger", ["'longer'"]),
        (TokenGrid(42, 68, 120), "dynamic", ["'longer'", "'larger'"]),
    ],
)
def test_what_goes_beyond_names_the_method_that_is_made_for_it(
    grid: TokenGrid, method: str, said: list[str]
) -> None:
    text = beyond(WAN, grid, method)
    assert (text is None) == (not said)
    assert all(part in (text or "") for part in said)
    for name in ("longer", "larger"):
        assert (f"'{name}'" in (text or "")) == (f"'{name}'" in said)


def test_nothing_is_said_of_what_is_not_known() -> None:
    assert beyond(None, TokenGrid(99, 99, 99), "radial") is None
    assert beyond(Trained(21), TokenGrid(21, 99, 99), "radial") is None


def test_rows_tell_checkpoints_of_a_family_apart() -> None:
    known = {f.transformer: f for f in list_families()}
    row = known["WanTransformer3DModel"]
    sizes = {heads: row.trained_at(heads) for heads in (12, 40, 24, 3, 7)}
    assert [(t.num_frames, t.size) for t in sizes.values() if t is not None] == [
        (21, (30, 52)), (21, (45, 80)), (31, (22, 40)), (33, (16, 16)), (21, None),
    ]  # fmt: skip
    small: dict[str, Any] = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
    for time_patch, frames in ((None, 13), (2, 11)):
        model = CogVideoXTransformer3DModel(**small, patch_size_t=time_patch, patch_bias=False)
        family = family_of(model)
        assert family is not None
        trained = family.trained_of(model)
        # What the checkpoints' configs say: 49 frames of 1.0, 81 of 1.5, which are 13 and 21 latent
        # frames, of which 1.5 joins two in a token, after filling up.
        sampled = {None: 49, 2: 81}[time_patch]
        latent = (sampled - 1) // 4 + 1
        assert trained is not None
        assert trained.num_frames == frames == -(-latent // (time_patch or 1))


def test_every_known_size_is_of_the_kind_of_its_family() -> None:
    for family in list_families():
        for trained in family.trained:
            assert (trained.num_frames == 1) == (family.kind == "image"), family.name


def test_plans_say_it() -> None:
    size: dict[str, Any] = {"height": 1088, "width": 1920}
    made = diffpatch.plan("wan-1.3b", "radial", **size, num_frames=81)
    assert made.trained == (21, 30, 52)
    assert "trained    at up to 21 frames of 30×52 tokens" in str(made)
    assert made.warning is not None and made.warning in str(made)
    assert "'larger'" in made.warning and "'longer'" not in made.warning
    larger = diffpatch.plan("wan-1.3b", "larger", **size, num_frames=81)
    assert larger.warning is None and "beyond" not in str(larger)
    # A guide in every second step, for one of two branches: a quarter more of the pairs.
    assert larger.kept == pytest.approx(larger.kept_sparse + 0.25)
    tokens, channels, layers = 21 * 68 * 120, 1536, 30
    assert larger.state_bytes == 2 * tokens * channels * layers
    alone = diffpatch.plan("wan-1.3b", "larger", **size, num_frames=81, guide=0)
    assert alone.state_bytes == 0 and alone.kept == pytest.approx(31 * 53 / (68 * 120))
    assert alone.step_speedup > larger.step_speedup
    assert diffpatch.plan("mochi", "radial", height=480, width=848, num_frames=85).trained is None


def test_the_first_forward_warns_once_and_the_report_notes_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tiny = wan()
    diffpatch.patch(tiny.pipe, "neighborhood", window=1, dense_steps=0)
    tiny.pipe.transformer._diffpatch._trained = Trained(2)
    with caplog.at_level(logging.WARNING, logger="diffpatch"):
        tiny.run()
        tiny.run()
    assert len([r for r in caplog.records if "'longer'" in r.getMessage()]) == 1
    report = diffpatch.report(tiny.pipe)
    assert len(report.notes) == 1 and "trained at 2: clips may repeat" in report.notes[0]
    tiny.run(num_frames=5)
    assert diffpatch.report(tiny.pipe).notes == ()
