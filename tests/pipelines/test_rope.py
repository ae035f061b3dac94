"""RIFLEx on the rotary tables that diffusers builds, against a table computed here."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoRotaryPosEmbed
from diffusers.models.transformers.transformer_ltx import LTXVideoRotaryPosEmbed
from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2RotaryPosEmbed
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

from diffpatch import DiffpatchError
from diffpatch.pipelines.families.rope import Tables, rotary_embedding, slowed

FRAMES, HEIGHT, WIDTH, TRAINED = 11, 3, 5, 4


class CogVideoXTransformer3DModel:
    """Only what is asked of it: the name of the class, and the configuration."""

    config = SimpleNamespace(attention_head_dim=64, patch_size_t=None)


def made_by(name: str) -> tuple[Any, dict[str, Any], Tables]:
    """A model, the arguments of the forward that makes the tables, and the tables."""
    latents = torch.zeros(1, 4, FRAMES, HEIGHT * 2, WIDTH * 2)
    rope: Any
    args: dict[str, Any]
    tables: Any
    if name == "cogvideox":
        tables = get_3d_rotary_pos_embed(64, ((0, 0), (HEIGHT, WIDTH)), (HEIGHT, WIDTH), FRAMES)
        args = {"hidden_states": torch.zeros(1, FRAMES, 4, HEIGHT * 2, WIDTH * 2)}
        return CogVideoXTransformer3DModel(), args, tables
    if name == "ltx":
        rope = LTXVideoRotaryPosEmbed(32, base_num_frames=20, theta=100.0)
        tokens = torch.zeros(2, FRAMES * HEIGHT * WIDTH, 8)
        scale = (8 / 25, 32, 32)
        size = {"num_frames": FRAMES, "height": HEIGHT, "width": WIDTH}
        args = {"hidden_states": tokens, "rope_interpolation_scale": scale, **size}
        return SimpleNamespace(rope=rope), args, rope(**args)
    rope = {
        "wan": lambda: WanRotaryPosEmbed(48, (1, 2, 2), 32),
        "skyreels": lambda: SkyReelsV2RotaryPosEmbed(48, (1, 2, 2), 32),
        "hunyuan": lambda: HunyuanVideoRotaryPosEmbed(2, 1, [16, 8, 8], 256.0),
    }[name]()
    return SimpleNamespace(rope=rope), {"hidden_states": latents}, rope(latents)


NAMES = ("wan", "skyreels", "hunyuan", "ltx", "cogvideox")


@pytest.mark.parametrize("name", NAMES)
def test_the_frequencies_are_those_of_the_tables(name: str) -> None:
    model, args, (cos, sin) = made_by(name)
    found = rotary_embedding(model)
    assert found is not None
    where = found.read(args)
    assert where.num_frames == FRAMES
    cos, sin = (x.flatten(0, -2).view(-1, FRAMES, HEIGHT * WIDTH, x.shape[-1]) for x in (cos, sin))
    for frequency, column in zip(where.frequencies, where.columns, strict=True):
        # From one frame to the next each of them turns by its frequency, in both of its columns.
        angle = torch.atan2(sin, cos)[..., column : column + 2].double()
        turn = (angle.diff(dim=1) - frequency + math.pi) % (2 * math.pi) - math.pi
        assert turn.abs().max() < 1e-4, (frequency, column)


@pytest.mark.parametrize("name", NAMES)
def test_one_frequency_spans_the_clip_and_the_others_stay(name: str) -> None:
    model, args, tables = made_by(name)
    found = rotary_embedding(model)
    assert found is not None
    where, before = found.read(args), [t.clone() for t in tables]
    cos, sin = slowed(tables, where, TRAINED)
    assert all(torch.equal(a, b) for a, b in zip(tables, before, strict=True))
    periods = [2 * math.pi / f for f in where.frequencies]
    distances = [abs(p - TRAINED) for p in periods]
    column = where.columns[distances.index(min(distances))]
    inside = torch.zeros(cos.shape[-1], dtype=torch.bool)
    inside[column : column + 2] = True
    assert torch.equal(cos[..., ~inside], tables[0][..., ~inside])
    assert torch.equal(sin[..., ~inside], tables[1][..., ~inside])
    rows = cos.flatten(0, -2).view(-1, FRAMES, HEIGHT * WIDTH, cos.shape[-1])
    for frame in range(FRAMES):
        expected = math.cos(2 * math.pi * frame / FRAMES)
        assert (rows[:, frame][..., inside] - expected).abs().max() < 1e-6
    assert (cos.square() + sin.square() - 1).abs().max() < 1e-5


def test_tables_of_an_unknown_kind_are_not_touched() -> None:
    assert rotary_embedding(SimpleNamespace(rope=torch.nn.Identity())) is None
    assert rotary_embedding(SimpleNamespace()) is None


def test_coordinates_that_ltx_is_given_are_refused() -> None:
    model, args, _ = made_by("ltx")
    found = rotary_embedding(model)
    assert found is not None
    with pytest.raises(DiffpatchError, match="coordinates of its own"):
        found.read({**args, "video_coords": torch.zeros(1, 3, 4)})
