"""The guide branch: a dense forward whose cross-attention serves sparse forwards after it.

FreeSwim (arXiv 2511.14712) carries two rows through every block, one with windows and one with full
attention, and gives both the cross-attention of the second. The second row knows nothing of the
first, so that it is one more forward of the same latents: it runs before the pipeline's own, and
hooks on the cross-attention keep what comes out and hand it to the forwards of the next steps.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from diffpatch.errors import BadParameter, DiffpatchError
from diffpatch.methods.base import Method
from diffpatch.patching.attention.layout import NO_GRID
from diffpatch.patching.forwards import Forward, Forwards
from diffpatch.patching.options.composition import cache_of
from diffpatch.patching.target import cross_attention
from diffpatch.patterns.grid import TokenGrid

Layers = Sequence[tuple[str, Any]]
RECORD, RECALL = "record", "recall"
UNGUIDED = ("uncond", "pred_uncond")  # begin the names of forwards that run without a guide
SAMPLE = -1  # in the key of a run's state, where those of methods have the number of a sample


class Guide:
    """The guide branch of one patched transformer.

    Args:
        model: the transformer.
        modules: (path, module) of its self-attention.
        name: of the transformer in its pipeline.
        method: says on which grids and how often there is a guide.
        forwards: which forward runs in this thread.

    Raises:
        BadParameter: the model has no cross-attention.
    """

    def __init__(
        self, model: Any, modules: Layers, name: str, method: Method, forwards: Forwards
    ) -> None:
        self._name, self._method, self._forwards = name, method, forwards
        self._modules = cross_attention(model, modules)
        if not self._modules:
            raise BadParameter(
                f"{method.name}: {type(model).__name__} has no cross-attention beside its"
                " self-attention, which a guide needs: pass guide=0"
            )

    def listen(self) -> list[Any]:
        """Hooks on the cross-attention, each with a ``remove``."""
        handles: list[Any] = []
        for layer, module in enumerate(self._modules):
            before, after = _ShortInput(self, layer), _OtherOutput(self, layer)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        return handles

    def check(self, model: Any) -> None:
        """Refuse what would go around the hooks.

        Raises:
            DiffpatchError: names what is on and what to do.
        """
        parts = (getattr(part, "_compiled_call_impl", None) for part in model.modules())
        if torch.compiler.is_compiling() or any(part is not None for part in parts):
            self._refuse("the model is compiled, and its guide runs between modules")
        cache = cache_of(model)
        if cache is not None:
            self._refuse(f"{cache} is enabled, and it would mix the forwards of the guide in")
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())
        if trained:
            self._refuse("no gradients go through a guide; call the model under torch.no_grad()")

    def lead(self, model: Any, args: Any, kwargs: Any, forward: Forward) -> None:
        """Run the guide for a forward that begins, if it is time, and let it recall the latest.

        It is time, too, where the run has forgotten the latest, because the forward is given
        another text or has other samples (`diffpatch.patching.run.run.Run.follow`).

        Args:
            model: the transformer.
            args, kwargs: of its forward.
            forward: which it is.
        """
        every = self._every(forward)
        if not every:
            return
        place = forward.place
        latest = place.run.state[self._key(forward, 0)].get("step")
        if latest is None or place.step - latest >= every:
            forward.guide = RECORD
            try:
                with torch.no_grad():
                    model.forward(*args, **kwargs)
            finally:
                forward.guide = ""
            place.run.record.guides += 1
        forward.guide = RECALL

    def output(self, layer: int, forward: Forward, output: torch.Tensor) -> torch.Tensor | None:
        """What comes out of a cross-attention module in place of an output, None for itself."""
        state = forward.place.run.state[self._key(forward, layer)]
        if forward.guide == RECORD:
            state["step"], state["cross"] = forward.place.step, output
            return None
        recalled: torch.Tensor = state["cross"]
        return recalled

    def now(self) -> Forward | None:
        """The forward of this thread, if it records or recalls."""
        forward = self._forwards.current
        return forward if forward is not None and forward.guide else None

    def _every(self, forward: Forward) -> int:
        """Steps between the guides of such forwards; 0 where they have none."""
        grid, step, name = forward.grid, forward.place.step, forward.context or ""
        if grid == NO_GRID or len(grid) != len(NO_GRID) or name.startswith(UNGUIDED):
            return 0
        if forward.bound.reason(step, -1) is not None:  # dense itself
            return 0
        return self._method.guide_every(TokenGrid(*grid[:3]))

    def _key(self, forward: Forward, layer: int) -> tuple[str, int, int, int]:
        return self._name, layer, forward.place.branch, SAMPLE

    def _refuse(self, why: str) -> None:
        raise DiffpatchError(f"{self._method.name}: {why}: pass guide=0")


def of(model: Any, modules: Layers, name: str, method: Method, forwards: Forwards) -> Guide | None:
    """The guide branch that a method asks for, None where it asks for none."""
    return Guide(model, modules, name, method, forwards) if method.guide_every() else None


class _CrossHook:
    """What both hooks know. Copies and pickles of a patched model have hooks that do nothing."""

    def __init__(self, guide: Guide | None, layer: int) -> None:
        self.guide = None if guide is None else weakref.ref(guide)
        self.layer = layer

    def __deepcopy__(self, memo: dict[int, Any]) -> _CrossHook:
        return type(self)(None, self.layer)

    def __reduce__(self) -> Any:
        return type(self), (None, self.layer)

    def told(self) -> tuple[Guide, Forward] | None:
        """The guide and the forward of this thread, if there is something to do for it."""
        guide = None if self.guide is None else self.guide()
        forward = None if guide is None else guide.now()
        return None if guide is None or forward is None else (guide, forward)


class _ShortInput(_CrossHook):
    """Cuts down the work of a module whose output is not going to be used."""

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        told = self.told()
        if told is None or told[1].guide != RECALL:
            return None
        if args:
            return (args[0][:, :1], *args[1:]), kwargs
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"][:, :1]}
        return None


class _OtherOutput(_CrossHook):
    """Keeps the output of a module, or puts the one that was kept in its place."""

    def __call__(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        told = self.told()
        return None if told is None else told[0].output(self.layer, told[1], output)
