"""Loading: what a model name means, and a helpful line for everything that is no model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from diffpatch.errors import DiffpatchError
from diffpatch.pipelines.running import loading
from diffpatch.pipelines.running.loading import ModelError, find, load_pipeline
from diffpatch.pipelines.running.sampling import NonFiniteOutput, as_frames, sample, warm_up
from tests import tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan pipeline on disk."""
    folder = tmp_path_factory.mktemp("models") / "wan"
    tiny.wan().pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(saved, tmp_path / "wan"))


def test_a_saved_pipeline_loads_and_gives_the_same_frames(saved: Path) -> None:
    source = find(str(saved))
    assert source.kind == "folder" and source.is_video
    assert source.pipeline.__name__ == "WanPipeline"
    pipe = load_pipeline(source, device="cpu")
    assert pipe.dtype == torch.float32
    model = tiny.wan()
    # Weights in a file's memory are aligned differently, which may change the last bit of a sum.
    assert torch.allclose(tiny.Tiny(pipe, model.call).run(), model.run(), atol=1e-5)


def test_image_pipelines_are_told_from_video_pipelines(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    assert not find(str(tmp_path)).is_video


def test_demo_names_are_known() -> None:
    for name in loading.DEMOS:
        assert find(name).kind == "demo"
    assert find("demo").arguments["num_frames"] == 81


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("dmeo", "did you mean 'demo'"),
        ("./no/such/folder", "a folder, or a hub id"),
        (__file__, "is a file"),
    ],
)
def test_names_that_mean_nothing(model: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        find(model)


def test_a_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model_index\.json; give the folder"):
        find(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ModelError, match=r"names no _class_name"):
        find(str(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "NoSuchPipeline"}))
    with pytest.raises(ModelError, match=r"NoSuchPipeline.*upgrade diffusers"):
        find(str(tmp_path))


def test_pickles_are_refused(copy: Path) -> None:
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelError, match=r"\.bin is a pickle.*safe_serialization"):
        find(str(copy))


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_broken_weights_are_one_line(copy: Path, damage: str) -> None:
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    if damage == "truncated":
        weights.write_bytes(content[:1000])
    with pytest.raises(ModelError, match=r"cannot be loaded|damaged") as caught:
        load_pipeline(str(copy), device="cpu")
    assert "\n" not in str(caught.value)


def test_hub_failures_name_the_id_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    def offline(*args: object, **options: object) -> None:
        raise OSError("no network\nin tests")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", offline)
    monkeypatch.setattr(loading, "out_of_reach", lambda: None)
    with pytest.raises(ModelError, match=r"owner/name.*check the id and the network"):
        find("owner/name")


def test_a_hub_that_is_out_of_reach_is_not_asked_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def unknown(host: str, port: int) -> None:
        asked.append((host, port))
        raise OSError("name or service not known")

    def cached(model: str, *, local_files_only: bool) -> dict[str, str]:
        asked.append(local_files_only)
        return {"_class_name": "FluxPipeline"}

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("socket.getaddrinfo", unknown)
    with pytest.raises(ModelError, match="not found: check the network, or give a folder"):
        find("no/such-model")
    assert asked == [("huggingface.co", 443)]
    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", cached)
    assert find("in/cache").pipeline.__name__ == "FluxPipeline" and asked[-1] is True
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "proxy"})
    assert find("in/cache").pipeline.__name__ == "FluxPipeline" and asked[-1] is False


def test_settings_that_cannot_work(saved: Path) -> None:
    source = find(str(saved))
    with pytest.raises(ModelError, match="needs an accelerator"):
        load_pipeline(source, device="cpu", offload="model")
    with pytest.raises(ModelError, match="did you mean 'sequential'"):
        load_pipeline(source, device="cpu", offload="sequental")
    with pytest.raises(ModelError, match="unknown device"):
        load_pipeline(source, device="gpu9")
    assert issubclass(ModelError, DiffpatchError)


def test_vae_tiling_is_switched_on(saved: Path) -> None:
    assert load_pipeline(str(saved), device="cpu", vae_tiling=True).vae.use_tiling


def test_pipelines_without_image_input() -> None:
    image = loading.with_image_input(tiny.flux().pipe)
    assert type(image).__name__ == "FluxImg2ImgPipeline"
    with pytest.raises(ModelError, match="takes no image"):
        loading.with_image_input(tiny.wan().pipe)
    pipe = tiny.wan_i2v().pipe
    assert loading.with_image_input(pipe) is pipe


def test_sampling_times_every_step_and_repeats_itself() -> None:
    model, seen = tiny.wan(), []
    runs = [sample(model.pipe, model.call, 0, lambda step, _: seen.append(step)) for _ in range(2)]
    assert seen == [0, 1, 0, 1]
    assert torch.equal(runs[0].frames, runs[1].frames)
    assert runs[0].frames.shape == (9, 3, 32, 64)
    assert len(runs[0].step_seconds) == 2
    assert runs[0].clocks["denoising"] == sum(runs[0].step_seconds)
    assert 0 < sum(runs[0].step_seconds) < runs[0].total_seconds
    assert not model.pipe.transformer._forward_pre_hooks


def test_sampling_stops_at_the_first_broken_step() -> None:
    model = tiny.wan()
    model.pipe.transformer.proj_out.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteOutput, match="step 1"):
        sample(model.pipe, model.call, 0)
    assert not model.pipe.transformer._forward_pre_hooks
    model = tiny.wan()
    next(model.pipe.vae.decoder.parameters()).data.fill_(float("nan"))
    with pytest.raises(NonFiniteOutput, match="decoded frames"):
        sample(model.pipe, model.call, 0)


def test_the_hub_is_not_named_where_it_was_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set: unset it, or give a folder"):
        find("no/such-model")


def test_warming_up_is_short() -> None:
    model, calls = tiny.wan(), []
    model.pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    warm_up(model.pipe, model.call | {"num_inference_steps": 30}, seed=0)
    assert len(calls) == 4  # two steps, with and without the prompt


def test_frames_from_every_kind_of_output() -> None:
    video = torch.rand(1, 5, 3, 4, 6)
    assert torch.equal(as_frames(video), video[0])
    assert torch.equal(as_frames(video.permute(0, 1, 3, 4, 2).numpy()), video[0])
    assert torch.equal(as_frames([list(video[0])]), video[0])
    assert torch.equal(as_frames(video[:, 0]), video[0, :1])
    assert torch.equal(as_frames(video[:, 0].permute(0, 2, 3, 1).numpy()), video[0, :1])


def test_accelerators_compute_in_bf16() -> None:
    assert loading.default_dtype(torch.device("cuda")) is torch.bfloat16
    assert loading.default_dtype(torch.device("cpu")) is torch.float32


def test_both_experts_are_denoisers_and_timed() -> None:
    model = tiny.wan22()
    found = loading.denoisers(model.pipe)
    assert found == [model.pipe.transformer, model.pipe.transformer_2]
    made = sample(model.pipe, model.call, 0)
    assert len(made.step_seconds) == 4 and min(made.step_seconds) > 0
    assert 0 < made.cpu_share <= 1
    for expert in found:
        assert not expert._forward_pre_hooks
