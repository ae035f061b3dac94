"""What can be patched in a target, and what to say where nothing can."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Sequence
from typing import Any

import torch

from diffpatch.errors import BadParameter, DiffpatchError, UnknownFamily
from diffpatch.pipelines.families.table import (
    FamilyInfo,
    attention_modules,
    family_of,
    list_families,
)
from diffpatch.pipelines.families.unwrap import unwrap

# A self-attention module and the cross-attention beside it.
BESIDE = {"attn1": "attn2", "self_attention": "cross_attention"}
_CLOSEST = 3  # classes that an error names


def components(target: Any) -> dict[str, Any]:
    """The parts of a pipeline by name, or a model as its transformer.

    Raises:
        BadParameter: the target is a class.
    """
    if isinstance(target, type):
        name = target.__name__
        raise BadParameter(
            f"{name} is a class: load an object, such as pipe = {name}.from_pretrained(…), and"
            " give that"
        )
    if isinstance(target, torch.nn.Module):
        return {"transformer": target}
    return dict(getattr(target, "components", {}))


def models(target: Any) -> dict[str, Any]:
    """The models among them, out of what is wrapped around them."""
    parts = {name: unwrap(part) for name, part in components(target).items()}
    return {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}


def transformers(target: Any, custom: FamilyInfo | None) -> list[tuple[str, Any, FamilyInfo]]:
    """(component name, model, family) of everything in the target that can be patched.

    Raises:
        UnknownFamily: nothing can, or a family is known not to be.
    """
    found, present, seen = [], models(target), set()
    for name, model in present.items():
        if id(model) in seen:  # one model under two names is patched once
            continue
        seen.add(id(model))
        family = custom if custom and name.startswith("transformer") else family_of(model)
        if family is None:
            continue
        if family.refused:
            raise UnknownFamily(
                f"{type(model).__name__} ({family.name}) cannot be patched: {family.refused}"
            )
        found.append((name, model, family))
    if not found:
        raise UnknownFamily(_nothing(target, [type(model).__name__ for model in present.values()]))
    return found


def _nothing(target: Any, present: list[str]) -> str:
    """Why there is nothing to patch, and what to do."""
    name = type(target).__name__
    if not present:
        return (
            f"{name} {target!r:.60} holds no model: load a pipeline or a transformer, and give that"
        )
    nets = [one for one in present if "UNet" in one]
    if nets:
        return (
            f"{nets[0]} is a U-Net, whose layers have token grids of many sizes: diffpatch patches"
            " diffusion transformers (diffpatch.list_families())"
        )
    known = [f.transformer for f in list_families() if not f.refused]
    score = {
        one: max(difflib.SequenceMatcher(None, one, part).ratio() for part in present)
        for one in known
    }
    closest = sorted(known, key=lambda one: -score[one])[:_CLOSEST]
    return (
        f"{name} holds no transformer of a known family; the closest to {', '.join(present)} are"
        f" {', '.join(closest)} (all: diffpatch.list_families()); for your own model pass grid= and"
        " modules=, or call diffpatch.attention in it"
    )


def layers(model: Any, family: FamilyInfo) -> list[tuple[str, Any]]:
    """(path, module) of what is patched in a model.

    Raises:
        UnknownFamily: nothing is there under the family's names, or nothing that can be patched.
    """
    found, name = attention_modules(model, family), type(model).__name__
    if found:
        return found
    named = [path for path, _ in model.named_modules() if re.fullmatch(family.modules, path)]
    if named:
        kind = type(model.get_submodule(named[0])).__name__
        raise UnknownFamily(
            f"{len(named)} modules of {name} match {family.modules!r}, but {named[0]} ({kind}) has"
            " no processor as attention in diffusers has: call diffpatch.attention(q, k, v, grid)"
            " in its forward"
        )
    said = "" if family.name == "custom" else (
        ": this is not the model diffpatch knows under that name"
    )  # fmt: skip
    raise UnknownFamily(f"no attention module of {name} matches {family.modules!r}{said}")


def cross_attention(model: Any, modules: Sequence[tuple[str, Any]]) -> list[Any]:
    """The cross-attention modules that stand beside self-attention modules, (path, module)."""
    own, found = {path for path, _ in modules}, []
    for path, _ in modules:
        parent, _, last = path.rpartition(".")
        beside = BESIDE.get(last, "")
        module = getattr(model.get_submodule(parent), beside, None) if beside else None
        if module is not None and f"{parent}.{beside}" not in own:
            found.append(module)
    return found


def argument_names(model: Any) -> list[str]:
    """The arguments of a model's forward, in order.

    A subclass whose forward takes *args passes them on, so that the class above has the names.
    """
    for cls in type(model).__mro__:
        forward = vars(cls).get("forward")
        if forward is None:
            continue
        parameters = list(inspect.signature(forward).parameters.values())[1:]
        if not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            return [p.name for p in parameters]
    return []


def unreadable(model: Any, missing: Exception) -> DiffpatchError:
    """The error for a forward whose arguments do not tell the grid."""
    from diffpatch import internals  # imports diffusers, which takes seconds

    if type(model).forward.__module__.partition(".")[0] == "diffusers":
        return internals.changed(f"{type(model).__name__} was called without {missing}")
    return UnknownFamily(
        f"{type(model).__name__} has a forward of its own and was called without {missing}, which"
        " tells the token grid: pass the arguments that the diffusers class has, by their names"
    )
