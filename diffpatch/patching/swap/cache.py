"""diffusers' FirstBlockCache as a part of a patch: on with it, gone with it.

The cache compares what the first block adds in a step with what it added in the last step that was
computed, |r - r'|₁ / |r'|₁. Below a threshold the other blocks are left out, and what they added
then is added again. It keeps one state a guidance branch, which belongs to a run like all state.
Branches that the pipeline does not name, as diffusers' cache wants it, go by their numbers.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch

from diffpatch import internals
from diffpatch.errors import BadParameter, DiffpatchError
from diffpatch.patching.forwards import Forwards
from diffpatch.patching.options.composition import cache_of
from diffpatch.patching.run.run import Run
from diffpatch.patching.swap.in_place import InPlaceOfForward
from diffpatch.pipelines.families.info import FamilyInfo

MEANING = "0.1: how much the first block may change before the others are computed again"


class StepCache:
    """The cache on one transformer.

    Args:
        threshold: change of what the first block adds below which the others are left out.
        model: a transformer of diffusers.
        family: what is known about it.

    Raises:
        BadParameter: diffusers cannot cache this model, or does so already.
    """

    def __init__(self, threshold: float, model: Any, family: FamilyInfo) -> None:
        self.threshold = threshold
        self._config: Any = None
        self._names: _Names | None = None
        self._run: weakref.ref[Run] | None = None
        self._window = 0  # of that run: the tracker's number
        if not hasattr(model, "enable_cache"):
            raise BadParameter(
                f"cache={threshold}: diffusers cannot cache {type(model).__name__}; leave cache out"
            )
        if not family.cacheable:
            raise BadParameter(
                f"cache={threshold}: FirstBlockCache of diffusers fails on {type(model).__name__};"
                " leave cache out"
            )
        if (other := foreign_cache(model)) is not None:
            raise BadParameter(
                f"cache={threshold}: {other} is enabled on {type(model).__name__} already: call"
                " disable_cache() first, or leave cache out"
            )

    def is_on(self, model: Any) -> bool:
        """Whether this cache, and none that somebody else has enabled, is on a model."""
        return self._config is not None and getattr(model, internals.CACHE) is self._config

    def enable(self, model: Any, forwards: Forwards) -> None:
        """Put its hooks on.

        Args:
            model: the transformer.
            forwards: tell the guidance branch of a forward that the pipeline does not name.

        Raises:
            BadParameter: diffusers does not know the blocks of the model.
        """
        from diffusers import FirstBlockCacheConfig

        self._config = FirstBlockCacheConfig(threshold=self.threshold)
        try:
            model.enable_cache(self._config)
        except (ValueError, IndexError) as error:
            setattr(model, internals.CACHE, self._config)
            model.disable_cache()  # hooks that were on before it failed
            raise BadParameter(
                f"cache={self.threshold}: FirstBlockCache does not know the blocks of"
                f" {type(model).__name__} ({error}); leave cache out"
            ) from error
        self._names = _Names(forwards, model)

    def disable(self, model: Any) -> None:
        """Take its hooks off, unless somebody did already."""
        if self._names is not None:
            self._names.remove()
        if self.is_on(model):
            model.disable_cache()
        self._config = None

    def check_copy(self, model: Any) -> None:
        """Refuse to copy a model that it is on: diffusers' hooks would run the original's blocks.

        Raises:
            DiffpatchError: says what to do.
        """
        if self.is_on(model):
            raise DiffpatchError(
                f"a {type(model).__name__} under cache={self.threshold} cannot be copied, because"
                " diffusers' hooks stay those of the original: unpatch, copy, and patch again"
            )

    def begin_forward(self, model: Any, run: Run) -> bool:
        """Forget what is of another run than the forward that begins, or of a window before.

        Returns:
            Whether that other run is not over, so that each robs the other of what is cached.
        """
        before = None if self._run is None else self._run()
        if before is run and self._window == run.number:
            return False
        self._run, self._window = weakref.ref(run), run.number
        if self.is_on(model):
            for module in model.modules():
                hooks = getattr(getattr(module, internals.HOOKS, None), "hooks", {})
                for hook in hooks.values():
                    manager = getattr(hook, internals.CACHE_MANAGER, None)
                    if manager is not None:
                        getattr(manager, internals.CACHE_STATES).clear()
        return before is not None and before is not run and not before.ended


class _Names(InPlaceOfForward):
    """Names the forwards that their pipeline does not, by the number of the guidance branch."""

    def __init__(self, forwards: Forwards, model: Any) -> None:
        super().__init__(model)
        self._forwards: Forwards | None = forwards

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ours = None if torch.compiler.is_compiling() else self._forwards
        forward, model = None if ours is None else ours.current, self._model()
        if forward is None or not forward.hooked or forward.context is not None:
            return self.original(*args, **kwargs)
        name = f"branch {forward.place.branch}"
        with getattr(type(model), internals.CACHE_CONTEXT)(model, name):
            return self.original(*args, **kwargs)

    def remove(self) -> None:
        """Give the model its own forward back."""
        self._forwards = None
        super().remove()


def foreign_cache(model: Any) -> str | None:
    """The cache that somebody else than a patch has enabled on a model; None without one."""
    own = getattr(getattr(model, "_diffpatch", None), "cache", None)
    return None if own is not None and own.is_on(model) else cache_of(model)


def check_limit(name: str, limit: Any, meaning: str, *, bare: bool) -> None:
    """Refuse what cannot be a limit of change, and a transformer whose runs nobody tells apart.

    Args:
        name: of the argument.
        limit: its value.
        meaning: an example, and what it means.
        bare: whether a transformer alone is patched.

    Raises:
        BadParameter: says what can be.
    """
    number = isinstance(limit, int | float) and not isinstance(limit, bool)
    if not number or not math.isfinite(limit) or limit <= 0:
        raise BadParameter(f"{name}={limit!r} must be a number above 0, such as {meaning}")
    if bare:
        raise BadParameter(
            f"{name}={limit!r} takes results from step to step, but a bare transformer knows no"
            " steps: patch the pipeline"
        )
