"""patch, unpatch and what goes with them: where models, methods and kernels meet."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from diffpatch.checking import checked
from diffpatch.errors import BadParameter, DiffpatchError, NotPatched
from diffpatch.kernels.block_sparse.backends import check_backend
from diffpatch.methods.base import Method
from diffpatch.methods.registry import MethodLike
from diffpatch.patching.options.found import with_found_weights
from diffpatch.patching.options.from_settings import from_settings, promised
from diffpatch.patching.options.schedule import Amount, Schedule
from diffpatch.patching.options.settle import no_effect, settle
from diffpatch.patching.report import Record, Report
from diffpatch.patching.target import components, cross_attention, layers, models, transformers
from diffpatch.patterns.grid import PackedGrid, TokenGrid
from diffpatch.pipelines.families.presets import two_experts
from diffpatch.pipelines.families.table import FamilyInfo
from diffpatch.pipelines.families.unwrap import bypassing
from diffpatch.targets.settings import Settings

if TYPE_CHECKING:
    from diffpatch.patching.patch import CheckGrid, Patch
    from diffpatch.patching.transformer import PatchedTransformer

Target = TypeVar("Target")
Grid = TokenGrid | PackedGrid | Callable[..., TokenGrid | PackedGrid]
_CHANGING = threading.RLock()  # while patches go on and off; never during attention
# The patches of the `patched` blocks that the current thread or task is inside of.
_INSIDE: contextvars.ContextVar[tuple[Patch, ...]] = contextvars.ContextVar(
    "diffpatch_patched", default=()
)


@checked("method", "dense_steps", "dense_layers", "dense_last_steps", "grid")
def patch(
    pipe: Target,
    method: MethodLike = "radial",
    *,
    dense_steps: Amount | None = None,
    dense_layers: Amount | Collection[int] | None = None,
    dense_last_steps: Amount = 0,
    quality: str | None = None,
    backend: str = "auto",
    grid: Grid | None = None,
    modules: str | None = None,
    cache: float | None = None,
    hold: float | None = None,
    settings: str | Path | Settings | None = None,
    target: str | None = None,
    strict: bool = False,
    **params: Any,
) -> Target:
    """Make a pipeline or transformer compute less attention, in place.

    A model of your own needs a description, and attention modules with a ``processor`` as in
    diffusers::

        def grid(latents, prompt, **_):  # the arguments of its forward
            return TokenGrid(*latents.shape[2:], text_before=prompt.shape[1])

        patch(model, "window", grid=grid, modules=r"blocks\\.\\d+\\.attn")

    Args:
        pipe: a diffusers pipeline (all its known transformers are patched) or one transformer,
            which takes no dense steps and nothing that goes on from step to step.
        method: "auto" (radial for videos, neighborhood for images), a name from `list_methods()`,
            a combination such as ``"radial+temporal"`` or ``["radial", "temporal"]`` (see
            `diffpatch.patching.options.composition`), or an object such as ``Radial(decay=0.5)``.
        dense_steps: first denoising steps that stay dense; int = count, float = fraction. None
            takes the family's published setting for the method, else the method's own.
        dense_layers: first layers that stay dense (count or fraction), or layer numbers. None as
            above.
        dense_last_steps: last denoising steps that stay dense (count or fraction).
        quality: "high", "balanced" or "fast": sparse calls keep 50, 25 or 12.5 % of the pairs of
            visual tokens, within a tenth of that where the grid has enough tiles. It only chooses
            what `params` leave open and never the dense steps and layers; `report` and `plan`
            print the result, and say so where `params` leave nothing to choose. None takes the
            published setting, else the method's defaults.
        backend: "auto", "triton", "gluon", "flex", "torch", "reference", "triton-int8",
            "torch-int8", "triton-fp8" or "torch-fp8", as
            `diffpatch.kernels.block_sparse.api.block_sparse_attention` says.
        grid: for models without a family: a `TokenGrid` (or a `PackedGrid`, for several grids in
            one sequence), or a function of the forward's arguments
            (as keywords) that returns one. Needs `modules`.
        modules: for models without a family: regular expression that full-matches the paths of the
            self-attention modules, each with a diffusers ``processor``.
        cache: threshold of diffusers' FirstBlockCache, which is then a part of the patch: steps in
            which the first block changes by less (relative L1) leave out the other blocks. None
            enables none; caches that you enable yourself stay yours.
        hold: tolerance within which steps are held: the transformer is not run, and its last result
            is given again, while that leads astray by no more than this fraction of it (see
            `diffpatch.patching.run.path`). 0.0025 is careful, 0.01 fast. None holds no step.
        settings: what `diffpatch.tune` measured for this model, as a file or as the object. The
            method is then ``dynamic``, with a budget for every head.
        target: what to choose settings for, such as "30 dB", "kept 0.25", "error 5%" or "2x"; in
            its place `quality` keeps that much of sparse calls, dealt out over the heads.
        strict: raise `NothingSparse` if no call of a forward runs sparsely, unless only because
            the first steps are dense. If False, a warning says so once, with the reason.
        **params: parameters of the method.

    Returns:
        The pipeline or transformer. Patching again replaces the earlier patch.

    Raises:
        UnknownMethod, BadParameter: the method or a parameter cannot work.
        UnknownFamily: no transformer of a known family is in the target, or one that cannot be
            patched, with the reason.
    """
    # Imports diffusers, which takes seconds, so only here.
    from diffpatch import internals
    from diffpatch.patching.patch import Patch
    from diffpatch.patching.swap import cache as caches
    from diffpatch.patching.swap import hold as holds
    from diffpatch.patching.transformer import PatchedTransformer

    internals.check()
    found = transformers(pipe, _custom_family(grid, modules))
    check_grid: CheckGrid | None = None
    remark: str | None = None
    steps: int | None = None
    if settings is not None or target is not None:
        given = [*params, *(n for n, x in (("cache", cache), ("hold", hold)) if x is not None)]
        given += [f"method={method!r}"] if method not in ("radial", "dynamic") else []
        here = {name: model for name, model, _ in found}
        loaded, choice = from_settings(here, settings, target, quality, given)
        method, check_grid = choice.method(found[0][0]), loaded.check_grid
        cache, hold = choice.cache, choice.hold
        others = {"dense_layers": dense_layers, "dense_last_steps": dense_last_steps}
        remark = promised(choice, target or quality, {"dense_steps": dense_steps, **others})
        dense_steps = choice.dense_steps if dense_steps is None else dense_steps
        dense_layers = 0 if dense_layers is None else dense_layers
        quality = None
        steps = None if choice.speedup is None else loaded.steps
    bare = not hasattr(pipe, "components")
    if cache is not None:
        caches.check_limit("cache", cache, caches.MEANING, bare=bare)
    if hold is not None:
        caches.check_limit("hold", hold, holds.MEANING, bare=bare)
    wanted: dict[str, Any] = {"dense_steps": dense_steps, "dense_layers": dense_layers}
    wanted |= {"dense_last_steps": dense_last_steps, "quality": quality}
    params = with_found_weights(pipe, found[0][1], method, params)
    chosen, schedule = _settled(pipe, found[0], method, params, **wanted)
    remark = remark or no_effect(chosen, quality, params)
    check_backend(backend)
    shared = Patch(
        chosen, schedule, backend, pipe,
        bare=bare, check_grid=check_grid, steps=steps, remark=remark, strict=strict, hold=hold,
    )  # fmt: skip
    parts = components(pipe)
    fresh = [
        PatchedTransformer(model, name, family, shared, bypassing(parts[name]), cache)
        for name, model, family in found
    ]
    for transformer in fresh:
        schedule.layers(len(transformer.modules))
    with _CHANGING:
        for one in dict.fromkeys(owner.patch for owner in owners(pipe)):
            if one.is_for_another(pipe):
                shared.say_once(
                    f"another pipeline shares the transformer and was patched with {one.method}:"
                    f" both run {chosen} now"
                )
        before = _carried(pipe)
        unpatch(pipe)  # only now: what cannot work leaves an earlier patch alone
        try:
            _install(pipe, shared, fresh)
        except Exception:
            _bring_back(pipe, before)
            raise
    return pipe


@checked("method", "grid")
def settled(
    target: Any,
    method: MethodLike = "radial",
    *,
    grid: Grid | None = None,
    modules: str | None = None,
    **options: Any,
) -> tuple[Method, Schedule]:
    """What `patch` would use with the same arguments: the method and what stays dense.

    Args:
        target: as in `patch`; it is only looked at.
        method: as in `patch`.
        grid: as in `patch`.
        modules: as in `patch`.
        **options: dense_steps, dense_layers, dense_last_steps, quality and parameters, as there.

    Raises:
        UnknownMethod, BadParameter, UnknownFamily: as in `patch`.
    """
    found = transformers(target, _custom_family(grid, modules))[0]
    names = ("dense_steps", "dense_layers", "dense_last_steps", "quality")
    wanted = {name: options.pop(name) for name in names if name in options}
    params = with_found_weights(target, found[1], method, options)
    return _settled(target, found, method, params, **wanted)


def _settled(
    target: Any,
    found: tuple[str, Any, FamilyInfo],
    method: MethodLike,
    params: dict[str, Any],
    **wanted: Any,
) -> tuple[Method, Schedule]:
    _, model, family = found
    return settle(
        method,
        params,
        family,
        family.kind,
        stepless=not hasattr(target, "components"),
        experts=two_experts(target),
        trained=family.trained_of(model),
        cross_attention=bool(cross_attention(model, layers(model, family))),
        **wanted,
    )


def _carried(target: Any) -> dict[Patch, list[PatchedTransformer]]:
    """The patches that a target carries, and the transformers of each."""
    found: dict[Patch, list[PatchedTransformer]] = {}
    for owner in owners(target):
        found.setdefault(owner.patch, []).append(owner)
    return found


def _bring_back(target: Any, before: dict[Patch, list[PatchedTransformer]]) -> None:
    for shared, previous in before.items():
        _install(target, shared, previous)


def _install(target: Any, shared: Patch, owners: Iterable[PatchedTransformer]) -> None:
    from diffpatch.patching.run.callers import schedulers_of

    try:
        for owner in owners:
            owner.install()
    except Exception:
        shared.undo()
        raise
    if not isinstance(target, torch.nn.Module):
        shared.follow(schedulers_of(components(target)))
        with contextlib.suppress(AttributeError):
            target._diffpatch = shared  # so that it is found when its components are exchanged


def unpatch(target: Target) -> Target:
    """Undo `patch`: the same processor objects, the same scheduler class, bit-equal outputs.

    That goes for all that was patched, also if the target has other components by now. Does nothing
    to a target that is not patched.
    """
    with _CHANGING:
        for owner in owners(target):
            owner.remove()
            if not owner.patch.installed:
                owner.patch.undo()
        if not isinstance(target, torch.nn.Module):
            shared = getattr(target, "__dict__", {}).pop("_diffpatch", None)
            if shared is not None and shared.is_for(target):
                shared.undo()
    return target


@contextlib.contextmanager
def patched(pipe: Target, method: MethodLike = "radial", **options: Any) -> Iterator[Target]:
    """`patch` for the length of a with block; undone on the way out, also after an exception.

    A patch that the target carried before is back afterwards, with counts and state of its own that
    begin anew.

    Args:
        pipe: as in `patch`.
        method: as in `patch`.
        **options: all other arguments of `patch`.

    Raises:
        DiffpatchError: another thread or task is inside such a block with the same transformers.
        Others: as `patch` does.
    """
    with _CHANGING:
        before = _carried(pipe)
        if any(one.in_block for one in before if one not in _INSIDE.get()):
            raise DiffpatchError(
                f"another thread or task is inside `patched` with this {type(pipe).__name__}, and"
                " its method would change in the middle: patch once for all of them, or let one"
                " block end before the next begins"
            )
        own = owners(patch(pipe, method, **options))[0].patch
        own.in_block = True
        _INSIDE.set((*_INSIDE.get(), own))
    try:
        yield pipe
    finally:
        with _CHANGING:
            own.in_block = False
            _INSIDE.set(tuple(one for one in _INSIDE.get() if one is not own))
            unpatch(pipe)
            for shared in before:
                shared.runs.forget()
            _bring_back(pipe, before)


def report(target: Any) -> Report:
    """What the last run of a patched target did (of a bare transformer: its last forward).

    Args:
        target: a patched pipeline or transformer. Of a pipeline that never ran itself, it is the
            last run over its transformers.

    Raises:
        NotPatched: the target carries no patch.
    """
    found = named_owners(target)
    patches = list(dict.fromkeys(owner.patch for owner in found.values()))
    notes: list[str] = []
    if not found and (left := _left_over(target)) is not None:
        patches = [left]
        notes = ["the transformer was exchanged after patching: call diffpatch.patch again"]
    if not patches:
        raise NotPatched(f"{type(target).__name__} is not patched: call diffpatch.patch(...) first")
    for one in patches:
        one.runs.of(target).note_state()
        notes += [] if one.remark is None else [one.remark]
    if len(patches) == 1:
        record = patches[0].runs.of(target).record
    else:  # transformers patched one by one, each with counts of its own
        runs = {name: owner.patch.runs.of(target) for name, owner in found.items()}
        record = Record.joined({name: run.record for name, run in runs.items()})
    method = "; ".join(dict.fromkeys(str(p.method) for p in patches))
    return Report.of(method, sum(len(o.modules) for o in found.values()), record, notes)


def summary(target: Any) -> Report:
    """The same as `report`, under the name that users of cache-dit look for."""
    return report(target)


def is_patched(target: Any) -> bool:
    """Whether a pipeline or transformer carries a patch."""
    return bool(owners(target)) or _left_over(target) is not None


def reset(target: Any) -> None:
    """Forget all state and counts of the last run; the patch stays on.

    Args:
        target: a patched pipeline or transformer; one that is not patched is left alone.
    """
    for shared in {owner.patch for owner in owners(target)}:
        shared.runs.of(target).reset()


def _left_over(target: Any) -> Patch | None:
    """The patch of a pipeline that has lost all its patched transformers."""
    shared: Patch | None = getattr(target, "__dict__", {}).get("_diffpatch")
    return shared if shared is not None and shared.installed else None


def owners(target: Any) -> list[PatchedTransformer]:
    """The patched transformers of a target; patched together, they share one `Patch`."""
    return list(named_owners(target).values())


def named_owners(target: Any) -> dict[str, PatchedTransformer]:
    """The same by the names they have in the target."""
    found = {name: getattr(m, "_diffpatch", None) for name, m in models(target).items()}
    return {name: owner for name, owner in found.items() if owner is not None}


def _custom_family(grid: Grid | None, modules: str | None) -> FamilyInfo | None:
    if grid is None and modules is None:
        return None
    if grid is None or modules is None:
        raise BadParameter("grid= and modules= describe a model together: pass both or neither")

    def read(model: Any, args: Any) -> Any:
        value = grid(**args) if callable(grid) else grid
        if isinstance(value, PackedGrid):
            return value
        return (*value.shape, value.text_before, value.text_after)

    return FamilyInfo(
        "custom", "custom", "video", modules, read,
        text="unknown", guidance="", regional=False, ulysses=False,
    )  # fmt: skip
