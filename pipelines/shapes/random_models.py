"""Transformers of published sizes with random weights, and inputs for one step of them.

Speed does not depend on what the weights say, so a 14-billion-parameter model can be timed without
its checkpoint: it is created on the device, in the dtype, and never exists anywhere else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from diffpatch.errors import BadParameter
from diffpatch.pipelines.shapes.table import ModelShape

Size = tuple[int, int, int]  # latent frames, rows and columns
Make = Callable[..., torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to build one family.

    Attributes:
        config: the keyword arguments of the transformer class.
        inputs: the arguments of its forward, given (make, batch, latent size).
    """

    config: dict[str, Any]
    inputs: Callable[[Make, int, Size], dict[str, Any]]


def build(
    shape: ModelShape, *, layers: int | None, dtype: torch.dtype, device: torch.device
) -> Any:
    """A random transformer in evaluation mode.

    Args:
        shape: a row of `diffpatch.pipelines.shapes.table.MODELS`.
        layers: fewer of them than the model has; None for all.
        dtype: of the weights.
        device: where they are created.

    Raises:
        BadParameter: more layers than there are, or a family without a recipe.
    """
    import diffusers

    count = shape.layers if layers is None else layers
    if not 1 <= count <= shape.layers:
        raise BadParameter(f"layers={count} must be from 1 to {shape.layers} for {shape.name}")
    config = _recipe(dataclasses.replace(shape, layers=count)).config
    with _creating(dtype, device):
        model = getattr(diffusers, shape.transformer)(**config)
    return model.eval().requires_grad_(False)


def inputs(
    shape: ModelShape,
    *,
    num_frames: int,
    height: int,
    width: int,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
) -> dict[str, Any]:
    """The arguments of one forward, normal noise where a pipeline has latents and text.

    Raises:
        BadParameter: the model has no clips or images of that size.
    """
    try:
        shape.grid(num_frames, height, width)
    except ValueError as error:
        raise BadParameter(str(error)) from None
    size = shape.latent_frames(num_frames), height // shape.space, width // shape.space
    generator = torch.Generator().manual_seed(seed)

    def make(*sizes: int) -> torch.Tensor:
        if device.type == "meta":
            return torch.empty(sizes, dtype=dtype, device=device)
        return torch.randn(sizes, generator=generator).to(device, dtype)

    return _recipe(shape).inputs(make, batch, size)


def _recipe(shape: ModelShape) -> Recipe:
    if shape.transformer not in _RECIPES:
        raise BadParameter(f"there is no recipe for a random {shape.transformer}")
    return _RECIPES[shape.transformer](shape)


@contextmanager
def _creating(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """New tensors are of this dtype and on this device for the length of a with block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def _steps(make: Make, batch: int, value: float) -> torch.Tensor:
    """A time step for every sample, on the device of the other inputs."""
    return torch.full((batch,), value, device=make(1).device)


def _ones(make: Make, *sizes: int) -> torch.Tensor:
    return torch.ones(sizes, dtype=torch.bool, device=make(1).device)


def _common(shape: ModelShape) -> dict[str, Any]:
    return {"num_attention_heads": shape.heads, "attention_head_dim": shape.head_dim}


def _wan(shape: ModelShape) -> Recipe:
    channels = 48 if shape.space == 16 else 16  # the autoencoder of Wan 2.2 5B packs more

    def inputs(make: Make, batch: int, size: Size) -> dict[str, Any]:
        return {
            "hidden_states": make(batch, channels, *size),
            "timestep": _steps(make, batch, 500.0),
            "encoder_hidden_states": make(batch, shape.cross_tokens, 4096),
        }

    config = {
        "num_layers": shape.layers,
        "ffn_dim": shape.ffn,
        "in_channels": channels,
        "out_channels": channels,
    }
    return Recipe(_common(shape) | config, inputs)


def _hunyuan(shape: ModelShape) -> Recipe:
    def inputs(make: Make, batch: int, size: Size) -> dict[str, Any]:
        return {
            "hidden_states": make(batch, 16, *size),
            "timestep": _steps(make, batch, 500.0),
            "encoder_hidden_states": make(batch, shape.text_tokens, 4096),
            "encoder_attention_mask": _ones(make, batch, shape.text_tokens),
            "pooled_projections": make(batch, 768),
            "guidance": _steps(make, batch, 6000.0),
        }

    return Recipe(_common(shape) | _two_kinds(shape.layers, 20), inputs)


def _two_kinds(layers: int, joint_of_60: int) -> dict[str, int]:
    """Joint and single blocks in the proportions of the whole model, of each at least one."""
    joint = max(1, round(layers * joint_of_60 / 60))
    return {"num_layers": joint, "num_single_layers": layers - joint}


def _cogvideox(shape: ModelShape) -> Recipe:
    rotary = shape.heads > 30  # the 5B model; the 2B one has sinusoidal positions

    def inputs(make: Make, batch: int, size: Size) -> dict[str, Any]:
        from diffusers.models.embeddings import get_3d_rotary_pos_embed

        frames, height, width = size
        found: dict[str, Any] = {
            "hidden_states": make(batch, frames, 16, height, width),
            "timestep": _steps(make, batch, 500.0),
            "encoder_hidden_states": make(batch, shape.text_tokens, 4096),
        }
        if rotary:
            rows, columns = height // 2, width // 2
            found["image_rotary_emb"] = get_3d_rotary_pos_embed(
                shape.head_dim, ((0, 0), (rows, columns)), (rows, columns), frames,
                device=make(1).device,
            )  # fmt: skip
        return found

    config = {"num_layers": shape.layers, "use_rotary_positional_embeddings": rotary}
    return Recipe(_common(shape) | config, inputs)


def _mochi(shape: ModelShape) -> Recipe:
    def inputs(make: Make, batch: int, size: Size) -> dict[str, Any]:
        return {
            "hidden_states": make(batch, 12, *size),
            "timestep": _steps(make, batch, 500.0),
            "encoder_hidden_states": make(batch, shape.text_tokens, 4096),
            "encoder_attention_mask": _ones(make, batch, shape.text_tokens),
        }

    return Recipe(_common(shape) | {"num_layers": shape.layers}, inputs)


def _ltx(shape: ModelShape) -> Recipe:
    def inputs(make: Make, batch: int, size: Size) -> dict[str, Any]:
        frames, height, width = size
        return {
            "hidden_states": make(batch, frames * height * width, 128),
            "timestep": _steps(make, batch, 500.0),
            "encoder_hidden_states": make(batch, shape.cross_tokens, 4096),
            "encoder_attention_mask": _ones(make, batch, shape.cross_tokens),
            "num_frames": frames,
            "height": height,
            "width": width,
        }

    return Recipe(_common(shape) | {"num_layers": shape.layers}, inputs)


def _flux(shape: ModelShape) -> Recipe:
    def inputs(make: Make, batch: int, size: Size) -> dict[str, Any]:
        rows, columns = size[1] // 2, size[2] // 2
        place = make(1).device
        ids = torch.zeros(rows, columns, 3, device=place)
        ids[..., 1] += torch.arange(rows, device=place)[:, None]
        ids[..., 2] += torch.arange(columns, device=place)
        return {
            "hidden_states": make(batch, rows * columns, 64),
            "timestep": _steps(make, batch, 0.5),
            "guidance": _steps(make, batch, 3.5),
            "encoder_hidden_states": make(batch, shape.text_tokens, 4096),
            "pooled_projections": make(batch, 768),
            "img_ids": ids.flatten(0, 1),
            "txt_ids": torch.zeros(shape.text_tokens, 3, device=place),
        }

    config = {"guidance_embeds": True, **_two_kinds(shape.layers, 20)}
    return Recipe(_common(shape) | config, inputs)


def _sd3(shape: ModelShape) -> Recipe:
    def inputs(make: Make, batch: int, size: Size) -> dict[str, Any]:
        return {
            "hidden_states": make(batch, 16, *size[1:]),
            "timestep": _steps(make, batch, 500.0),
            "encoder_hidden_states": make(batch, shape.text_tokens, 4096),
            "pooled_projections": make(batch, 2048),
        }

    config = {
        "num_layers": shape.layers,
        "caption_projection_dim": shape.heads * shape.head_dim,
        "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    }
    return Recipe(_common(shape) | config, inputs)


def _qwen(shape: ModelShape) -> Recipe:
    def inputs(make: Make, batch: int, size: Size) -> dict[str, Any]:
        rows, columns = size[1] // 2, size[2] // 2
        return {
            "hidden_states": make(batch, rows * columns, 64),
            "timestep": _steps(make, batch, 0.5),
            "encoder_hidden_states": make(batch, shape.text_tokens, 3584),
            "img_shapes": [[(1, rows, columns)]] * batch,
        }

    return Recipe(_common(shape) | {"num_layers": shape.layers}, inputs)


_RECIPES: dict[str, Callable[[ModelShape], Recipe]] = {
    "WanTransformer3DModel": _wan,
    "HunyuanVideoTransformer3DModel": _hunyuan,
    "CogVideoXTransformer3DModel": _cogvideox,
    "MochiTransformer3DModel": _mochi,
    "LTXVideoTransformer3DModel": _ltx,
    "FluxTransformer2DModel": _flux,
    "SD3Transformer2DModel": _sd3,
    "QwenImageTransformer2DModel": _qwen,
}
