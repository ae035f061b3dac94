"""Hooks that tell when a model's forwards begin and end; copies and pickles of them do nothing."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from diffpatch import internals


class Contexts(Protocol):
    """What knows the name of the forward that a thread is in the middle of."""

    context: str | None


class Listener(Protocol):
    """What is told about forwards."""

    def before_forward(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward of the model begins."""
        ...

    def after_forward(self, failed: bool) -> None:
        """The forward has ended, or has failed."""
        ...


def listen(listener: Listener, contexts: Contexts, model: Any, wrappers: Iterable[Any]) -> Any:
    """Install hooks; each has a method `remove`.

    Args:
        listener: is told when forwards begin and end.
        contexts: is told what diffusers' `cache_context` calls them.
        model: whose forwards.
        wrappers: modules that call the forward of the model past its hooks.
    """
    hooks: list[Any] = [
        model.register_forward_pre_hook(_Before(listener), with_kwargs=True),
        model.register_forward_hook(_After(listener), always_call=True),
    ]
    for wrapper in wrappers:
        before = _Before(listener, model)
        hooks.append(wrapper.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(wrapper.register_forward_hook(_After(listener), always_call=True))
    if hasattr(type(model), internals.CACHE_CONTEXT):
        hooks.append(_NamedForward(contexts, model))
    return hooks


class _Before:
    """The hook before a forward.

    Args:
        listener: is told.
        inside: the model, where the hook is on a wrapper of it.
    """

    def __init__(self, listener: Listener | None, inside: Any = None) -> None:
        self.listener, self.inside = listener, inside

    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.listener is not None:
            model = model if self.inside is None else self.inside
            self.listener.before_forward(model, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Before:
        return _Before(None)

    def __reduce__(self) -> Any:
        return _Before, (None,)


class _After:
    """The hook after a forward."""

    def __init__(self, listener: Listener | None) -> None:
        self.listener = listener

    def __call__(self, model: Any, args: tuple[Any, ...], output: Any) -> None:
        if self.listener is not None:
            self.listener.after_forward(failed=output is None)

    def __deepcopy__(self, memo: dict[int, Any]) -> _After:
        return _After(None)

    def __reduce__(self) -> Any:
        return _After, (None,)


class _NamedForward:
    """A model's `cache_context`, which also tells the names of guidance branches.

    Copies and pickles of it are the `cache_context` of the copied model.
    """

    def __init__(self, contexts: Contexts, model: Any) -> None:
        self._contexts, self._model = contexts, weakref.ref(model)
        setattr(model, internals.CACHE_CONTEXT, self)

    @contextlib.contextmanager
    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        model, contexts = self._model(), self._contexts
        before, contexts.context = contexts.context, name
        try:
            with getattr(type(model), internals.CACHE_CONTEXT)(model, name, *args, **kwargs):
                yield
        finally:
            contexts.context = before

    def remove(self) -> None:
        """Give the model its own back, unless something else stands there now."""
        model = self._model()
        if model is not None and vars(model).get(internals.CACHE_CONTEXT) is self:
            delattr(model, internals.CACHE_CONTEXT)

    def __reduce__(self) -> Any:
        return getattr, (self._model(), internals.CACHE_CONTEXT)
