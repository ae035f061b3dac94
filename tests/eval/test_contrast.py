"""The shipped contrastive model: captions find their clips, damage shows, and training works."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from diffpatch.eval.quality import scores as quality
from diffpatch.eval.quality.distances import frechet
from diffpatch.eval.quality.networks import contrast
from diffpatch.pipelines.demo import clips
from tests.scripts import load_example


def drawn(seed: int, count: int, num_frames: int = 9) -> tuple[torch.Tensor, list[str]]:
    """Real clips (count, 3, F, 64, 64) in [-1, 1] of held-out captions."""
    generator = torch.Generator().manual_seed(seed)
    specs = clips.sample_specs(count, generator, held_out=True)
    times = clips.frame_times(num_frames).expand(count, -1)
    scenes = clips.draw_scenes(specs, generator)
    return clips.render(scenes, times, 64), [spec.caption() for spec in specs]


@pytest.fixture(scope="module")
def model() -> contrast.Contrast:
    return contrast.load_contrast()


@pytest.mark.parametrize("num_frames", [9, 14, 33])
def test_captions_find_their_clips(model: contrast.Contrast, num_frames: int) -> None:
    video, captions = drawn(1, 20, num_frames)
    specs = [s for pattern in ("plain", "striped") for s in clips.all_specs(True, pattern)]
    everything = [spec.caption() for spec in specs]
    found = (model.embed_clips(video) @ model.embed_text(everything).T).argmax(1)
    right = [everything[int(index)] == text for index, text in zip(found, captions, strict=True)]
    assert sum(right) / len(right) >= 0.95  # of 712 captions that training never saw


def test_the_right_caption_beats_one_wrong_word(model: contrast.Contrast) -> None:
    video, captions = drawn(2, 20)
    seen = model.embed_clips(video)
    own = (seen * model.embed_text(captions)).sum(1)
    for old, new in (("moves left", "moves right"), ("large", "small"), ("circle", "square")):
        changed = [text.replace(old, new) for text in captions]
        touched = torch.tensor([a != b for a, b in zip(captions, changed, strict=True)])
        assert touched.any()
        other = (seen * model.embed_text(changed)).sum(1)
        assert (own > other)[touched].all()


def test_frames_know_what_they_show_but_not_how_it_moves(model: contrast.Contrast) -> None:
    video, captions = drawn(3, 20)
    frames = model.embed_frames(video[:, :, 4])
    stills = [clips.parse_caption(text) for text in captions]
    texts = model.embed_text([s.caption().replace(f" {s.motion}", "") for s in stills])
    own = (frames * texts).sum(1)
    assert own.mean() > 0.5 and own.mean() > (frames @ texts.T).mean() + 0.4


@pytest.mark.parametrize(
    ("kind", "strengths"),
    [("noise", (0.05, 0.1, 0.2, 0.4)), ("blur", (3, 5, 9)), ("shuffled", (0.6, 1.0))],
)
def test_the_distance_of_sets_rises_with_damage(
    model: contrast.Contrast, kind: str, strengths: tuple[float, ...]
) -> None:
    count = 140 if kind == "shuffled" else 60  # order in time is told from few features
    real, other = model.features(drawn(10, count)[0]), drawn(11, count)[0]
    floor = frechet(real, model.features(other))
    damage, generator = load_example("train_contrast").damage, torch.Generator().manual_seed(5)
    damaged = [damage(other, kind, strength, generator) for strength in strengths]
    found = [frechet(real, model.features(video)) for video in damaged]
    assert [floor, *found] == sorted([floor, *found])
    assert found[-1] > (1.3 if kind == "shuffled" else 5) * floor


def test_scores_of_clips_of_any_size_and_length(model: contrast.Contrast) -> None:
    tools = quality.load_tools()
    generator = torch.Generator().manual_seed(4)
    spec = clips.sample_specs(1, generator, held_out=True)[0]
    scenes = clips.draw_scenes([spec], generator)
    for num_frames, size in ((13, 128), (33, 96), (9, 65)):
        video = clips.render(scenes, clips.frame_times(num_frames)[None], size)
        frames = ((video[0].transpose(0, 1) + 1) / 2).clamp(0, 1)
        assert quality.alone(frames, spec.caption(), tools)["clip_score"] > 80


def test_words_of_another_world_are_refused() -> None:
    with pytest.raises(contrast.UnknownWords, match="fox"):
        contrast.tokenize(["a red fox"])
    with pytest.raises(contrast.UnknownWords, match="empty"):
        contrast.tokenize([" "])
    tokens = contrast.tokenize(["a red circle", "A Large red circle"])
    assert tokens.shape == (2, 4) and tokens[0, -1] == 0 and tokens[0, 1] == tokens[1, 2]


def test_weights_are_small_and_missing_ones_are_named(tmp_path: Path) -> None:
    assert contrast.WEIGHTS.stat().st_size < 4 * 2**20
    with pytest.raises(FileNotFoundError, match="train_contrast"):
        contrast.load_contrast(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="expected"):
        contrast.Contrast().features(torch.zeros(2, 3, 64, 64))


def test_training_lowers_the_loss() -> None:
    script = load_example("train_contrast")
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model, rough = contrast.Contrast(width=8), torch.nn.Linear(contrast.FEATURES, 2)
    optimizer = torch.optim.AdamW([*model.parameters(), *rough.parameters()], lr=5e-3)
    specs = clips.sample_specs(8, generator)
    video, amount = script.roughen(script.draw(specs, generator, num_frames=9), generator)
    losses = []
    for _ in range(12):
        loss = script.loss_of(model, rough, specs, video, amount)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert len(set(script.neighbors(specs[0]))) == 1 + 7 + 4 + 5 + 1 + 5


def test_the_record_is_of_the_shipped_weights() -> None:
    """Written by the script: captions find their clips, and the scores answer to damage."""
    record = json.loads(load_example("train_contrast").RECORD.read_text(encoding="utf-8"))
    assert record["weights_sha256"] == hashlib.sha256(contrast.WEIGHTS.read_bytes()).hexdigest()
    check = record["check"]
    assert check["clips"] >= 200 and check["captions"] == 712
    assert all(found["first"] >= 0.95 for found in check["retrieval"].values())
    scores: dict[str, list[tuple[float, float]]] = {}
    for entry in check["damage"]:
        scores.setdefault(entry["kind"], []).append((entry["first"], entry["clip_score"]))
    [intact] = scores.pop("none")
    for kind, found in scores.items():
        assert found == sorted(found, reverse=True), kind  # more damage, less of the caption
        assert found[-1][0] < 0.85 * intact[0] and found[-1][1] < 0.9 * intact[1], kind


def test_the_check_is_measured_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, weights = load_example("train_contrast"), tmp_path / "w.safetensors"
    words = ["--out", str(weights), "--record", str(tmp_path / "r.json"), "--check", "6"]
    script.main([*words, "--steps", "1", "--batch", "2"])
    untrained = json.loads((tmp_path / "r.json").read_text())
    assert untrained["training"]["steps"] == 1 and weights.is_file()
    assert untrained["check"]["retrieval"]["13"]["first"] < 0.5
    weights.write_bytes(contrast.WEIGHTS.read_bytes())
    script.main([*words, "--check-only"])
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["training"] is None and "noise 0.6" in capsys.readouterr().out
    by = {(entry["kind"], entry["strength"]): entry for entry in found["check"]["damage"]}
    assert by["none", 0.0]["first"] >= 5 / 6
    for worst in (("noise", 0.6), ("blur", 17), ("pixels", 16), ("frozen", 1.0)):
        assert by[worst]["clip_score"] < by["none", 0.0]["clip_score"] - 5
