"""One temporal frequency of a rotary embedding, slowed down for as long as a patch is on.

What changes is what the embedding's forward returns, or what the pipeline passes as
``image_rotary_emb``, call by call: nothing of the model is written to, so that runs of different
lengths may go on at once and `remove` leaves it bit for bit what it was.
"""

from __future__ import annotations

import inspect
from typing import Any

from diffpatch.errors import BadParameter
from diffpatch.methods.base import Method
from diffpatch.pipelines.families.rope import RotaryEmbedding, Tables, rotary_embedding, slowed

ARGUMENT = "image_rotary_emb"  # by which pipelines pass tables of their own


def install(model: Any, method: Method) -> list[Any]:
    """Slow a frequency of a model down, if the method asks for it.

    Returns:
        Handles, each with a ``remove``.

    Raises:
        BadParameter: it is not known how this model's rotary embedding is built.
    """
    trained = method.slowed_from
    if trained is None:
        return []
    found = rotary_embedding(model)
    if found is None:
        raise BadParameter(
            f"{method.name}: how {type(model).__name__} builds its rotary embedding is not known:"
            " pass riflex=False"
        )
    if found.module:
        module = model.get_submodule(found.module)
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        after = _AfterTables(found, trained, names)
        return [module.register_forward_hook(after, with_kwargs=True)]
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    before = _BeforeForward(found, trained, names)
    return [model.register_forward_pre_hook(before, with_kwargs=True)]


class _Hook:
    """What both hooks know. Copies and pickles of a patched model have hooks that do nothing."""

    def __init__(self, rope: RotaryEmbedding | None, trained: int, names: list[str]) -> None:
        self.rope = rope
        self.trained = trained
        self.names = names

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return type(self)(None, self.trained, self.names)

    def __reduce__(self) -> Any:
        return type(self), (None, self.trained, self.names)

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a forward, by name."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    def changed(self, tables: Tables, arguments: dict[str, Any]) -> Tables:
        """The tables for a clip longer than the training; those given for any other."""
        assert self.rope is not None
        where = self.rope.read(arguments)
        longer = where.num_frames > self.trained
        return slowed(tables, where, self.trained) if longer else tables


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
