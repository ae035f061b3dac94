"""The methods by name, and objects from names and parameters."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from diffpatch import checking
from diffpatch.errors import BadParameter, UnknownMethod, choices
from diffpatch.methods.base import Method, parameter_names
from diffpatch.methods.wrapper import Wrapper

# A name, a combination of names such as "radial+temporal" or ["radial", "temporal"], or an object.
MethodLike = str | Method | Sequence[str]
# Arguments of `diffpatch.patch`, of which a misspelt one comes here as a parameter of the method.
ARGUMENTS = (
    "dense_steps", "dense_layers", "dense_last_steps", "quality", "backend", "grid", "modules",
    "cache", "hold", "settings", "target", "strict",
)  # fmt: skip


@dataclass(frozen=True)
class MethodInfo:
    """A registered method, as listed by `diffpatch.list_methods()`.

    Attributes:
        name: what patch() and the command line call it.
        summary: one line.
        source: the paper or code it follows.
        parameters: name -> (type as written, default, help).
        cls: the frozen dataclass.
    """

    name: str
    summary: str
    source: str
    parameters: dict[str, tuple[str, Any, str]]
    cls: type[Method]

    @property
    def wraps(self) -> bool:
        """Whether it is written after another method and a ``+``."""
        return issubclass(self.cls, Wrapper)


_REGISTRY: dict[str, type[Method]] = {}  # filled at import by register(), constant afterwards

M = TypeVar("M", bound=type[Method])


def register(cls: M) -> M:
    """Class decorator: make a method known by its `name`."""
    _REGISTRY[cls.name] = cls
    return cls


def list_methods() -> dict[str, MethodInfo]:
    """All methods by name, with their parameters and sources."""
    out = {}
    for name, cls in _REGISTRY.items():
        parameters = {
            f.name: (str(f.type), f.default, f.metadata.get("help", ""))
            for f in dataclasses.fields(cls)
        }
        out[name] = MethodInfo(name, cls.summary, cls.source, parameters, cls)
    return out


def one_method(method: MethodLike) -> str | Method:
    """A combination given as a list, by its name.

    >>> one_method(["radial", "temporal"])
    'radial+temporal'

    Raises:
        BadParameter: it is none of what `MethodLike` says.
    """
    if isinstance(method, str | Method):
        return method
    if isinstance(method, type) and issubclass(method, Method):
        raise BadParameter(f"{method.__name__} is a class: give {method.__name__}(), an object")
    if not isinstance(method, Sequence):
        raise BadParameter(
            f"{method!r} must be a method's name or object: {choices('', _REGISTRY)}"
        )
    names = [part for part in method if isinstance(part, str)]
    if len(names) != len(method) or not names:
        raise BadParameter(
            f"{method!r} must be a list of names, such as ['radial', 'temporal']; objects are"
            " combined as Temporal(over=Radial(decay=0.3))"
        )
    return "+".join(names)


def make_method(method: MethodLike, **params: Any) -> Method:
    """A method object from its name and parameters; an object passes through.

    ``"radial+temporal"`` or ``["radial", "temporal"]`` is the second method over the first. Each
    parameter goes to the one of the two that has it. One that both have goes to the wrapper where
    it means something there, else to the wrapped method: ``kept`` is the wrapper's in
    ``temporal``'s mode "mask" and the wrapped method's in the others.

    Raises:
        UnknownMethod: no method has that name.
        BadParameter: the method has no such parameter, its value cannot work, or parameters were
            given beside an object, which has its own.
    """
    method = one_method(method)
    if isinstance(method, Method):
        if params:
            raise BadParameter(
                f"{method} already has its parameters: give"
                f" {' and '.join(f'{k}={v!r}' for k, v in params.items())} inside it, or give the"
                f" name {method.name!r} instead of the object"
            )
        return method
    classes = classes_of(method)
    known = {name for cls in classes for name in parameter_names(cls)}
    known -= {"over"} if len(classes) == 2 else set()  # the name says what it is over
    for name in params.keys() - known:
        if close := difflib.get_close_matches(name, ARGUMENTS, n=1, cutoff=0.8):
            raise BadParameter(
                f"{method} has no parameter {name!r}: did you mean {close[0]!r}, an argument of"
                " diffpatch.patch?"
            )
    checking.check_names(method, params, known)
    if len(classes) == 1:
        return classes[0](**classes[0].complete(params))
    inner, wrapper = classes
    assert issubclass(wrapper, Wrapper)
    own, others = parameter_names(wrapper), parameter_names(inner)
    claimed = {k for k in params if k in own and (k not in others or wrapper.claims(k, params))}
    over = inner(**inner.complete({k: v for k, v in params.items() if k not in claimed}))
    return wrapper(over=over, **{k: v for k, v in params.items() if k in claimed})


def classes_of(name: str) -> list[type[Method]]:
    """The method of a name; of a combination, the wrapped one and the wrapper.

    Raises:
        UnknownMethod: there is no such method, or the two do not combine.
    """
    parts = name.split("+")
    wrappers = [n for n, cls in _REGISTRY.items() if issubclass(cls, Wrapper)]
    for part in parts:
        if part not in _REGISTRY:
            raise UnknownMethod(f"unknown method {part!r}: {choices(part, _REGISTRY)}")
    if len(parts) > 2 or (len(parts) == 2 and parts[1] not in wrappers):
        raise UnknownMethod(
            f"{name!r} does not combine: write a method, '+' and one of {', '.join(wrappers)}"
        )
    return [_REGISTRY[part] for part in parts]


def parameter_types(name: str) -> Mapping[str, Any]:
    """The type of every parameter of a method or a combination; of one that both have, either."""
    types: dict[str, Any] = {}
    for cls in classes_of(name):
        for parameter, hint in checking.field_types(cls).items():
            types[parameter] = types[parameter] | hint if parameter in types else hint
    return types
