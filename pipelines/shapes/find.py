"""From whatever names or holds a model to its shape."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffpatch.errors import UnknownFamily
from diffpatch.pipelines.families.presets import two_experts
from diffpatch.pipelines.families.table import attention_modules, family_of
from diffpatch.pipelines.families.unwrap import unwrap
from diffpatch.pipelines.running import loading
from diffpatch.pipelines.shapes.skeleton import skeleton, transformer_of
from diffpatch.pipelines.shapes.table import ModelShape, shape_of, shape_of_pipeline


def find_shape(target: Any) -> ModelShape:
    """The shape of a model, without loading any weights.

    Args:
        target: a `ModelShape`; a pipeline or a transformer; the name of a built-in shape or the hub
            id of such a model; a demo; a folder that save_pretrained wrote; the config.json of a
            transformer; or any other hub id, whose configs are fetched.

    Raises:
        UnknownFamily: it is, or holds, no transformer of a known family.
        ModelError: there is no such model, or its configs do not say enough.
    """
    if isinstance(target, ModelShape):
        return target
    if isinstance(target, str | Path):
        return _named(str(target))
    if isinstance(target, torch.nn.Module):
        return _read(target, [target], type(target).__name__)
    parts = getattr(target, "components", {}).values()
    return _read(target, list(parts), type(target).__name__)


def _named(name: str) -> ModelShape:
    try:
        return shape_of(name)
    except KeyError as error:
        path, unknown = Path(name).expanduser(), UnknownFamily(str(error.args[0]))
    if name in loading.DEMOS:
        return replace(find_shape(loading.load_pipeline(name, device="cpu")), name=name)
    if path.is_file():
        beside = path.absolute().parent.parent
        if (beside / "model_index.json").is_file():
            return _named(str(beside))
        model = transformer_of(path)
        return _read(model, [model], type(model).__name__)
    if path.is_dir() or "/" in name:
        made = skeleton(name)
        return _read(made, list(made.components.values()), name.rstrip("/").rpartition("/")[2])
    raise unknown from None


def _read(pipe: Any, parts: list[Any], name: str) -> ModelShape:
    for component in parts:
        model = unwrap(component)
        family = family_of(model) if isinstance(model, torch.nn.Module) else None
        if family is None:
            continue
        if family.refused:
            raise UnknownFamily(f"{type(model).__name__} cannot be planned for: {family.refused}")
        paths = [path for path, _ in attention_modules(model, family)]
        shape = shape_of_pipeline(pipe, model, paths, family)
        return replace(shape, name=name, experts=two_experts(pipe))
    raise UnknownFamily(
        f"{name} holds no transformer that diffpatch can plan for;"
        " name a built-in model shape such as 'wan-14b'"
    )
