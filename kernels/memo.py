"""Values that follow from something that never changes, made once and kept with it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar, cast

import torch

Value = TypeVar("Value")

_DEVICES = ("cpu", "cuda", "xpu", "mps")  # whose autocast a caller may have switched on


class Memo:
    """What is made once for each key.

    Two threads may both make a value; the first one stays, for both of them.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}

    def __call__(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key, made by `make` in a `neutral` context if there is none yet."""
        if key not in self._made:
            with neutral():
                made = make()
            self._made.setdefault(key, made)
        return cast(Value, self._made[key])


class Recent:
    """A memo of the values that were asked for last, whoever holds one keeping it longer.

    Two threads may both make a value; the first one stays, for both of them.

    Args:
        size: how many.
    """

    def __init__(self, size: int) -> None:
        self._made: OrderedDict[Hashable, Any] = OrderedDict()
        self.size = size
        self._lock = threading.Lock()  # for the table; values are made without it

    def __call__(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key, made by `make` in a `neutral` context if there is none."""
        with self._lock:
            if key in self._made:
                self._made.move_to_end(key)
                return cast(Value, self._made[key])
        with neutral():
            made = make()
        with self._lock:
            made = self._made.setdefault(key, made)
            while len(self._made) > self.size:
                self._made.popitem(last=False)
        return made

    def __len__(self) -> int:
        return len(self._made)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._made.clear()


@contextmanager
def neutral() -> Iterator[None]:
    """Leave what the caller has switched on, while something is made that outlives the call.

    The default device, autocast, inference mode and gradients would all end up in tensors that
    other callers are given later, who need not have switched on the same. The default dtype belongs
    to the process, so that other threads would see it change: what is made names its dtypes.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.device("cpu"))
        # Leaving inference mode turns gradients on, so that they are turned off after it.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
