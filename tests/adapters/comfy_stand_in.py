"""What ComfyUI promises a node, as far as ours leans on it, written after its contract.

`optimized_attention` asks `transformer_options` for an override; a forward of a diffusion model
runs through the wrappers in them; a sampling runs through those of its own, and hands every forward
a fresh copy of the options with the noise level, the schedule and the ids of its conditions.
"""

from __future__ import annotations

import copy
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Attention = Callable[..., torch.Tensor]


class WrappersMP:
    OUTER_SAMPLE = "outer_sample"
    DIFFUSION_MODEL = "diffusion_model"


class Executor:
    """Calls the wrappers in turn and then the original."""

    def __init__(self, original: Any, class_obj: Any, wrappers: list[Any]) -> None:
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.wrappers:
            return self.original(*args, **kwargs)
        rest = Executor(self.original, self.class_obj, self.wrappers[1:])
        return self.wrappers[0](rest, *args, **kwargs)


def all_wrappers(kind: str, options: dict[str, Any]) -> list[Any]:
    return [w for some in options.get("wrappers", {}).get(kind, {}).values() for w in some]


def wrap_attn(func: Attention) -> Attention:
    def attend(*args: Any, **kwargs: Any) -> torch.Tensor:
        override = (kwargs.get("transformer_options") or {}).get("optimized_attention_override")
        if "_inside_attn_wrapper" in kwargs or override is None:
            kwargs.pop("_inside_attn_wrapper", None)
            return func(*args, **kwargs)
        return override(func, *args, _inside_attn_wrapper=True, **kwargs)

    return attend


@wrap_attn
def optimized_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    attn_precision: Any = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    scale: float | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    if not skip_reshape:
        size = q.shape[-1] // heads
        q, k, v = (x.unflatten(-1, (-1, size)).transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=gqa)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


class Patcher:
    """A model and its options; nodes change clones of it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def clone(self) -> Patcher:
        other = Patcher(self.model)
        other.model_options = copy_dicts(self.model_options)
        return other

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        wrappers = self.model_options["transformer_options"].setdefault("wrappers", {})
        wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def get_model_object(self, name: str) -> Any:
        return types.SimpleNamespace(latent_dimensions=self.model.latent_dimensions)


def copy_dicts(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: copy_dicts(v) for k, v in value.items()}
    return list(value) if isinstance(value, list) else value


class Model(nn.Module):
    """What all diffusion models of ComfyUI have: a forward through wrappers."""

    latent_dimensions = 3

    def forward(self, x: Any, timestep: Any, context: Any, transformer_options: Any) -> Any:
        wrappers = all_wrappers(WrappersMP.DIFFUSION_MODEL, transformer_options)
        run = Executor(self._forward, self, wrappers)
        return run(x, timestep, context, transformer_options)

    def _forward(self, x: Any, timestep: Any, context: Any, transformer_options: Any) -> Any:
        raise TypeError("a model says how")


class WanModel(Model):
    """Self-attention over (T, H/2, W/2) tokens, then cross-attention to the text."""

    patch_size = (1, 2, 2)

    def __init__(self, layers: int = 2, heads: int = 2, size: int = 16, channels: int = 4) -> None:
        super().__init__()
        width, self.heads = heads * size, heads
        self.embed = nn.Conv3d(channels, width, self.patch_size, self.patch_size)
        self.blocks = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.cross = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, channels * 4)

    def _forward(self, x: Any, timestep: Any, context: Any, transformer_options: Any) -> Any:
        *_, height, width = x.shape
        x = F.pad(x, (0, width % 2, 0, height % 2, 0, 0), mode="replicate")
        y = self.embed(x)
        grid = y.shape[2:]
        y = y.flatten(2).transpose(1, 2) + timestep.view(-1, 1, 1)
        for i, (block, cross) in enumerate(zip(self.blocks, self.cross, strict=True)):
            transformer_options["block_index"] = i
            q, k, v = block(y).chunk(3, -1)
            options = {"heads": self.heads, "transformer_options": transformer_options}
            y = y + optimized_attention(4 * q, k, v, **options)
            y = y + optimized_attention(cross(y), context, context, **options)
        out = self.head(y).unflatten(1, grid).unflatten(-1, (2, 2, -1))  # B T H W 2 2 C
        out = out.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4)
        return out[..., :height, :width]


class Flux(Model):
    """Joint attention over [text, image, references], heads split by the model itself."""

    patch_size, latent_dimensions = 2, 2
    told = True  # whether single blocks say where the image begins

    def __init__(self, heads: int = 2, size: int = 16, channels: int = 4, refs: int = 0) -> None:
        super().__init__()
        width, self.heads, self.refs = heads * size, heads, refs
        self.embed = nn.Conv2d(channels, width, 2, 2)
        self.double_blocks = nn.ModuleList([nn.Linear(width, 3 * width)])
        self.single_blocks = nn.ModuleList([nn.Linear(width, 3 * width)])
        self.head = nn.ConvTranspose2d(width, channels, 2, 2)

    def _forward(self, x: Any, timestep: Any, context: Any, transformer_options: Any) -> Any:
        y = self.embed(x)
        grid, y = y.shape[2:], y.flatten(2).transpose(1, 2) + timestep.view(-1, 1, 1)
        tokens, text = y.shape[1], context.shape[1]
        y = torch.cat([context, y, y[:, : self.refs]], 1)
        for kind in ("double", "single"):
            transformer_options.update(block_type=kind, block_index=0)
            if kind == "single" and self.told:
                transformer_options["img_slice"] = [text, y.shape[1]]
            for block in getattr(self, f"{kind}_blocks"):
                q, k, v = block(y).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
                y = y + optimized_attention(
                    3 * q, k, v, self.heads, skip_reshape=True,
                    transformer_options=transformer_options,
                )  # fmt: skip
        return self.head(y[:, text : text + tokens].transpose(1, 2).unflatten(2, grid))


class Unknown(Flux):
    """The same under a name that nobody knows, and without saying where the image is."""

    told = False


def sample(
    patcher: Patcher,
    x: torch.Tensor,
    conditions: list[torch.Tensor],
    levels: list[float] | torch.Tensor,
    middle: bool = False,
    windows: list[list[int]] | None = None,
) -> torch.Tensor:
    """Euler steps (with a second evaluation between two levels if wanted), all conditions in turn.

    With windows, every step sees only those frames at a time.
    """
    levels = torch.as_tensor(levels)
    wrappers = all_wrappers("outer_sample", patcher.model_options["transformer_options"])

    def evaluate(x: torch.Tensor, level: torch.Tensor, window: list[int] | None) -> torch.Tensor:
        out = torch.zeros_like(x)
        for i, context in enumerate(conditions):
            options = copy_dicts(patcher.model_options["transformer_options"])
            options |= {"uuids": [f"id {i}"], "cond_or_uncond": [i], "sigmas": level[None]}
            options["sample_sigmas"] = levels
            if window is not None:
                options["context_window"] = types.SimpleNamespace(index_list=window)
            out = out + (-1) ** i * patcher.model(x, level[None], context, options)
        return out

    def loop(x: torch.Tensor) -> torch.Tensor:
        for now, then in itertools.pairwise(levels):
            step = torch.zeros_like(x)
            everything: list[Any] = [None]
            parts = windows or everything
            for frames in parts:
                part = x if frames is None else x[:, :, frames]
                moved = (now - then) * evaluate(part, now, frames)
                if middle and then > 0:
                    moved = (now - then) * evaluate(part - moved / 2, (now + then) / 2, frames)
                step[:, :, slice(None) if frames is None else frames] += moved
            x = x - step
        return x

    return Executor(loop, None, wrappers)(x)


@contextmanager
def installed(**missing: Any) -> Iterator[None]:
    """ComfyUI's modules, importable for a while; `missing` takes names of WrappersMP away."""
    kinds: Any = type("WrappersMP", (), {k: v for k, v in vars(WrappersMP).items()
                                         if k.isupper() and k not in missing})  # fmt: skip
    modules = {name: types.ModuleType(name) for name in (
        "comfy", "comfy.ldm", "comfy.ldm.modules", "comfy.ldm.modules.attention",
        "comfy.patcher_extension",
    )}  # fmt: skip
    modules["comfy.patcher_extension"].__dict__["WrappersMP"] = kinds
    modules["comfy.ldm.modules.attention"].__dict__["wrap_attn"] = wrap_attn
    kept = copy.copy(sys.modules)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            sys.modules.pop(name)
            if name in kept:
                sys.modules[name] = kept[name]
