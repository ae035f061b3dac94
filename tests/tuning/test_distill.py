"""Distilled linear attention: what is learned, its file, and what is refused."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

import diffpatch
from diffpatch import BadParameter, Linear, TokenGrid
from diffpatch.cli import main
from diffpatch.kernels.linear import api as linear_attention
from diffpatch.kernels.linear import features as linear_features
from diffpatch.kernels.linear import reference as linear_attention_reference
from diffpatch.methods.base import AttentionCall
from diffpatch.methods.learned import files as adapter
from diffpatch.methods.linear import distilled
from diffpatch.tuning.distill import Distiller, recording
from tests.kernels.random_blocks import random_qkv
from tests.tiny import Tiny, wan

GRIDS = [TokenGrid(5, 7, 9), TokenGrid(4, 6, 11, text_before=5)]
UNTRAINED = Linear(far="hedgehog", near=32, allow_untrained=True)


@pytest.mark.parametrize("feature", linear_features.FEATURES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_features_are_their_formula(grid: TokenGrid, feature: str) -> None:
    q, k, v = random_qkv(2, grid.num_tokens, 4, 16, torch.float64, key_heads=2)
    v = v - 3
    q[:, :, 0] = -1  # relu is blind here
    blocks = Linear(far="state", near=60).pattern(grid).blocks
    mask = torch.rand(2, grid.num_tokens, generator=torch.Generator().manual_seed(0)) < 0.7
    for keys in (None, mask):
        out = linear_attention.attend_features(q, k, v, blocks, feature, keys)
        expected = linear_attention_reference.attend_features(q, k, v, blocks, feature, keys)
        assert (out - expected).abs().max() < 1e-12
        single = linear_attention.attend_features(
            q.float(), k.float(), v.float(), blocks, feature, keys
        )
        out = single.double()
        assert (out - expected).abs().max() < 1e-5


@pytest.mark.parametrize("feature", linear_features.FEATURES)
def test_feature_maps_are_refused_untrained(feature: str) -> None:
    with pytest.raises(BadParameter, match="little more than the mean of the values"):
        diffpatch.make_method("linear", far=feature)
    grid = GRIDS[1]
    q, k, v = random_qkv(1, grid.num_tokens, 2, 16, torch.float64)
    out = diffpatch.attention(q, k, v, grid, "linear", far=feature, near=0, allow_untrained=True)
    # Nothing is near but the text; the rest is φ alone, blended with the moments.
    pattern = Linear(far=feature, near=0, allow_untrained=True).pattern(grid)
    assert pattern.dense()[0][5:, 5:].sum() == 0
    x, y, z = (t.transpose(1, 2) for t in (q, k, v))
    text = torch.nn.functional.scaled_dot_product_attention(x, y, z).transpose(1, 2)
    assert (out[:, :5] - text[:, :5]).abs().max() < 1e-12
    assert torch.isfinite(out).all()


def test_gates_start_as_one_softmax() -> None:
    grid = GRIDS[1]
    q, k, v = random_qkv(1, grid.num_tokens, 2, 16, torch.float64)
    learned = {"gate": torch.tensor([[0.0, 0.0, -1e9]] * 2)}  # no features in the blend
    method = Linear(far="elu", near=60, allow_untrained=True)
    out = method.attend(q, k, v, AttentionCall(method.pattern(grid), learned=learned)).out
    expected = diffpatch.attention(q, k, v, grid, Linear(far="state", near=60))
    assert (out - expected).abs().max() < 1e-10


def test_initial_parameters_change_nothing() -> None:
    grid = GRIDS[0]
    q, k, v = random_qkv(1, grid.num_tokens, 4, 16, torch.float64, key_heads=2)
    call = AttentionCall(UNTRAINED.pattern(grid))
    learned = distilled.initial(4, 2, 16, features=True, rank=3)
    out = UNTRAINED.attend(q, k, v, AttentionCall(call.pattern, learned=learned)).out
    assert (out - UNTRAINED.attend(q, k, v, call).out).abs().max() < 1e-6


def sharpened() -> Tiny:
    """A random model whose attention is not flat, which any linear attention would get right."""
    tiny = wan(layers=2, heads=2, head_dim=16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in tiny.pipe.transformer.blocks:
            attention = block.attn1
            noise = torch.randn(attention.to_q.weight.shape, generator=generator)
            scale = attention.to_q.weight.std()
            attention.to_k.weight.copy_(0.8 * attention.to_q.weight + 0.6 * scale * noise)
            attention.to_k.bias.copy_(attention.to_q.bias)
            for norm in (attention.norm_q, attention.norm_k):
                norm.weight.mul_(1.6)
            block.scale_shift_table[:, 2] = 1.0  # the gate of attention
    return tiny


CALL: dict[str, Any] = {"height": 128, "width": 128, "num_frames": 13, "num_inference_steps": 3}
TWO_STEPS = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny model distilled in seconds; 4×8×8 tokens, of which a query sees an eighth exactly."""
    tiny = sharpened()
    transformer = tiny.pipe.transformer
    plain = tiny.run(**CALL)
    with recording(transformer) as samples:
        for seed in range(16):
            prompt = ("a cat", "dog!", "red sea", "a moon")[seed % 4]
            tiny.run(seed, prompt=prompt, output_type="latent", **{**CALL, **TWO_STEPS})
    with recording(transformer) as held:
        tiny.run(100, prompt="the sun", output_type="latent", **CALL)
    found: dict[str, Any] = {"tiny": tiny, "plain": plain, "held": held}
    teacher = Distiller(transformer, UNTRAINED, samples[0], rank=4)
    found["watched"] = teacher._watch(held[0])
    found["layers"] = [teacher.layer_errors(held)]
    found["predictions"] = [teacher.prediction_error(held)]
    teacher.match_layers(samples, 60, rate=3e-2)
    found["layers"].append(teacher.layer_errors(held))
    found["predictions"].append(teacher.prediction_error(held))
    teacher.match_predictions(samples, 50, rate=3e-3)
    found["predictions"].append(teacher.prediction_error(held))
    found["file"] = tmp_path_factory.mktemp("distilled") / "linear.safetensors"
    teacher.save(found["file"])
    found["teacher"] = teacher
    return found


def test_attention_of_the_tiny_model_is_not_flat(taught: dict[str, Any]) -> None:
    for q, k, *_ in taught["watched"]:
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)
        entropy = -(weights * weights.clamp(min=1e-30).log()).sum(-1).mean()
        assert entropy < 0.75 * torch.tensor(q.shape[1]).log()


def test_untrained_features_alone_are_far_worse_than_virtual_tokens(taught: dict[str, Any]) -> None:
    def error(method: Linear) -> float:
        student = Distiller(taught["tiny"].pipe.transformer, method, taught["held"][0], rank=0)
        student.learned = {path: {} for path in student.learned}
        return sum(student.layer_errors(taught["held"]))

    pure = Linear(far="elu", near=0, allow_untrained=True)
    assert error(pure) > 1.3 * error(Linear(kept=0.125, pool=16))


def test_both_stages_pay_on_samples_never_seen(taught: dict[str, Any]) -> None:
    # The start is a good one (the far part by its moments, gates of one softmax), and keys that are
    # two fifths noise leave little to learn: other prompts and seeds gain an eighth, not a third.
    for before, after in zip(*taught["layers"], strict=True):
        assert after < 0.95 * before
    before, after = (sum(errors) for errors in taught["layers"])
    assert after < 0.9 * before
    untrained, middle, last = taught["predictions"]
    assert last < middle < 0.9 * untrained


def test_the_file_gives_what_was_learned_and_unpatching_leaves_nothing(
    taught: dict[str, Any],
) -> None:
    tiny, held = taught["tiny"], taught["held"]
    weights = str(taught["file"])
    diffpatch.patch(tiny.pipe, "linear", weights=weights, dense_steps=0)
    changed = tiny.run(**CALL)
    assert diffpatch.report(tiny.pipe).dense_calls == 0
    diffpatch.unpatch(tiny.pipe)
    assert torch.equal(tiny.run(**CALL), taught["plain"])
    assert not torch.equal(changed, taught["plain"])
    with torch.no_grad(), diffpatch.patched(tiny.pipe.transformer, "linear", weights=weights):
        out = tiny.pipe.transformer(*held[0].args, **held[0].kwargs)[0]
    with torch.no_grad(), taught["teacher"]._patched():
        expected = tiny.pipe.transformer(*held[0].args, **held[0].kwargs)[0]
    assert (out - expected).norm() < 1e-2 * expected.norm()  # the file is in bf16


def test_dense_steps_run_without_the_corrections(taught: dict[str, Any]) -> None:
    tiny = taught["tiny"]
    with diffpatch.patched(tiny.pipe, "linear", weights=str(taught["file"]), dense_steps=1.0):
        assert torch.equal(tiny.run(**CALL), taught["plain"])


def test_a_file_says_its_own_parameters(taught: dict[str, Any]) -> None:
    weights = str(taught["file"])
    assert diffpatch.make_method("linear", weights=weights) == Linear(
        far="hedgehog", near=32, weights=weights
    )
    assert diffpatch.make_method("linear", weights=weights, near=64) == Linear(
        far="hedgehog", near=64, weights=weights
    )
    with pytest.raises(BadParameter, match="made with far='hedgehog': leave it out"):
        diffpatch.make_method("linear", weights=weights, far="state")
    grid = GRIDS[0]
    q, k, v = random_qkv(1, grid.num_tokens, 2, 16)
    with pytest.raises(BadParameter, match="belong to the layers of a model"):
        diffpatch.attention(q, k, v, grid, "linear", weights=weights)


def broken(source: Path, target: Path, change: Any) -> str:
    """A copy of a file of weights with something changed in its tensors or its header."""
    tensors = load_file(source)
    header = {
        "format": adapter.FORMAT,
        "version": adapter.VERSION,
        "family": "WanTransformer3DModel",
        "method": json.dumps({"far": "hedgehog", "near": 32}),
    }
    change(tensors, header)
    save_file(tensors, target, metadata=header)
    return str(target)


def _other_heads(tensors: dict[str, torch.Tensor], _: Any) -> None:
    for name in list(tensors):
        if name.endswith(("gate", "phi_q", "phi_k")):
            tensors[name] = torch.cat([tensors[name], tensors[name]])


def _other_width(tensors: dict[str, torch.Tensor], _: Any) -> None:
    for name in list(tensors):
        if name.endswith("q_down"):
            tensors[name] = torch.cat([tensors[name], tensors[name]], 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, h: h.update(family="FluxTransformer2DModel"), "made for FluxTransformer2DModel"),
        (lambda t, h: h.update(version="9"), "has version '9'"),
        (lambda t, h: h.update(format="x"), "holds no learned attention"),
        (lambda t, h: [t.pop(n) for n in list(t) if "blocks.1." in n], "1 missing"),
        (lambda t, h: t.update({"transformer.blocks.7.attn1.gate": torch.zeros(1)}), "1 extra"),
        (lambda t, h: t["transformer.blocks.0.attn1.gate"].fill_(float("nan")), "holds NaN"),
        (_other_heads, "is for 4 heads and the model has 2"),
        (_other_width, "is for 64 channels and the model has 32"),
    ],
)
def test_what_does_not_fit_is_refused(
    taught: dict[str, Any], tmp_path: Path, change: Any, message: str
) -> None:
    weights = broken(taught["file"], tmp_path / "x.safetensors", change)
    with pytest.raises(BadParameter, match=message):
        diffpatch.patch(taught["tiny"].pipe, "linear", weights=weights)
    assert torch.equal(taught["tiny"].run(**CALL), taught["plain"])


def test_what_is_no_file_is_refused(taught: dict[str, Any], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(taught["file"].read_bytes()[:-100])
    for path, message in ((damaged, "damaged one"), (tmp_path / "none", "is not a file")):
        with pytest.raises(BadParameter, match=message):
            diffpatch.patch(taught["tiny"].pipe, "linear", weights=str(path))


def test_a_folder_brings_what_was_learned_along(taught: dict[str, Any], tmp_path: Path) -> None:
    """As diffusers saves and loads one; the same folder as a model on the hub, from its cache."""
    tiny, folder = taught["tiny"], tmp_path / "models--somebody--wan-linear/snapshots" / ("0" * 40)
    with pytest.raises(BadParameter, match=r"holds no diffpatch_linear\.safetensors"):
        diffpatch.make_method("linear", weights=str(tmp_path))
    tiny.pipe.save_pretrained(folder)
    taught["teacher"].save(folder)
    (folder / "../../refs").mkdir()
    (folder / "../../refs/main").write_text("0" * 40)
    diffpatch.patch(tiny.pipe, "linear", weights=str(taught["file"]), dense_steps=0)
    expected = tiny.run(**CALL)
    diffpatch.unpatch(tiny.pipe)
    pipe = diffusers.WanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    again = Tiny(pipe, tiny.call)
    # Not to the bit: weights from a file lie otherwise in memory, and a CPU then sums otherwise.
    assert torch.allclose(again.run(**CALL), taught["plain"], atol=1e-5)
    assert not torch.allclose(taught["plain"], expected, atol=1e-3)
    with pytest.MonkeyPatch.context() as offline:
        offline.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        offline.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        for given in ({}, {"weights": str(folder)}, {"weights": "somebody/wan-linear"}):
            with diffpatch.patched(pipe, "linear", dense_steps=0, **given):
                assert torch.allclose(again.run(**CALL), expected, atol=1e-5)
                assert vars(pipe.transformer._diffpatch.patch.method)["far"] == "hedgehog"
        with pytest.raises(BadParameter, match="cannot be fetched from the hub"):
            diffpatch.patch(pipe, "linear", weights="somebody/else")


def test_a_sample_too_small_to_learn_from_is_refused(taught: dict[str, Any]) -> None:
    whole = Linear(far="hedgehog", near=100_000, allow_untrained=True)
    with pytest.raises(BadParameter, match="2 of 2 layers of the sample see everything"):
        Distiller(taught["tiny"].pipe.transformer, whole, taught["held"][0])


def test_the_example_makes_a_file_that_renders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    weights = tmp_path / "linear.safetensors"
    importlib.import_module("distill_linear").main(
        ["--smoke", "--out", str(weights), "--folder", str(tmp_path / "whole")]
    )
    assert (tmp_path / "whole" / adapter.FILE).is_file()
    printed = capsys.readouterr().out
    before, after = (float(x) for x in re.findall(r"attention +([\d.]+) +([\d.]+)", printed)[0])
    assert after < before
    assert re.search(r"distilled +0\.\d+ +\d+\.\d+ dB", printed)
    size = ["--height", "64", "--width", "64", "--num-frames", "5", "--steps", "2"]
    options = ["--method", "linear", "--set", f"weights={weights}", "--quiet"]
    made = tmp_path / "made"
    assert main(["render", "--model", "demo", *options, *size, "-p", "x", "-o", str(made)]) == 0
    assert list(made.rglob("*.mp4"))
