"""What is said of a forward that begins, once: it is beyond training, or a cache mixes it up."""

from __future__ import annotations

from typing import Any

from diffpatch.patching.attention.layout import NO_GRID
from diffpatch.patching.forwards import Forward
from diffpatch.patching.options import composition
from diffpatch.patching.options.beyond import beyond
from diffpatch.patching.patch import Patch
from diffpatch.patching.run.run import Run
from diffpatch.patching.swap.cache import StepCache
from diffpatch.patterns.grid import TokenGrid


def beyond_training(name: str, trained: Any, patch: Patch, forward: Forward) -> None:
    """Remark on a grid that is larger than what the model was trained on.

    Args:
        name: of the transformer.
        trained: what it was trained on, as `FamilyInfo.trained_of` says it.
        patch: what is on.
        forward: the one that begins.
    """
    if forward.grid == NO_GRID or len(forward.grid) != len(NO_GRID):
        return
    said = beyond(trained, TokenGrid(*forward.grid[:3]), patch.method.name)
    if said is not None:
        patch.say_once(f"{name}: {said}")
        if forward.place.first and forward.place.step == 0:
            forward.place.run.record.notes.append(said)


def of_caches(name: str, model: Any, patch: Patch, forward: Forward, own: bool) -> None:
    """Remark on a cache of diffusers that branches or runs share.

    Args:
        name: of the transformer.
        model: the transformer.
        patch: what is on.
        forward: the one that begins.
        own: whether the cache is the patch's, which forgets one run for the next.
    """
    cache, place = composition.shared_cache(model), forward.place
    if cache is None:
        return
    why = f"one gets the answer for the other from {cache}, patched or not"
    if composition.mixes_branches(model, place.branch):
        what = f"{name} has several guidance branches, which are computed in turn"
        patch.note([place.run], f"{what}: {why}")
    if not own and (others := patch.runs.others_than(place.run)):
        what = f"{name} has several runs under way, which have to wait for each other"
        patch.note([place.run, *others], f"{what}: {why}")


def on_turns(cache: StepCache, model: Any, patch: Patch, name: str, run: Run) -> None:
    """Remark on runs that take turns where a step cache remembers one, and on forwards of none.

    Args:
        cache: forgets what is of another run than the one that begins.
        model: a weak reference to the transformer.
        patch: what is on.
        name: of the transformer.
        run: of the forward that begins.
    """
    robbed = cache.begin_forward(model(), run)
    if run.untold is not None:
        patch.note([run], f"cache={cache.threshold}: no step leaves blocks out: {run.untold}")
    elif robbed:
        patch.say_once(
            f"several runs take turns on {name}, and its cache remembers one: steps are computed"
            " that could be left out; let one run follow the other"
        )
