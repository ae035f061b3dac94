"""Transformers inside what trainers put around them, subclasses, and targets that cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import distributed, nn

import diffpatch
from diffpatch import BadParameter, DiffpatchError, Radial, UnknownFamily
from tests.patching.test_custom_model import GRID, Model
from tests.tiny import Tiny, wan, wan_transformer
from tests.tiny.parts import noise

LOCAL: dict[str, Any] = {"window": 0.5, "shift": "layer", "dense_steps": 1}


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    store = f"file://{tmp_path}/store"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def with_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules=["to_q"])).eval()


def data_parallel(model: Any) -> Any:
    return nn.parallel.DistributedDataParallel(model)


def sharded(model: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def prepared(model: Any) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # One state serves a whole process: another test's mixed precision must not stay in it.
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True, mixed_precision="no").prepare(model)


def compiled(model: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="eager")


def lora_and_compiled(model: Any) -> Any:
    return compiled(with_lora(model))


WRAPPERS = [with_lora, data_parallel, sharded, prepared, compiled, lora_and_compiled]


def put(model: Tiny, wrapped: Any) -> None:
    # Pipelines ask a transformer for its config and dtype, which DDP does not pass on.
    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        for name in ("config", "dtype", "cache_context"):
            setattr(wrapped, name, getattr(wrapped.module, name))
    model.pipe.transformer = wrapped


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda f: f.__name__)
def test_a_wrapped_transformer_is_patched_inside(wrap: Callable[[Any], Any]) -> None:
    model = wan()
    original = model.pipe.transformer
    plain = model.run()
    diffpatch.patch(model.pipe, "window", **LOCAL)
    expected, counts = model.run(), diffpatch.report(model.pipe)
    diffpatch.unpatch(model.pipe)

    put(model, wrap(original))
    diffpatch.patch(model.pipe, "window", **LOCAL)
    assert torch.allclose(model.run(), expected, atol=1e-6)
    found = diffpatch.report(model.pipe)
    assert found.kept_per_step == counts.kept_per_step
    assert (found.calls, found.dense_calls) == (counts.calls, counts.dense_calls)
    diffpatch.unpatch(model.pipe)
    assert torch.allclose(model.run(), plain, atol=1e-6)
    assert not hasattr(original, "_diffpatch")


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("wrap", [with_lora, data_parallel, sharded], ids=lambda f: f.__name__)
def test_a_wrapped_transformer_is_trained_through_a_patch(wrap: Callable[[Any], Any]) -> None:
    wrapped = wrap(wan_transformer().requires_grad_(True))
    diffpatch.patch(wrapped, "window", window=0.5)
    out = wrapped(noise(1, 16, 3, 8, 16), torch.tensor([5]), noise(1, 7, 32))[0]
    assert diffpatch.report(wrapped).kept < 1
    out.square().mean().backward()
    assert any(p.grad is not None for p in wrapped.parameters())


class Around(diffusers.WanTransformer3DModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class Renamed(diffusers.WanTransformer3DModel):
    def forward(self, latents: torch.Tensor, **kwargs: Any) -> Any:
        return super().forward(latents, **kwargs)  # type: ignore[misc]


def subclass(cls: Any) -> Any:
    made = cls.from_config(wan_transformer().config).eval()
    made.load_state_dict(wan_transformer().state_dict())
    return made


def test_a_subclass_may_be_called_by_position() -> None:
    call = noise(1, 16, 3, 8, 16), torch.tensor([5]), noise(1, 7, 32)
    outputs = []
    for model in (wan_transformer(), subclass(Around)):
        diffpatch.patch(model, "window", window=0.5)
        with torch.no_grad():
            outputs.append(model(*call)[0])
        assert diffpatch.report(model).dense_calls == 0
    assert torch.equal(*outputs)


def test_a_forward_with_other_names_is_not_blamed_on_diffusers() -> None:
    model = subclass(Renamed)
    diffpatch.patch(model, "window", window=0.5)
    with pytest.raises(DiffpatchError, match=r"Renamed has a forward of its own .*by their names"):
        model(noise(1, 16, 3, 8, 16), timestep=torch.tensor([5]), encoder_hidden_states=None)


@pytest.mark.parametrize("target", [diffusers.WanPipeline, diffusers.WanTransformer3DModel])
@pytest.mark.parametrize(
    "verb", [diffpatch.patch, diffpatch.unpatch, diffpatch.report, diffpatch.reset]
)
def test_a_class_is_no_object(target: Any, verb: Callable[[Any], Any]) -> None:
    with pytest.raises(BadParameter, match=rf"{target.__name__} is a class: .*from_pretrained"):
        verb(target)


def test_a_class_of_a_method_is_no_object() -> None:
    with pytest.raises(BadParameter, match=r"Radial is a class: give Radial\(\)"):
        diffpatch.patch(wan().pipe, Radial)  # type: ignore[arg-type]


def small_unet() -> Any:
    sizes = {"block_out_channels": (4,), "layers_per_block": 1, "norm_num_groups": 2}
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return diffusers.UNet2DConditionModel(
        **sizes, **blocks, cross_attention_dim=8, attention_head_dim=2
    )


class WanTransformerOfMine(nn.Module):
    pass


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (small_unet, "UNet2DConditionModel is a U-Net.*diffusion transformers"),
        (WanTransformerOfMine, "closest to WanTransformerOfMine are WanTransformer3DModel, [^,]*,"),
        (lambda: "Wan-AI/Wan2.1-T2V-14B", "holds no model: load a pipeline"),
        (lambda: None, "holds no model: load a pipeline"),
    ],
)
def test_what_cannot_be_patched_is_said_in_a_line(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(UnknownFamily, match=words) as caught:
        diffpatch.patch(make(), "window")
    assert len(str(caught.value)) < 330 and "\n" not in str(caught.value)


def test_modules_without_a_processor_are_pointed_to_the_function() -> None:
    model = Model()
    for block in model.blocks:
        del block.processor
    with pytest.raises(UnknownFamily, match=r"no processor .*diffpatch.attention\(q, k, v, grid\)"):
        diffpatch.patch(model, "window", grid=GRID, modules=r"blocks\.\d+")
