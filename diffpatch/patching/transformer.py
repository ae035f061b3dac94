"""A patched transformer: its rebound layers, and what happens at each of its attention calls."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from diffpatch import internals
from diffpatch.kernels.block_sparse.backends import ROWS, passed_over
from diffpatch.kernels.gpu.device import on_device_of
from diffpatch.methods.base import AttentionCall
from diffpatch.methods.learned import files as adapter
from diffpatch.patching import remarks
from diffpatch.patching.attention import model_masks as masks
from diffpatch.patching.attention import parallel
from diffpatch.patching.attention.decision import Decider, Decision, Question
from diffpatch.patching.attention.layout import NO_GRID, Numbers, call_shape, numbers, with_silent
from diffpatch.patching.forwards import UNTOLD, Forward, Forwards
from diffpatch.patching.options import composition
from diffpatch.patching.patch import Patch, SparseCall
from diffpatch.patching.run import callers
from diffpatch.patching.swap import guide, hooks, operator, rebind, rope
from diffpatch.patching.swap.cache import StepCache
from diffpatch.patching.swap.gates import Gates, on_device
from diffpatch.patching.swap.hold import Hold
from diffpatch.patching.target import argument_names, layers, unreadable
from diffpatch.patterns.grid import Grid
from diffpatch.pipelines.families.table import FamilyInfo


class PatchedTransformer:
    """One transformer whose self-attention goes through a patch (see `operator.Owner`)."""

    def __init__(
        self,
        model: Any,
        name: str,
        family: FamilyInfo,
        patch: Patch,
        wrappers: Iterable[Any] = (),
        cache: float | None = None,
    ) -> None:
        self.handle = operator.new_handle(self)
        self.name = name
        self.family = family
        self.patch = patch
        self.modules = layers(model, family)
        self._trained = family.trained_of(model)
        self.learned = self._learned(type(model).__name__)
        self._gates = Gates(self.learned)
        self.cache = None if cache is None else StepCache(cache, model, family)
        begun = None
        if self.cache is not None:
            begun = functools.partial(remarks.on_turns, self.cache, weakref.ref(model), patch, name)
        self.forwards = Forwards(name, len(self.modules), patch, begun)
        self._guide = guide.of(model, self.modules, name, patch.method, self.forwards)
        self.active = False
        self._model = weakref.ref(model)
        # Wrappers that call the forward of the model past its hooks.
        self._wrappers = [weakref.ref(wrapper) for wrapper in wrappers]
        self._arguments = argument_names(model)
        self._decider = Decider(patch.method, patch.backend, family.text, family.text_queries)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        self._say_of_a_copy()

    def __reduce__(self) -> Any:
        self._say_of_a_copy()
        return type(None), ()

    def _say_of_a_copy(self) -> None:
        if self.cache is not None:
            self.cache.check_copy(self._model())
        self.patch.say_once(f"a copy of {self.name} is not patched: call diffpatch.patch on it")

    @property
    def grid(self) -> Numbers:
        """See `operator.Owner`."""
        return self.forwards.grid

    @property
    def call_shape(self) -> tuple[int, int] | None:
        """See `operator.Owner`."""
        return None if self.family.text_queries else call_shape(self.grid, self.family.text)

    def _learned(self, family: str) -> list[adapter.Learned]:
        """What every layer learned, if the method has a file that says so."""
        layers = [adapter.Layer.of(*named) for named in self.modules]
        return self.patch.method.read_learned(self.name, family, layers)

    def _on(self, device: torch.device, layer: int) -> adapter.Learned:
        """What a layer learned, moved once to the device that its calls run on."""
        self.learned[layer] = on_device(self.learned[layer], device)
        return self.learned[layer]

    def install(self) -> None:
        """Swap the processors and start listening to forwards."""
        model = self._model()
        assert model is not None
        # What can fail comes first: a processor or a rotary embedding that cannot be changed must
        # leave nothing half done.
        fresh = [rebind.rebind(m.processor, self, i) for i, (_, m) in enumerate(self.modules)]
        rope_hooks = rope.install(model, self.patch.method)
        for (_, module), processor in zip(self.modules, fresh, strict=True):
            module.processor = processor
        wrappers = [w for w in (reference() for reference in self._wrappers) if w is not None]
        self._hooks = [
            *self._gates.listen([module for _, module in self.modules]),
            *hooks.listen(self, self.forwards, model, wrappers),
            *rope_hooks,
            *(self._guide.listen() if self._guide is not None else ()),
        ]
        if self.patch.hold is not None:
            self._hooks.append(Hold(self.patch, self.forwards, self._arguments, self.name, model))
        model._diffpatch = self
        self.patch.installed.add(self)
        self.active = True
        if self.cache is not None:  # last: if it fails, all that went before is undone
            self.cache.enable(model, self.forwards)

    def remove(self) -> None:
        """Put the original processors back; ones that somebody else has set since stay."""
        self.active = False  # processors that somebody saved meanwhile act like the originals now
        for _, module in self.modules:
            if rebind.is_rebound(module.processor, self) or rebind.is_stray(module.processor):
                module.processor = rebind.hand_back(module.processor)
        model = self._model()
        if model is not None and self.cache is not None:
            self.cache.disable(model)
        for hook in self._hooks:
            hook.remove()
        self.patch.installed.discard(self)
        for run in self.patch.runs.all():
            run.forget(self.name)
        if model is not None and vars(model).get("_diffpatch") is self:
            del model._diffpatch

    def before_forward(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the grid off the arguments and begin a forward. Traced under torch.compile."""
        processors = [module.processor for _, module in self.modules]
        own = [one for one in processors if rebind.is_rebound(one, self)]
        if not torch.compiler.is_compiling():
            own = list({type(one): one for one in own}.values())  # those of a class run one code
            self._keep_processors()
        for one in own:
            rebind.keep_up(one)
        self._check_company(model)
        named: Mapping[str, Any] = dict(zip(self._arguments, args, strict=False)) | kwargs
        try:
            found = self.family.grid(model, named)
        except (KeyError, AttributeError) as error:
            if self.family.name == "custom":
                raise
            raise unreadable(model, error) from error
        grid, why = (NO_GRID, found) if isinstance(found, str) else (numbers(found), UNTOLD)
        remark = self.patch.remark_on(grid)
        if torch.compiler.is_compiling():
            self.forwards.trace(grid, why)
            return
        within = self._is_within()
        forward = self.forwards.begin(grid, why, named.get("timestep"), within=within)
        remarks.beyond_training(self.name, self._trained, self.patch, forward)
        if remark is not None and remark not in forward.place.run.record.notes:
            forward.place.run.record.notes.append(remark)
        own_cache = self.cache is not None and self.cache.is_on(model)
        remarks.of_caches(self.name, model, self.patch, forward, own_cache)
        steps = self.patch.method.needs_steps
        if steps or self.patch.hold is not None:
            place = forward.place
            place.run.follow(self.name, place.branch, named, first=place.first, carries=steps)
        if self._guide is not None:
            self._guide.lead(model, args, kwargs, forward)

    def after_forward(self, failed: bool) -> None:
        """The forward is through, or has failed. Traced under torch.compile."""
        if not torch.compiler.is_compiling():
            self.forwards.end(failed)

    def _is_within(self) -> bool:
        """Whether this thread is still in an earlier forward, and has not left it by a Ctrl-C."""
        before = self.forwards.current
        if before is None or not before.hooked:
            return False
        own = [self._model(), *(reference() for reference in self._wrappers)]
        return callers.calls_of(own) > 1

    def _check_company(self, model: Any) -> None:
        """Refuse what else is on and would compute something else than it says."""
        modules = [module for _, module in self.modules]
        parallel.check(model, [module.processor for module in modules])
        composition.check_model(model, self.patch.method, modules)
        if self._guide is not None:
            self._guide.check(model)

    def _keep_processors(self) -> None:
        """Patch again what was replaced behind our back (fused projections, IP-Adapters, …)."""
        if not self.active:  # another thread has undone the patch since this forward began
            return
        for i, (path, module) in enumerate(self.modules):
            if rebind.is_rebound(module.processor, self):
                continue
            self.patch.say_once(
                f"the attention processors of {self.name} were replaced after patching; patching"
                f" them again ({path} is now {type(module.processor).__name__})",
                about=f"the processors of {self.name}",
            )
            module.processor = rebind.rebind(module.processor, self, i)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        grid: Sequence[int],
        layer: int,
        ranks: int = 1,
    ) -> torch.Tensor:
        """One attention call of one layer, dense or not; (B, S, H, D). See `operator.Owner`."""
        forward = self.forwards.of_call(layer)
        if forward.guide == guide.RECORD:
            self._record_beside(forward, q, k, layer)
            return self._dense(layer, q, k, v, mask, scale)
        sample = forward.called(layer)
        # What cannot work says so at once and not after the dense steps.
        place = forward.place
        reason = scheduled = forward.bound.reason(place.step, layer)
        prevented: str | None = None
        noted = self._gates.take(layer)
        ahead = place.step == 0 and forward.bound.ever_sparse(layer, place.total)
        if reason is None or ahead:
            seen = masks.read_mask(k, mask, self.family.square_masks)
            masked, given = mask is not None, tuple(grid)
            decision = self._decide(forward, q, k, seen, masked, given, layer, ranks)
            prevented = seen.reason or decision.dense or self._gates.missing(layer, q, noted)
            reason = reason or prevented
        if reason is not None:
            forward.idle.dense(scheduled, prevented, forward.bound.ever_sparse(layer, place.total))
            self._record_dense(forward, q, k, reason, layer)
            return self._dense(layer, q, k, v, mask, scale)
        dense = functools.partial(self._dense, layer, q, k, v, mask, scale)
        forward.idle.sparse += 1
        out = self._sparse(forward, decision, q, k, v, seen, scale, layer, sample, noted)
        if self.patch.observers:
            assert decision.pattern is not None
            where = self.name, layer, place.step, place.branch
            factor = q.shape[-1] ** -0.5 if scale is None else scale
            order = None if decision.order is None else decision.order[0]
            method, pattern = self.patch.method, decision.pattern
            own, of_all = place.run.states(*where[:2], place.branch, sample, method.shares_state)
            state = {**(of_all or {}), **own}
            call = SparseCall(
                place.run, where, out, dense, q, k, factor, seen.keys, method, pattern, order, state
            )
            for observe in list(self.patch.observers):
                observe(call)
        return out

    @contextlib.contextmanager
    def dealing(
        self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, layer: int
    ) -> Iterator[parallel.Deal | None]:
        """The order in which heads are shared out to processes. See `operator.Owner`."""
        forward, (_, ranks) = self.forwards.current, parallel.share(self._model())
        grouped = q.shape[2] != k.shape[2] or (mask is not None and mask.shape[1:-2].numel() > 1)
        told = forward is not None and forward.hooked and forward.grid != NO_GRID
        if forward is None or not told or grouped or len(forward.grid) != len(NO_GRID):
            yield None
            return
        place = forward.place
        if forward.bound.reason(place.step, layer) is None:
            variant = self.patch.method.variant(layer, place.step)
            memo = self.patch.memo(place.run, (forward.grid, 0))
            forward.deal = self._decider.deal(forward.grid, variant, q.shape[2], ranks, memo)
        try:
            yield forward.deal
        finally:
            forward.deal = None

    def _decide(
        self,
        forward: Forward,
        q: torch.Tensor,
        k: torch.Tensor,
        seen: masks.ModelMask,
        masked: bool,
        grid: Numbers,
        layer: int,
        ranks: int,
    ) -> Decision:
        """Whether and over which pattern a call is sparse, from memory where possible."""
        grid = forward.grid if forward.hooked else grid
        if grid == NO_GRID:
            return Decision(forward.why)
        variant = self.patch.method.variant(layer, forward.place.step)
        question = Question(
            (q.shape[0], k.shape[1], *q.shape[2:]), q.dtype, q.device, variant, masked,
            seen.bias is not None, bool(self.learned[layer]), *parallel.share(self._model()), ranks,
            forward.deal,
        )  # fmt: skip
        memo = self.patch.memo(forward.place.run, (grid, k.shape[1]))
        return self._decider.decide(grid, question, memo)

    def _sparse(
        self,
        forward: Forward,
        decision: Decision,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        seen: masks.ModelMask,
        scale: float | None,
        layer: int,
        sample: int,
        noted: torch.Tensor | None,
    ) -> torch.Tensor:
        """The second half of a call: attention over the pattern that was decided on."""
        pattern, places, size = decision.pattern, decision.order, v.shape[-1]
        assert pattern is not None
        share = k.shape[1] / q.shape[1]  # the pattern's fractions are of tokens × tokens
        asked = q
        q, asking = with_silent(q, decision.silent)
        if places is not None:
            q, k, v, seen = q[:, places[0]], k[:, places[0]], v[:, places[0]], seen.at(places[0])
        if seen.bias is not None:
            q, k, v, scale = masks.fold_bias(q, k, v, seen.bias, scale)
        place, method, name = forward.place, self.patch.method, self.name
        state, shared = place.run.states(name, layer, place.branch, sample, method.shares_state)
        learned = self._gates.gate(self._on(q.device, layer), noted, q)
        call = AttentionCall(
            pattern, scale, seen.keys, self.patch.backend, place.step, place.total, state, learned,
            layer, place.branch, shared,
            functools.partial(place.run.common, name, place.branch, sample),
        )  # fmt: skip
        with on_device_of(q):
            done = method.attend(q, k, v, call)
        place.run.check_state(method)
        out = done.out[..., :size]
        out = (out if places is None else out[:, places[1]])[:, asking]
        self._record(forward, asked, k, layer, done.kept * share, done.backend, grid=pattern.grid)
        return out

    def _dense(self, layer: int, *call: Any) -> torch.Tensor:
        """What the unpatched processor computes from (q, k, v, mask, scale)."""
        return rebind.dense(self.modules[layer][1].processor, *call)

    def passed_by(self, q: torch.Tensor, reason: str, layer: int) -> None:
        """Count a call that diffusers answered itself. See `operator.Owner`."""
        forward = self.forwards.of_call(layer)
        if forward.guide == guide.RECORD:
            return self._record_beside(forward, q, q, layer)
        forward.called(layer)
        scheduled = forward.bound.reason(forward.place.step, layer)
        forward.idle.dense(scheduled, reason, True)
        self._record_dense(forward, q, q, reason, layer)

    def _record_beside(
        self, forward: Forward, q: torch.Tensor, k: torch.Tensor, layer: int
    ) -> None:
        pairs = float(q.shape[0] * q.shape[2]) * q.shape[1] * k.shape[1]
        run = forward.place.run
        run.record.add_beside(self.name, layer, run.place(forward.place.step), pairs)

    def _record_dense(
        self, forward: Forward, q: torch.Tensor, k: torch.Tensor, reason: str, layer: int
    ) -> None:
        self._record(forward, q, k, layer, 1.0, "dense", reason)

    def _record(
        self,
        forward: Forward,
        q: torch.Tensor,
        k: torch.Tensor,
        layer: int,
        kept: float | torch.Tensor,
        backend: str,
        reason: str | None = None,
        grid: Grid | None = None,
    ) -> None:
        """Count a call; those of a backward pass were counted before."""
        if not internals.in_backward():
            run = forward.place.run
            pairs = float(q.shape[0] * q.shape[2]) * q.shape[1] * k.shape[1]
            step = run.place(forward.place.step)
            if self.patch.backend == "auto":
                over = (f"backend {name!r} is not taken: {x}" for name, x in passed_over(q).items())
                run.record.notes += [note for note in over if note not in run.record.notes]
            error = ROWS[backend].error if backend in ROWS else ""
            if error and backend not in run.record.backends:
                run.record.notes.append(f"backend {backend!r}: {error}")
            run.record.add(self.name, layer, step, pairs, kept, backend, reason, grid)
