"""What stands in the place of a model's forward, and gives it back."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

FORWARD = "forward"


class InPlaceOfForward:
    """Is called where the forward of a model would be. Copies and pickles have that forward.

    Args:
        model: whose forward it takes the place of, also of one that somebody put there before.
    """

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)
        self._before = vars(model).get(FORWARD)  # such as accelerate's, that moves weights first
        setattr(model, FORWARD, self)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        # For those who look at a forward's arguments.
        if self._before is not None:
            return self._before
        model = self._model()
        return getattr(type(model), FORWARD).__get__(model)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The forward in whose place this stands.

        By its class: a compiler that breaks the graph in it would take a bound method for
        ``model.forward``, which is this.
        """
        if self._before is not None:
            return self._before(*args, **kwargs)
        model = self._model()
        return getattr(type(model), FORWARD)(model, *args, **kwargs)

    def remove(self) -> None:
        """Give the model its own forward back; under what somebody has put on top, do nothing.

        Whoever wraps it goes on calling it.
        """
        model = self._model()
        if model is None or vars(model).get(FORWARD) is not self:
            return
        if self._before is None:
            delattr(model, FORWARD)
        else:
            setattr(model, FORWARD, self._before)

    def __reduce__(self) -> Any:
        # Copies and pickles of the model have the forward that it had before.
        if self._before is not None:
            return _same, (self._before,)
        return getattr, (self._model(), FORWARD)


def _same(value: Any) -> Any:
    return value
