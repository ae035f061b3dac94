"""Quality: what is measured of a clip, with the shipped networks and with those of a user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffpatch.eval.quality import scores as quality
from diffpatch.eval.quality.distances import FeatureSet
from diffpatch.eval.quality.networks.clip import DemoClip, HubClip, WeightsError
from diffpatch.eval.quality.networks.features import load_features
from diffpatch.eval.quality.networks.inception import Inception
from diffpatch.eval.quality.networks.lpips import Lpips, load_lpips, lpips
from diffpatch.eval.quality.tally import Tally, measure
from diffpatch.pipelines.demo import clips
from tests.eval import tiny_eval

CAPTION = "a large red circle moves left over a striped navy background"


def drawn(caption: str = CAPTION, num_frames: int = 9, size: int = 64, seed: int = 0) -> Any:
    """A real clip of the demo's world, (F, 3, H, W) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    scenes = clips.draw_scenes([clips.parse_caption(caption)], generator)
    video = clips.render(scenes, clips.frame_times(num_frames)[None], size)
    return ((video[0].transpose(0, 1) + 1) / 2).clamp(0, 1)


@pytest.fixture(scope="module")
def tools() -> quality.Tools:
    return quality.load_tools()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models on disk: clip, dinov2, videomae, and LPIPS weights."""
    path = tmp_path_factory.mktemp("judges")
    tiny_eval.save_clip(path / "clip")
    tiny_eval.save_dinov2(path / "dinov2")
    tiny_eval.save_videomae(path / "videomae")
    tiny_eval.save_lpips(path / "lpips.safetensors")
    return path


def test_a_pair_of_equal_clips_gets_the_best_values(tools: quality.Tools) -> None:
    frames = drawn(size=176, num_frames=2)
    scores = quality.paired(frames, frames, tools)
    best = {"psnr": 100.0, "ssim": 1.0, "ms_ssim": 1.0, "relative_l1": 0.0, "clip_i": 1.0}
    assert scores == pytest.approx(best, abs=1e-5)


def test_a_clip_alone(tools: quality.Tools) -> None:
    scores = quality.alone(drawn(), CAPTION, tools)
    assert scores["caption_accuracy"] == scores["caption_exact"] == 1.0
    assert 50 < scores["clip_score"] <= 100
    wrong = quality.alone(drawn(), CAPTION.replace("left", "right"), tools)
    assert wrong["caption_accuracy"] == pytest.approx(5 / 6) and wrong["caption_exact"] == 0.0
    assert wrong["clip_score"] < scores["clip_score"]
    assert wrong["caption_log_prob"] < -0.1 < scores["caption_log_prob"] <= 0
    still = quality.alone(drawn()[:1].expand(9, -1, -1, -1), CAPTION, tools)
    assert still["flicker"] == 0.0 and still["temporal_consistency"] == pytest.approx(1.0)
    assert scores["flicker"] > 0 and scores["temporal_consistency"] < 1


def test_flicker_is_the_mean_step_between_frames(tools: quality.Tools) -> None:
    frames = torch.stack([torch.full((3, 64, 64), level) for level in (0.0, 0.5, 0.25)])
    assert quality.alone(frames, None, tools)["flicker"] == pytest.approx((0.5 + 0.25) / 2)


@pytest.mark.parametrize(
    ("frames", "prompt", "missing"),
    [
        (drawn(), None, {"clip_score", "caption_accuracy", "lpips", "ms_ssim"}),
        (drawn(), "a fox in snow", {"clip_score", "caption_accuracy", "lpips", "ms_ssim"}),
        (drawn(size=176), CAPTION, {"lpips"}),
        (drawn(num_frames=5), CAPTION, {"caption_accuracy", "lpips", "ms_ssim"}),
        (drawn()[:1], CAPTION, {
            "caption_accuracy", "flicker", "temporal_consistency", "lpips", "ms_ssim"}),
    ],
)  # fmt: skip
def test_what_is_not_measured_has_a_reason(
    tools: quality.Tools, frames: torch.Tensor, prompt: str | None, missing: set[str]
) -> None:
    measured = quality.alone(frames, prompt, tools) | quality.paired(frames, frames, tools)
    reasons = quality.absent(tools, frames=frames, prompt=prompt)
    assert set(reasons) == missing and all(reasons.values())
    assert not missing & set(measured)
    everything = {"psnr", "ssim", "ms_ssim", "relative_l1", "clip_i", "lpips", "clip_score"}
    everything |= {"temporal_consistency", "flicker", "caption_accuracy"}
    assert everything - missing <= set(measured)


@pytest.mark.parametrize(("height", "width"), [(176, 180), (180, 176), (175, 300), (300, 175)])
def test_both_sides_of_a_frame_have_to_be_long_enough(
    tools: quality.Tools, height: int, width: int
) -> None:
    frames, enough = torch.rand(1, 3, height, width), min(height, width) >= 176
    assert ("ms_ssim" in quality.paired(frames, frames, None)) == enough
    reasons = quality.absent(tools, frames=frames)
    assert reasons.get("ms_ssim") == (
        None if enough else f"needs 176 pixels a side, frames have {height}×{width}"
    )


def test_what_is_no_clip_is_refused(tools: quality.Tools) -> None:
    for wrong in (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.zeros(3, 64, 64)):
        with pytest.raises(ValueError, match="floats"):
            quality.alone(wrong, None, tools)
    with pytest.raises(ValueError, match="floats"):
        quality.alone(torch.zeros(0, 3, 64, 64), None, tools)


def test_bf16_clips_are_measured(tools: quality.Tools) -> None:
    frames = drawn()
    rounded = quality.alone(frames.bfloat16(), CAPTION, tools)
    assert rounded == pytest.approx(quality.alone(frames, CAPTION, tools), rel=0.02)


def test_sets_of_tensors_and_of_named_features_agree(tools: quality.Tools) -> None:
    [extractor] = tools.extractors
    rows = {str(seed): extractor(drawn(seed=seed)) for seed in range(6)}
    named, stacked = FeatureSet(rows, "contrast"), torch.cat(list(rows.values()))
    result = quality.sets(named, named)
    assert result == quality.sets(stacked, stacked)
    assert result["fd"] == pytest.approx(0, abs=1e-4) and result["small_sample"]
    with pytest.raises(ValueError, match="contrast and judge have no distance"):
        quality.sets(named, FeatureSet(rows, "judge"))


def test_a_clip_model_of_a_user_scores_as_transformers_does(folder: Path) -> None:
    tools = quality.load_tools(clip=folder / "clip")
    assert isinstance(tools.clip, HubClip)
    frames, prompt = torch.rand(3, 3, 48, 40), "red fox"
    model, tokens = tools.clip.model, tools.clip.tokenizer([prompt], return_tensors="pt")
    with torch.no_grad():
        logits = model(**tokens, pixel_values=tools.clip.prepare(frames)).logits_per_image
    expected = 100 * (logits / model.logit_scale.exp()).mean()
    scores = quality.alone(frames, prompt, tools)
    assert scores["clip_score"] == pytest.approx(float(expected), rel=1e-4)
    assert scores["temporal_consistency"] < 1
    assert quality.alone(frames, "x" * 200, tools)["clip_score"] != scores["clip_score"]
    assert tools.names()["clip"] == str(folder / "clip")
    assert "empty prompt" in quality.absent(tools, prompt=" ")["clip_score"]


@pytest.mark.parametrize(
    ("name", "shape"),
    [("clip", (6, 32)), ("dinov2", (6, 32)), ("videomae", (1, 32))],
)
def test_features_of_a_folder(folder: Path, name: str, shape: tuple[int, int]) -> None:
    frames = torch.rand(6, 3, 40, 56)
    extractor = load_features(folder / name)
    assert tuple(extractor(frames).shape) == shape
    assert torch.equal(extractor(frames), extractor(frames))
    assert not torch.equal(extractor(frames), extractor(frames.flip(0)))


@pytest.mark.parametrize(
    ("name", "shape"), [("contrast", (1, 128)), ("judge", (1, 96)), ("frames", (9, 64))]
)
def test_shipped_features(name: str, shape: tuple[int, int]) -> None:
    """A row a clip for FVD-style distances, a row a frame for FID-style ones."""
    extractor, clip = load_features(name), drawn()
    found = extractor(clip)
    assert extractor.name == name and found.shape == shape
    assert extractor.row == ("frame" if len(found) > 1 else "clip")
    swapped = extractor(clip.flip(0))
    if extractor.row == "frame":  # every frame by itself: their order changes no distance
        torch.testing.assert_close(swapped, found.flip(0))
    else:
        assert not torch.allclose(swapped, found)


def test_several_extractors_measure_the_same_clips() -> None:
    tools = quality.load_tools(features=["frames", "contrast", "frames"])
    assert tools.names()["features"] == "frames, contrast"
    tallies = [measure(str(seed), drawn(seed=seed), tools) for seed in range(3)]
    whole = tallies[2].merge(*tallies[:2])
    sets = whole.row("x", Tally().merge(*tallies))["sets"]
    assert {name: found["count"] for name, found in sets.items()} == {"frames": 27, "contrast": 3}
    assert all(found["fd"] == pytest.approx(0, abs=1e-6) for found in sets.values())
    other = measure("3", drawn(seed=3), quality.load_tools())
    with pytest.raises(ValueError, match="cannot be merged"):
        whole.merge(other)


def test_lpips_compares_normalised_activations(folder: Path) -> None:
    tools = quality.load_tools(lpips=folder / "lpips.safetensors")
    assert tools.lpips is not None
    frames = drawn(num_frames=3)
    noisy = [(frames + s * torch.randn_like(frames)).clamp(0, 1) for s in (0.02, 0.1, 0.3)]
    scores = [quality.paired(clip, frames, tools)["lpips"] for clip in noisy]
    assert scores == sorted(scores) and scores[0] > 0
    assert quality.paired(frames, frames, tools)["lpips"] == 0.0
    assert "lpips" in tools.names() and "lpips" not in quality.absent(tools, frames=frames)
    least = torch.rand(2, 3, 31, 40)
    assert "lpips" in quality.paired(least, least, tools)
    assert not {"lpips", "flicker"} & set(quality.absent(tools, frames=least))
    small = torch.rand(1, 3, 30, 64)
    assert "lpips" not in quality.paired(small, small, tools)
    assert "needs 31" in quality.absent(tools, frames=small)["lpips"]
    with pytest.raises(ValueError, match="31×31"):
        lpips(tools.lpips, small, small)
    assert lpips(tools.lpips, torch.rand(1, 3, 31, 31), torch.rand(1, 3, 31, 31)).mean > 0


def test_lpips_is_its_formula(folder: Path) -> None:
    model = load_lpips(folder)  # a folder works as well as its file
    weights = load_file(folder / "lpips.safetensors")
    a, b = torch.rand(2, 1, 3, 40, 52).double()
    expected, values = 0.0, []
    for frame in (a, b):
        x = 2 * frame - 1 - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1).double()
        values.append(x / torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1).double())
    settings = {0: (4, 2), 3: (1, 2), 6: (1, 1), 8: (1, 1), 10: (1, 1)}
    for number, (layer, (stride, padding)) in enumerate(settings.items()):
        kernel, bias = (weights[f"features.{layer}.{n}"].double() for n in ("weight", "bias"))
        values = [
            torch.relu(torch.conv2d(torch.max_pool2d(x, 3, 2) if layer in (3, 6) else x,
                                    kernel, bias, stride, padding)) for x in values
        ]  # fmt: skip
        unit = [x / x.norm(dim=1, keepdim=True).clamp(min=1e-10) for x in values]
        head = weights[f"lin{number}.model.1.weight"].double()
        expected += float(((unit[0] - unit[1]) ** 2 * head).sum(1).mean())
    assert lpips(model, a, b).mean == pytest.approx(expected, rel=1e-4)


def test_inception_has_the_shape_of_fids(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Inception()
    assert sum(p.numel() for p in model.parameters()) == 21_785_568  # of the published network
    shapes = {k: v.shape for k, v in model.state_dict().items() if "num_batches" not in k}
    assert {"Conv2d_1a_3x3.conv.weight", "Mixed_6b.branch7x7dbl_5.bn.running_var",
            "Mixed_7c.branch3x3dbl_3b.conv.weight"} <= set(shapes)  # fmt: skip
    # Every convolution takes the mean of what it sees, so brighter frames have larger features.
    weights = {k: torch.full(shape, 1 / shape[1:].numel() if len(shape) == 4 else 1.0)
               for k, shape in shapes.items()}  # fmt: skip
    weights |= {k: torch.zeros(shape) for k, shape in shapes.items() if k.endswith("mean")}
    save_file(weights | {"fc.weight": torch.zeros(1008, 2)}, tmp_path / "fid.safetensors")
    extractor = load_features(tmp_path / "fid.safetensors")
    frames = torch.stack([torch.full((3, 33, 47), level) for level in (0.6, 0.9)])
    features = extractor(frames)
    assert features.shape == (2, 2048) and (features[1] > features[0]).all()
    weights.pop("Mixed_6a.branch3x3.bn.weight")
    save_file(weights, tmp_path / "fid.safetensors")
    with pytest.raises(WeightsError, match=r"it has no Mixed_6a.branch3x3.bn.weight"):
        load_features(tmp_path / "fid.safetensors")


def test_weights_that_are_not_there_are_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "lpips.pth").write_bytes(b"pickle")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    save_file({"features.0.weight": torch.zeros(2, 2)}, tmp_path / "half.safetensors")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"clip": tmp_path / "nothing"}, "cannot be loaded as CLIPModel"),
        ({"clip": folder / "dinov2"}, "cannot be loaded as"),
        ({"features": "judgge"}, "did you mean 'judge'"),
        ({"features": tmp_path}, "'bert'"),
        ({"features": folder / "lpips.safetensors"}, "not FID's Inception"),
        ({"features": tmp_path / "no.safetensors"}, "there is no file"),
        ({"lpips": tmp_path / "lpips.pth"}, "is not a safetensors file"),
        ({"lpips": tmp_path / "none.safetensors"}, "is not a safetensors file"),
        ({"lpips": tmp_path / "half.safetensors"}, r"must hold features.0.weight of shape"),
    ]
    for options, message in cases:
        with pytest.raises(WeightsError, match=message):
            quality.load_tools(**options)


def test_tools_are_models_that_do_not_learn(tools: quality.Tools, folder: Path) -> None:
    assert isinstance(tools.clip, DemoClip)
    loaded: list[Any] = [tools.clip.model, load_lpips(folder), load_features("contrast")]
    for model in (loaded[0], loaded[1], loaded[2].model):
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
    assert isinstance(loaded[1], Lpips)
