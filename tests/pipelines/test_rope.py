"""Slowed frequencies in the rotary tables that diffusers builds, against angles computed here."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoRotaryPosEmbed
from diffusers.models.transformers.transformer_ltx import LTXVideoRotaryPosEmbed
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2RotaryPosEmbed
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

from diffpatch import DiffpatchError
from diffpatch.pipelines.families.rope import (
    Tables,
    dominant,
    first_to_repeat,
    rotary_embedding,
    slowed,
)

FRAMES, HEIGHT, WIDTH, TRAINED = 11, 3, 5, 4
TEXT = 4  # tokens


class CogVideoXTransformer3DModel:
    """Only what is asked of it: the name of the class, and the configuration."""

    config = SimpleNamespace(attention_head_dim=64, patch_size_t=None, patch_size=2)


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
    if name == "flux":
        rope = FluxPosEmbed(10000, [16, 56, 56])
        places = torch.cartesian_prod(torch.arange(1), torch.arange(HEIGHT), torch.arange(WIDTH))
        args = {"ids": torch.cat([torch.zeros(TEXT, 3), places])}
        return SimpleNamespace(pos_embed=rope), args, rope(**args)
    if name == "qwen":
        rope = QwenEmbedRope(10000, [16, 56, 56], scale_rope=True)
        args = {"video_fhw": [[(1, HEIGHT, WIDTH)]], "max_txt_seq_len": TEXT}
        return SimpleNamespace(pos_embed=rope), args, rope(**args, device=torch.device("cpu"))
    rope = {
        "wan": lambda: WanRotaryPosEmbed(48, (1, 2, 2), 32),
        "skyreels": lambda: SkyReelsV2RotaryPosEmbed(48, (1, 2, 2), 32),
        "hunyuan": lambda: HunyuanVideoRotaryPosEmbed(2, 1, [16, 8, 8], 256.0),
    }[name]()
    return SimpleNamespace(rope=rope), {"hidden_states": latents}, rope(latents)


NAMES = ("wan", "skyreels", "hunyuan", "ltx", "cogvideox", "flux", "qwen")
SPATIAL = ("wan", "skyreels", "hunyuan", "flux", "qwen")


def angles(tables: Tables, column: int) -> list[torch.Tensor]:
    """The angles that tables hold for a frequency, from both columns or the complex one."""
    if tables[0].is_complex():
        return [table[:, column].angle().double() for table in tables]
    cos, sin = (table.flatten(0, -2).double() for table in tables)
    rows = len(cos) // 2 if len(tables[0].shape) == 3 else len(cos)  # LTX has a batch
    both = [torch.atan2(sin[:rows, c], cos[:rows, c]) for c in (column, column + 1)]
    assert torch.allclose(both[0], both[1], atol=1e-6)
    return both[:1]


def same(angle: torch.Tensor, expected: torch.Tensor) -> bool:
    turn = (angle - expected + math.pi) % (2 * math.pi) - math.pi
    return bool(turn.abs().max() < 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_axes_are_those_of_the_tables(name: str) -> None:
    model, args, tables = made_by(name)
    found = rotary_embedding(model)
    assert found is not None
    assert (0 in found.axes) == (name not in ("flux", "qwen"))
    assert ({1, 2} <= set(found.axes)) == (name in SPATIAL)
    for number, axis in zip(found.axes, found.read(args), strict=True):
        assert axis.length == (FRAMES, HEIGHT, WIDTH)[number]
        places = axis.positions(torch.device("cpu"))
        for frequency, column in zip(axis.frequencies, axis.columns, strict=True):
            for angle, place in zip(angles(tables, column), places, strict=True):
                # LTX begins to count elsewhere, which cancels between queries and keys.
                begin = angle[0] if name == "ltx" else 0.0
                assert same(angle - begin, place.double() * frequency), (number, frequency)


@pytest.mark.parametrize("name", NAMES)
def test_chosen_frequencies_span_the_axis_and_the_others_stay(name: str) -> None:
    model, args, tables = made_by(name)
    found = rotary_embedding(model)
    assert found is not None
    before = [t.clone() for t in tables]
    for axis in found.read(args):
        fast = [j for j, f in enumerate(axis.frequencies) if f > 2 * math.pi / axis.length]
        slow = [j for j in range(len(axis.frequencies)) if j not in fast]
        assert slowed(tables, axis, slow) is tables  # none becomes faster than it was
        changed = slowed(tables, axis, [*fast[:2], *slow])
        assert all(torch.equal(a, b) for a, b in zip(tables, before, strict=True))
        width = 1 if tables[0].is_complex() else 2
        inside = torch.zeros(tables[0].shape[-1], dtype=torch.bool)
        for j in fast[:2]:
            inside[axis.columns[j] : axis.columns[j] + width] = True
            places = axis.positions(torch.device("cpu"))
            for angle, place in zip(angles(changed, axis.columns[j]), places, strict=True):
                assert same(angle, place.double() * 2 * math.pi / axis.length)
        for one, other in zip(changed, tables, strict=True):
            assert torch.equal(one[..., ~inside], other[..., ~inside])
            assert (one[..., inside] != other[..., inside]).any() or not fast


def geometric(dim: int, theta: float) -> tuple[float, ...]:
    return tuple(theta ** (-2 * j / dim) for j in range(dim // 2))


@pytest.mark.parametrize(
    ("dim", "theta", "trained", "k"),
    [
        (16, 256.0, 33, 4),  # HunyuanVideo: the authors of RIFLEx give k = 4, counted from 1
        (16, 10000.0, 13, 2),  # CogVideoX: k = 2
    ],
)
def test_the_first_to_repeat_is_the_one_that_riflex_gives(
    dim: int, theta: float, trained: int, k: int
) -> None:
    assert first_to_repeat(geometric(dim, theta), trained) == [k - 1]
    assert first_to_repeat((1.0, 2.0), 100) == []


@pytest.mark.parametrize(
    ("trained", "count", "k"),
    [(2048 // 16, 1, [9]), (1328 // 16, 2, [8, 9])],  # Flux and Qwen-Image, counted from 0
)
def test_the_dominant_ones_are_those_that_ultraimage_gives(
    trained: int, count: int, k: list[int]
) -> None:
    assert dominant(geometric(56, 10000.0), trained, count) == k
    assert len(dominant(geometric(56, 10000.0), trained, 99)) == 28 - k[0]


def test_tables_of_an_unknown_kind_are_not_touched() -> None:
    assert rotary_embedding(SimpleNamespace(rope=torch.nn.Identity())) is None
    assert rotary_embedding(SimpleNamespace()) is None


def test_coordinates_that_ltx_is_given_are_refused() -> None:
    model, args, _ = made_by("ltx")
    found = rotary_embedding(model)
    assert found is not None
    with pytest.raises(DiffpatchError, match="coordinates of its own"):
        found.read({**args, "video_coords": torch.zeros(1, 3, 4)})
