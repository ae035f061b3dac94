"""A patched transformer: its rebound layers, and what happens at each of its attention calls."""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from diffpatch import internals
from diffpatch.errors import DiffpatchError, UnknownFamily
from diffpatch.kernels.block_sparse.backends import unsupported_reason
from diffpatch.kernels.gpu.device import on_device_of
from diffpatch.methods import learned as adapter
from diffpatch.methods.base import AttentionCall
from diffpatch.patching import composition, parallel, rebind, rope
from diffpatch.patching import model_masks as masks
from diffpatch.patching.frames import FrameClock
from diffpatch.patching.patch import Patch
from diffpatch.patching.report import Record
from diffpatch.patterns.grid import TokenGrid
from diffpatch.patterns.pattern import BlockPattern
from diffpatch.pipelines.families.grids import REST, Grid
from diffpatch.pipelines.families.table import FamilyInfo, attention_modules

logger = logging.getLogger(__name__)

_NO_GRID: Grid = (0, 0, 0, 0, 0)
DENSE_FROM = 1.0  # patterns that keep this much run dense: skipping nothing only costs


class PatchedTransformer:
    """One transformer whose self-attention goes through a patch (see `rebind.Owner`)."""

    def __init__(self, model: Any, name: str, family: FamilyInfo, patch: Patch) -> None:
        self.handle = rebind.new_handle(self)
        self.grid: Grid = _NO_GRID
        self.name = name
        self.family = family
        self.patch = patch
        self.modules = attention_modules(model, family)
        if not self.modules:
            raise UnknownFamily(
                f"no attention module of {type(model).__name__} matches {family.modules!r}:"
                " this is not the model diffpatch knows under that name"
            )
        self.learned = self._learned(type(model).__name__)
        self.active = False
        self._model = weakref.ref(model)
        self._arguments = list(inspect.signature(type(model).forward).parameters)[1:]
        self._why = "the arguments of the forward do not tell the token grid"
        self._counted = False
        self._seen: set[int] = set()  # layers called in this forward
        self._last = -1
        self._sample = 0
        self._warned = self._mixed = False
        self._frames = FrameClock()
        self._forwards: set[tuple[Grid, int]] = set()  # since the last backward pass
        self._went_back = False

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # copies of a patched model are unpatched

    def __reduce__(self) -> Any:
        return type(None), ()

    def _learned(self, family: str) -> list[adapter.Learned]:
        """What every layer learned, if the method has a file that says so."""
        path = self.patch.method.learned_from()
        if path is None:
            return [{} for _ in self.modules]
        layers = [adapter.Layer.of(*named) for named in self.modules]
        return adapter.load(path, self.name, family, layers)[1]

    def _on(self, device: torch.device, layer: int) -> adapter.Learned:
        """What a layer learned, moved once to the device that its calls run on."""
        if any(x.device != device for x in self.learned[layer].values()):
            self.learned[layer] = {n: x.to(device) for n, x in self.learned[layer].items()}
        return self.learned[layer]

    def install(self) -> None:
        """Swap the processors and start listening to forwards."""
        model = self._model()
        assert model is not None
        # All of them first: a processor that cannot be rebound must leave nothing half done.
        fresh = [rebind.rebind(m.processor, self, i) for i, (_, m) in enumerate(self.modules)]
        for (_, module), processor in zip(self.modules, fresh, strict=True):
            module.processor = processor
        self._hook = model.register_forward_pre_hook(_GridHook(self), with_kwargs=True)
        self._rope = rope.install(model, self.patch.method)
        model._diffpatch = self
        self.active = True

    def remove(self) -> None:
        """Put the original processors back; ones that somebody else has set since stay."""
        self.active = False  # processors that somebody saved meanwhile act like the originals now
        for _, module in self.modules:
            if rebind.is_rebound(module.processor, self) or rebind.is_stray(module.processor):
                module.processor = rebind.hand_back(module.processor)
        self._hook.remove()
        for hook in self._rope:
            hook.remove()
        self.patch.reset()
        model = self._model()
        if model is not None:
            del model._diffpatch

    def before_forward(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the grid off the arguments and count the forward. Traced under torch.compile."""
        for _, module in self.modules:
            if rebind.is_rebound(module.processor, self):
                rebind.keep_up(module.processor)
        if not torch.compiler.is_compiling():
            self._keep_processors()
            self.patch.begin_forward()
            self._counted = True
            self._seen.clear()
            self._warn_of_mixed_branches(model)
        self._check_company(model)
        named: Mapping[str, Any] = {
            **dict(zip(self._arguments, args, strict=False)), **kwargs
        }  # fmt: skip
        try:
            found = self.family.grid(model, named)
        except (KeyError, AttributeError) as error:
            if self.family.name == "custom":
                raise
            raise internals.changed(f"{type(model).__name__} was called without {error}") from error
        if isinstance(found, str):
            self.grid, self._why = _NO_GRID, found
        else:
            self.grid = found
        if not torch.compiler.is_compiling():
            self._forget_moved_frames(named)

    def _forget_moved_frames(self, arguments: Mapping[str, Any]) -> None:
        patch = self.patch
        first = patch.method.needs_steps and patch.tracker.branch == 0
        if first and self._frames.moved(arguments):
            patch.forget(self.name)

    def _check_company(self, model: Any) -> None:
        """Refuse what else is on and would compute something else than it says."""
        modules = [module for _, module in self.modules]
        parallel.check(model, [module.processor for module in modules])
        composition.check_model(model, self.patch.method, modules)

    def _warn_of_mixed_branches(self, model: Any) -> None:
        if not self._mixed and composition.mixes_branches(model, self.patch.tracker.branch):
            logger.warning(
                "%s keeps one result for all guidance branches of %s, which run in turn: diffusers"
                " hands the answer for one to the other, patched or not",
                composition.cache_of(model), self.name,
            )  # fmt: skip
            self._mixed = True

    def _keep_processors(self) -> None:
        """Patch again what was replaced behind our back (fused projections, IP-Adapters, …)."""
        for i, (path, module) in enumerate(self.modules):
            if rebind.is_rebound(module.processor, self):
                continue
            if not self._warned:
                logger.warning(
                    "the attention processors of %s were replaced after patching (%s is now %s);"
                    " patching them again", self.name, path, type(module.processor).__name__,
                )  # fmt: skip
                self._warned = True
            module.processor = rebind.rebind(module.processor, self, i)

    def _enter(self, layer: int) -> None:
        """Notice that a new forward begins.

        A layer may be called several times in a row (Mochi: a call a sample) and layers may be
        skipped, so a forward begins where a layer comes back after others.
        """
        if internals.in_backward():
            self._check_recomputing()
            return
        again = layer in self._seen and (layer != self._last or len(self.modules) == 1)
        if again or not self._seen:
            if not self._counted:  # a compiled forward: the hook was traced, not run
                self.patch.begin_forward()
            self._counted = False
            self.patch.enter_run()
            self._seen.clear()
            self._begin_gradient()
        self._sample = self._sample + 1 if layer == self._last and layer in self._seen else 0
        self._seen.add(layer)
        self._last = layer

    def _begin_gradient(self) -> None:
        """Remember what a forward looks like of which a backward pass may compute parts again."""
        if self._went_back:
            self._forwards.clear()
            self._went_back = False
        if torch.is_grad_enabled():
            self._forwards.add((self.grid, max(self.patch.tracker.step, 0)))

    def _check_recomputing(self) -> None:
        """Gradient checkpointing computes a layer again, and nothing tells of which forward."""
        self._went_back = True
        if len(self._forwards) > 1 or self.patch.method.needs_steps:
            raise DiffpatchError(
                f"gradient checkpointing computes {self.patch.method.name} attention again, one of"
                f" {len(self._forwards)} forwards with grids or steps of their own: call backward"
                " after every forward, or train without checkpointing"
            )

    @property
    def _record(self) -> Record:
        """Where calls are counted; those of a backward pass were counted before."""
        return Record() if internals.in_backward() else self.patch.record

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        grid: Grid,
        layer: int,
        ranks: int = 1,
    ) -> torch.Tensor:
        """One attention call of one layer, dense or not; (B, S, H, D). See `rebind.Owner`."""
        self._enter(layer)
        patch = self.patch
        step = max(patch.tracker.step, 0)
        reason = patch.bound(len(self.modules)).reason(step, layer)
        if reason is None:
            seen = masks.read_mask(q, mask, self.family.square_masks)
            pattern, reason = self._pattern(q, mask, grid, layer, step, ranks)
            reason = seen.reason or reason
            if self.learned[layer] and (ranks > 1 or seen.bias is not None):
                reason = "learned weights know neither shared heads nor biased keys"
        if reason is not None:
            self._record_dense(q, reason, layer)
            return self._dense(layer, q, k, v, mask, scale)
        assert pattern is not None
        dense = functools.partial(self._dense, layer, q, k, v, mask, scale)
        size = v.shape[-1]
        places = parallel.order(pattern, self.family.text, ranks, q.device)
        if places is not None:
            q, k, v, seen = q[:, places[0]], k[:, places[0]], v[:, places[0]], seen.at(places[0])
        if seen.bias is not None:
            q, k, v, scale = masks.fold_bias(q, k, v, seen.bias, scale)
        state = patch.state[self.name, layer, patch.tracker.branch, self._sample]
        learned = self._on(q.device, layer)
        total = patch.tracker.total
        call = AttentionCall(
            pattern, scale, seen.keys, patch.backend, step, total, state, learned, layer,
            patch.tracker.branch,
        )  # fmt: skip
        with on_device_of(q):
            done = patch.method.attend(q, k, v, call)
        patch.check_state()
        self._record.add(self.name, layer, step, _pairs(q), done.kept, done.backend)
        out = done.out[..., :size]
        out = out if places is None else out[:, places[1]]
        for observe in patch.observers:
            observe((self.name, layer, step, patch.tracker.branch), out, dense)
        return out

    def _dense(self, layer: int, *call: Any) -> torch.Tensor:
        """What the unpatched processor computes from (q, k, v, mask, scale)."""
        return rebind.dense(self.modules[layer][1].processor, *call)

    def passed_by(self, q: torch.Tensor, reason: str, layer: int) -> None:
        """Count a call that diffusers answered itself. See `rebind.Owner`."""
        self._enter(layer)
        self._record_dense(q, reason, layer)

    def _record_dense(self, q: torch.Tensor, reason: str, layer: int) -> None:
        step = max(self.patch.tracker.step, 0)
        record = self._record
        record.reasons[reason] += 1
        record.add(self.name, layer, step, _pairs(q), 1.0, "dense")

    def _pattern(
        self,
        q: torch.Tensor,
        mask: torch.Tensor | None,
        shape: Grid,
        layer: int,
        step: int,
        ranks: int,
    ) -> tuple[BlockPattern | None, str | None]:
        """The pattern for this call, or why the call must be dense."""
        frames, height, width, before, after = shape
        if shape == _NO_GRID:
            return None, self._why
        if before == REST and mask is not None:
            return None, "prompts of different lengths in one batch"
        rest = q.shape[1] - frames * height * width
        if before == REST:
            before = rest - after
        elif after == REST:
            after = rest - before
        if min(before, after) < 0 or before + after != rest or min(shape[:3]) < 1:
            return None, f"a sequence of {q.shape[1]} tokens does not hold the grid {shape}"
        if frames == 1 and "image" not in self.patch.method.kinds:
            return None, f"{self.patch.method.name} saves between frames and there is one"
        if ranks > 1 and rest and self.family.text == "unknown":
            return None, "how the processes cut the tokens around the grid is not known"
        grid = TokenGrid(frames, height, width, before, after)
        pattern = self.patch.pattern(grid, self.patch.method.variant(layer, step))
        rank, parts = parallel.share(self._model())
        pattern = pattern.for_heads(q.shape[2] * parts)
        pattern = parallel.of_heads(pattern, q.shape[2], rank, parts)
        if pattern.kept >= DENSE_FROM and not self.patch.method.dynamic:
            return None, "pattern keeps everything"
        blocks = pattern.on(q.device)
        return pattern, unsupported_reason(q, blocks, self.patch.backend)


def _pairs(q: torch.Tensor) -> float:
    """Query-key pairs of a call, dense."""
    return float(q.shape[0] * q.shape[2]) * q.shape[1] ** 2


class _GridHook:
    """The pre-forward hook; copies and pickles of it do nothing."""

    def __init__(self, owner: PatchedTransformer | None) -> None:
        self.owner = owner

    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.owner is not None:
            self.owner.before_forward(model, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _GridHook:
        return _GridHook(None)

    def __reduce__(self) -> Any:
        return _GridHook, (None,)
