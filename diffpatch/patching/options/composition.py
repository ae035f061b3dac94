"""What combines with what: methods with methods, and methods with the caches of diffusers.

Methods

===========================  ====================================================================
``static``                   radial, neighborhood, sliding_tile, window, disc: alone, or inside
                             ``temporal``, written "radial+temporal" or ["radial", "temporal"]
``static`` and ``temporal``  if the pattern stays as it is from step to step (``shift="layer"`` of
                             window, not "step" or "random") and the softmax is not sharpened,
                             because results of earlier steps are merged into it
``linear`` and ``temporal``  refused: linear leaves nothing out that could be remembered
``longer``                   alone: its keyframes move with every step
``larger``                   alone; inside ``temporal`` with ``sharpen=1.0`` and without ``focus``
``dynamic``                  alone: it remembers its choice itself, for ``refresh`` steps. With
                             every layout, mask and number of key heads; rules that compare heads
                             (sol, sparge, xattention, nabla) compare those of one process under
                             Ulysses, and ``budgets`` name all heads and are refused there
dense steps and layers       with everything; a method sees only the calls between
===========================  ====================================================================

Caches, which diffusers puts around attention or around whole blocks (``transformer.enable_cache``);
patch first or enable first, it makes no difference

=============================  ==================================================================
``PyramidAttentionBroadcast``  yes. It counts calls, not steps, and knows no guidance branches:
                               where those run in turn, diffusers hands the answer for one to the
                               other, patched or not. A warning says so
``FirstBlockCache``            yes. The first block decides on results that are now a little off:
                               look at its threshold again, or keep that block dense.
                               ``patch(…, cache=0.1)`` enables it as a part of the patch, which
                               forgets it between runs, tells it guidance branches that the pipeline
                               does not name, and takes it off again. Refused for the models on
                               which diffusers' own fails
``MagCache``                   yes. Calibrate its ratios with the patch on
``TaylorSeerCache``, ``SeaCache``, ``TextKVCache``  yes
``FasterCache``                yes, but not with ``temporal``, nor with ``dynamic`` unless
                               ``refresh=1``: it drops the unconditional rows of
                               most batches, so that nothing can be carried from one to the next
any other                      refused, because it is not known what it expects of attention
=============================  ==================================================================

Held steps (``patch(…, hold=0.005)``, see `diffpatch.patching.run.path`) combine with every method
and cache. They belong to a run, so that runs at once do not mix. A held step runs no part of the
transformer: what methods carry ages by steps, as under a cache. Where nothing tells the steps,
where the scheduler runs the model twice a step, and in a transformer that is compiled as a whole,
none is held, and the report says why. A transformer that is cut over several processes is refused.
Whatever the forward is given that was the same in its first two steps (texts, scales, images) makes
it run when it changes. So do a ControlNet that begins or ends, and latents that are more than three
times as far off as they were going, because a callback has exchanged them. Weights that change, and
latents that change less, show with the next forward that is made.

Every cache keeps its results on the model, so that two runs over it at once are mixed up, patched
or not: a warning and a note in the report say so.

A call that a cache skips is not made, so a method does nothing in it and the report does not count
it. Steps go on counting: the state of ``temporal`` and the choice of ``dynamic`` age by steps,
however many calls there were.
Perturbed-attention guidance (``LayerSkipConfig(skip_attention_scores=True)``) is refused: it goes
into the attention of torch itself, which is not called any more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from diffpatch.errors import BadParameter, DiffpatchError
from diffpatch.methods.base import Method
from diffpatch.methods.wrapper import Wrapper

CACHES = (
    "PyramidAttentionBroadcast",
    "FasterCache",
    "FirstBlockCache",
    "MagCache",
    "SeaCache",
    "TaylorSeerCache",
    "TextKVCache",
)
# Caches that change the rows of a batch from call to call, so that no state fits.
UNEVEN = ("FasterCache",)
# Caches that mix guidance branches which run in turn.
BRANCHLESS = ("PyramidAttentionBroadcast",)
CACHE_DIT = "_is_cached"  # what cache-dit sets on a model that it caches
STEPS = range(8)  # steps to look at: patterns that follow them change within these


def check_method(method: Method) -> None:
    """Refuse a method over another that it cannot be merged with.

    Raises:
        BadParameter: says which parameter stands in the way.
    """
    if not (isinstance(method, Wrapper) and method.needs_steps):
        return
    over = method.over
    if any(over.variant(0, step) != over.variant(0, 0) for step in STEPS):
        still = "use shift='layer', 'count' or 'none'" if hasattr(over, "shift") else "use it alone"
        raise BadParameter(
            f"{method.name} over {over}: its pattern changes from step to step, and what is carried"
            f" over the steps belongs to one pattern; {still}"
        )
    if over.softmax_factor() != 1:
        raise BadParameter(
            f"{method.name} over {over}: results of earlier steps are merged into a softmax that is"
            " not sharpened; give sharpen=1.0"
        )


def check_model(model: Any, method: Method, modules: Iterable[Any]) -> None:
    """Refuse caches and guidance that would compute something else than they say.

    Called before every forward, because caches come and go after patching; costs a look at each
    module.

    Raises:
        DiffpatchError: names what is on and what to do.
    """
    from diffpatch import internals  # imports diffusers, which takes seconds
    from diffpatch.patching.attention import parallel

    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise DiffpatchError(
            f"torch.jit.trace records {type(model).__name__}, and would keep the pattern of one"
            " grid: use torch.compile or torch.export, or unpatch first"
        )
    if method.why_one_process is not None and parallel.context(model) is not None:
        raise DiffpatchError(f"{method.name}: {method.why_one_process}")
    cache = cache_of(model)
    if cache is not None and cache not in CACHES:
        raise DiffpatchError(
            f"{cache} is enabled on {type(model).__name__} and not known to work with a patched"
            f" attention (known: {', '.join(CACHES)}): call disable_cache() or unpatch first"
        )
    if cache in UNEVEN and method.needs_steps:
        raise DiffpatchError(
            f"{cache} drops rows of the batch from one step to the next, so {method.name} has"
            " nothing to carry over: use one of the two"
        )
    for module in modules:
        # Not getattr: modules search long for an attribute that they do not have.
        registry = vars(module).get(internals.HOOKS)
        hooks = {} if registry is None else registry.hooks
        if hooks and any(getattr(h, "skip_attention_scores", False) for h in hooks.values()):
            raise DiffpatchError(
                "a hook skips attention scores (perturbed-attention guidance), which reaches into"
                " torch's attention and misses a patched one: remove the hook or unpatch first"
            )


def mixes_branches(model: Any, branch: int) -> bool:
    """Whether a cache hands results of one guidance branch to another in this forward."""
    return branch > 0 and cache_of(model) in BRANCHLESS


def shared_cache(model: Any) -> str | None:
    """The cache on a model that all runs over it share, diffusers' or cache-dit's; None without."""
    return cache_of(model) or ("cache-dit" if getattr(model, CACHE_DIT, False) else None)


def cache_of(model: Any) -> str | None:
    """The cache that is enabled on a model, without "Config"; None without one."""
    from diffpatch import internals

    config = getattr(model, internals.CACHE, None)
    return None if config is None else type(config).__name__.removesuffix("Config")
