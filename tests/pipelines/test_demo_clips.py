"""The world of the demo model: captions, the held-out split, the renderer, the autoencoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffpatch.pipelines.demo import clips, vae

FRAMES = 13


def draw(specs: list[clips.ClipSpec], size: int = 64, seed: int = 0) -> Tensor:
    """Draw full clips of ``specs``."""
    scenes = clips.draw_scenes(specs, torch.Generator().manual_seed(seed))
    return clips.render(scenes, clips.frame_times(FRAMES).expand(len(specs), -1), size)


def shape_mask(video: Tensor, spec: clips.ClipSpec) -> Tensor:
    """Where each frame shows the colour of the shape: ``[F, H, W]``."""
    color = 2 * torch.tensor(clips.COLORS[spec.color]).view(3, 1, 1, 1) - 1
    return ((video - color).abs().amax(0) < 0.1).float()


def test_every_caption_reads_back() -> None:
    specs = [
        spec
        for held_out in (False, True)
        for pattern in clips.ATTRIBUTES["pattern"]
        for spec in clips.all_specs(held_out, pattern)
    ]
    captions = {spec.caption() for spec in specs}
    assert len(captions) == len(specs) == 2 * 8 * 5 * 6 * 2 * 6
    assert all(clips.parse_caption(spec.caption()) == spec for spec in specs)
    assert set(" ".join(captions).split()) == set(clips.vocabulary())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a dog",
        "a large red circle moves left over a navy",
        "a large red circle moves left over a dotted navy background",
        "a large red circle flies over a navy background",
        "the large red circle grows over a navy background",
        "a large red circle over a background",
    ],
)
def test_other_sentences_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        clips.parse_caption(text)


def test_held_out_captions_are_never_drawn_for_training() -> None:
    generator = torch.Generator().manual_seed(0)
    train = {spec.caption() for spec in clips.sample_specs(4000, generator)}
    held = {spec.caption() for spec in clips.sample_specs(4000, generator, held_out=True)}
    assert not train & held
    share = sum(len(clips.all_specs(True, p)) for p in clips.ATTRIBUTES["pattern"]) / 5760
    assert 0.10 < share < 0.15
    for name, values in clips.ATTRIBUTES.items():  # nothing is new on its own, only combined
        assert {getattr(clips.parse_caption(text), name) for text in held} == set(values)


def test_drawing_is_reproducible() -> None:
    specs = clips.sample_specs(4, torch.Generator().manual_seed(1))
    assert specs == clips.sample_specs(4, torch.Generator().manual_seed(1))
    assert torch.equal(draw(specs, seed=2), draw(specs, seed=2))
    assert not torch.equal(draw(specs, seed=2), draw(specs, seed=3))


@pytest.mark.parametrize("shape", clips.SHAPES)
@pytest.mark.parametrize("motion", clips.MOTIONS)
def test_the_shape_does_what_the_caption_says(shape: str, motion: str) -> None:
    spec = clips.ClipSpec("small", "red", shape, motion, "plain", "black")
    mask = shape_mask(draw([spec])[0], spec)
    grid = (torch.arange(64) + 0.5) / 64
    area = mask.mean((1, 2))
    x = (mask * grid).mean((1, 2)) / area
    y = (mask * grid[:, None]).mean((1, 2)) / area
    steps = {"x": x.diff(), "y": y.diff(), "area": area.diff()}
    moving, sign = {
        "moves left": ("x", -1),
        "moves right": ("x", 1),
        "moves up": ("y", -1),
        "moves down": ("y", 1),
        "grows": ("area", 1),
        "shrinks": ("area", -1),
    }[motion]
    assert (sign * steps[moving] > 0).all()
    for name, still in {"x": x, "y": y}.items():
        if name != moving:
            assert still.max() - still.min() < 0.02


def test_large_shapes_are_larger_than_small_ones() -> None:
    area = {}
    for size in clips.SIZES:
        spec = clips.ClipSpec(size, "cyan", "circle", "moves up", "plain", "black")
        area[size] = shape_mask(draw([spec])[0], spec).mean()
    assert area["large"] > 2 * area["small"]


def test_a_subset_of_frames_shows_the_same_scene_at_any_size() -> None:
    specs = clips.sample_specs(6, torch.Generator().manual_seed(3))
    scenes = clips.draw_scenes(specs, torch.Generator().manual_seed(4))
    times = clips.frame_times(FRAMES).expand(6, -1)
    whole = clips.render(scenes, times, 64)
    assert torch.equal(clips.render(scenes, times[:, [2, 7]], 64), whole[:, :, [2, 7]])
    large = clips.render(scenes, times, 128)
    small = torch.nn.functional.avg_pool3d(large, (1, 2, 2))
    assert (small - whole).abs().mean() < 0.01


def test_stripes_are_visible_on_every_background() -> None:
    for background in clips.BACKGROUNDS:
        plain, striped = (
            draw([clips.ClipSpec("small", "red", "circle", "grows", pattern, background)])[0]
            for pattern in ("plain", "striped")
        )
        edge = plain[:, 0, 0]  # the first row of the first frame lies outside the shape
        assert edge.std(dim=1).max() == 0
        assert striped[:, 0, 0].std(dim=1).max() > 0.05


def test_the_autoencoder_reproduces_unseen_clips() -> None:
    autoencoder: Any = vae.build_vae(fit_clips=80)
    video = draw(clips.sample_specs(4, torch.Generator().manual_seed(5), held_out=True), size=128)
    with torch.no_grad():
        codes = autoencoder.encode(video).latent_dist.mode()
        decoded = autoencoder.decode(codes).sample
    error = ((decoded - video) / 2).square().mean((1, 2, 3, 4))
    assert (-10 * error.log10()).min() > 28  # decibels
    matrix, offset = vae.encoder_matrix(autoencoder)
    std = torch.tensor(autoencoder.config.latents_std).view(1, -1, 1, 1, 1)
    fast = vae.encode(video, matrix, offset) * std
    assert (fast - codes).abs().max() < 0.01 * codes.abs().max()
