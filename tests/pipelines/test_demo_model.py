"""The demo model: frame subsets, checkpoints, export, and the weights that are shipped."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from diffpatch.pipelines.demo import PRESETS, clips, load_demo, model, pipeline_num_frames, subset

MEGABYTE = 1_000_000


def load_example(name: str) -> ModuleType:
    """Import a script from the folder of examples."""
    path = Path(__file__).parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Keeps the many small operations off a machine's busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def training() -> ModuleType:
    """The training script."""
    return load_example("train_demo_model")


def options(**changes: Any) -> argparse.Namespace:
    """Options of a short training run."""
    values = {
        "seed": 0,
        "rate": 3e-3,
        "average": 0.9,
        "hint_weight": 0.2,
        "device": "cpu",
        "compile": False,
    }
    return argparse.Namespace(**{**values, **changes})


def small_transformer() -> Any:
    """An untrained transformer of the demo's architecture, much smaller."""
    return model.build_transformer(heads=1, layers=4, ffn_dim=64)


def awake_transformer() -> Any:
    """An untrained transformer whose output is not zero."""
    torch.manual_seed(0)
    transformer = small_transformer()
    with torch.no_grad():
        for weight in transformer.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return transformer


def random_inputs(num_frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, time steps and text of two clips."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 16, num_frames, 16, 16, generator=generator)
    return latents, torch.tensor([100.0, 700.0]), torch.randn(2, 16, 96, generator=generator)


def test_all_frames_give_exactly_the_stock_model() -> None:
    transformer = awake_transformer()
    latents, timestep, text = random_inputs(5)
    frames = torch.arange(5).expand(2, -1)
    with torch.no_grad():
        stock = transformer(latents, timestep, text, return_dict=False)[0]
        ours, _ = subset.subset_forward(transformer, latents, timestep, text, frames)
    assert stock.abs().max() > 0.1
    torch.testing.assert_close(ours, stock)


def test_kept_frames_know_their_true_places() -> None:
    transformer = awake_transformer()
    latents, timestep, text = random_inputs(2)
    with torch.no_grad():
        near, far, far_shifted = (
            subset.subset_forward(
                transformer, latents, timestep, text, torch.tensor(frames).expand(2, -1)
            )[0]
            for frames in ([0, 1], [0, 9], [3, 12])
        )
    assert (near - far).abs().max() > 1e-3
    # Rotary positions are relative: only the distance between the frames counts.
    torch.testing.assert_close(far, far_shifted, atol=1e-4, rtol=1e-3)


def test_a_coarse_grid_lies_on_the_same_canvas() -> None:
    transformer = awake_transformer()
    frames = torch.tensor([[0, 4]])
    fine = subset.rotary_embedding(transformer, frames, 16)[0].view(2, 16, 16, -1)
    coarse = subset.rotary_embedding(transformer, frames, 8)[0].view(2, 8, 8, -1)
    stock = transformer.rope(torch.zeros(1, 16, 2, 16, 16))[0].view(2, 16, 16, -1)
    torch.testing.assert_close(fine[0], stock[0].float())
    slow = transformer.rope.t_dim + transformer.rope.h_dim - 1  # the slowest rotation along y
    between = (fine[:, 0::2, 0, slow] + fine[:, 1::2, 0, slow]) / 2
    torch.testing.assert_close(coarse[:, :, 0, slow], between, atol=1e-4, rtol=0)


def test_chosen_frames_are_ordered_spread_and_cover_the_clip() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([13, 33] * 500)
    frames = subset.choose_frames(1000, 4, lengths, generator)
    assert (frames.diff(dim=1) > 0).all()
    for length in (13, 33):
        assert set(frames[lengths == length].flatten().tolist()) == set(range(length))
    whole = subset.choose_frames(2, 13, torch.tensor([13, 13]), generator)
    assert torch.equal(whole, torch.arange(13).expand(2, -1))


def test_hints_tell_where_the_shape_is_and_goes() -> None:
    spec = clips.ClipSpec("large", "red", "circle", "moves left", "plain", "black")
    scenes = clips.draw_scenes([spec], torch.Generator().manual_seed(0))
    told = subset.hints(scenes, torch.tensor([[0.0, 1.0]]), 16).view(2, 16, 16, -1)
    columns = (told[..., 0] * torch.arange(16)).sum((1, 2)) / told[..., 0].sum((1, 2))
    assert columns[1] < columns[0]
    assert (told[..., 4] < 0).all() and (told[..., 5:] == 0).all()


def test_padding_weighs_as_much_as_the_pipeline_pads() -> None:
    mask = torch.tensor([[1] * 12 + [0] * 4] * 200)
    bias = subset.padding_bias(mask, torch.Generator().manual_seed(0))[:, 0, 0]
    assert (bias[:, :12] == 0).all()
    slots = bias[:, 12:].exp().sum(1) + 12
    assert slots.min() > 15.9 and slots.max() < 512.1 and slots.max() > 300


def test_a_resumed_run_continues_exactly(training: ModuleType, tmp_path: Path) -> None:
    stages = [training.Stage.parse("2,2,1,64"), training.Stage.parse("4,2,2,64,0.5,1,0.1")]
    first = training.Trainer(stages, options(), small_transformer)
    for _ in range(3):
        first.update()
    first.save(tmp_path)
    expected = [first.update() for _ in range(2)]
    second = training.Trainer(stages, options(seed=7), small_transformer)
    second.restore(tmp_path)
    assert second.step == 3
    assert [second.update() for _ in range(2)] == expected


def test_training_lowers_the_loss(training: ModuleType) -> None:
    trainer = training.Trainer([training.Stage(40, 8, 1, 64)], options(), small_transformer)
    losses = [trainer.update()[0] for _ in range(40)]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


def test_a_checkpoint_exports_to_a_stock_pipeline(training: ModuleType, tmp_path: Path) -> None:
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline

    trainer = training.Trainer([training.Stage(1, 2, 1, 64)], options())
    trainer.save(tmp_path / "run")
    for _ in range(2):  # the second time replaces the folder
        training.export(tmp_path / "run", tmp_path / "pipeline")
    pipe = WanPipeline.from_pretrained(tmp_path / "pipeline", torch_dtype=torch.bfloat16)
    name = "blocks.0.ffn.net.2.weight"
    saved = pipe.transformer.state_dict()[name]
    assert torch.equal(saved, trainer.average[f"transformer.{name}"].bfloat16())
    assert {path.name for path in tmp_path.iterdir()} == {"run", "pipeline"}


def test_a_wrong_preset_is_named() -> None:
    with pytest.raises(ValueError, match="unknown demo preset 'large'"):
        load_demo("large")


def test_the_shipped_folder_is_small_and_holds_no_pickle() -> None:
    files = [path for path in model.WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12 * MEGABYTE
    assert {path.suffix for path in files} <= {".json", ".safetensors"}


def test_the_shipped_pipeline_listens_to_the_prompt() -> None:
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline

    pipe = load_demo(dtype=torch.float32)
    assert type(pipe) is WanPipeline
    pipe.set_progress_bar_config(disable=True)
    preset = PRESETS["demo"]
    red, blue = (
        pipe(
            prompt=f"a large {color} circle moves left over a black background",
            height=preset.height,
            width=preset.width,
            num_frames=pipeline_num_frames(pipe, 3),
            num_inference_steps=5,
            guidance_scale=preset.guidance_scale,
            max_sequence_length=preset.max_sequence_length,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).frames[0]
        for color in ("red", "blue")
    )
    assert red.shape == (3, 3, preset.height, preset.width)
    shown = (red - blue).mean((0, 2, 3))  # red minus blue, per colour channel
    assert shown[0] > 0.05 and shown[2] < -0.05
