"""Frequencies of a rotary embedding, slowed down for as long as a patch is on.

What changes is what the embedding's forward returns, or what the pipeline passes as
``image_rotary_emb``, call by call: nothing of the model is written to, so that runs of different
lengths may go on at once and `remove` leaves it bit for bit what it was.
"""

from __future__ import annotations

import inspect
from typing import Any

from diffpatch.errors import BadParameter
from diffpatch.methods.base import Method
from diffpatch.methods.slowing import Slowing
from diffpatch.pipelines.families import rope
from diffpatch.pipelines.families.rope import RotaryEmbedding, Tables

ARGUMENT = "image_rotary_emb"  # by which pipelines pass tables of their own


def install(model: Any, method: Method) -> list[Any]:
    """Slow frequencies of a model down, if the method asks for it.

    Returns:
        Handles, each with a ``remove``.

    Raises:
        BadParameter: it is not known how this model's rotary embedding is built.
    """
    slowing = method.slowing
    if slowing is None:
        return []
    found = rope.rotary_embedding(model)
    asked = {axis for axis, trained in enumerate(slowing.trained) if trained is not None}
    if found is None or not asked <= set(found.axes):
        raise BadParameter(
            f"{method.name}: how {type(model).__name__} builds its rotary embedding is not known:"
            f" {slowing.advice}"
        )
    if found.module:
        module = model.get_submodule(found.module)
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        after = _AfterTables(found, slowing, names)
        return [module.register_forward_hook(after, with_kwargs=True)]
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    before = _BeforeForward(found, slowing, names)
    return [model.register_forward_pre_hook(before, with_kwargs=True)]


class _Hook:
    """What both hooks know. Copies and pickles of a patched model have hooks that do nothing."""

    def __init__(self, found: RotaryEmbedding | None, slowing: Slowing, names: list[str]) -> None:
        self.rope = found
        self.slowing = slowing
        self.names = names

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return type(self)(None, self.slowing, self.names)

    def __reduce__(self) -> Any:
        return type(self), (None, self.slowing, self.names)

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a forward, by name."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    def changed(self, tables: Tables, arguments: dict[str, Any]) -> Tables:
        """The tables of what goes beyond the training; those given where nothing does."""
        assert self.rope is not None
        for number, axis in zip(self.rope.axes, self.rope.read(arguments), strict=True):
            trained, count = self.slowing.trained[number], self.slowing.count
            if trained is None or axis.length <= trained:
                continue
            frequencies = axis.frequencies
            chosen = (
                rope.first_to_repeat(frequencies, trained)
                if count is None
                else rope.dominant(frequencies, trained, count)
            )
            tables = rope.slowed(tables, axis, chosen)
        return tables


class _AfterTables(_Hook):
    """Behind the module that makes the tables."""

    def __call__(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        return output if self.rope is None else self.changed(output, self.named(args, kwargs))


class _BeforeForward(_Hook):
    """Before a transformer that is given the tables; some sizes of a model are given none."""

    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = self.named(args, kwargs)
        tables = named.get(ARGUMENT)
        if self.rope is None or tables is None:
            return None
        return (), {**named, ARGUMENT: self.changed(tables, named)}
